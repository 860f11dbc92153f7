"""Data readers, the balanced draw of labels, and minibatches in an order that a seed fixes."""

from .dataset import Batch, Batches, Dataset
from .digits import Digits
from .mnist import MNIST
from .shuffle import draw_labels

__all__ = ["MNIST", "Batch", "Batches", "Dataset", "Digits", "draw_labels"]
