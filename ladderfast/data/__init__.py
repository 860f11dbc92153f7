"""Data readers, the balanced draw of labels, and minibatches in an order that a seed fixes."""

from .cifar10 import CIFAR10
from .dataset import Batch, Batches, Dataset, DataSource, EnsembleBatches
from .digits import Digits
from .mnist import MNIST
from .shuffle import draw_labels

__all__ = [
    "CIFAR10",
    "MNIST",
    "Batch",
    "Batches",
    "DataSource",
    "Dataset",
    "Digits",
    "EnsembleBatches",
    "draw_labels",
]
