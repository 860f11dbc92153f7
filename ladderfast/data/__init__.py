"""Data readers, the balanced draw of labels, and minibatches in an order that a seed fixes."""

from .cifar10 import CIFAR10
from .dataset import Batch, Batches, Dataset, DataSource, EnsembleBatches
from .digits import Digits
from .grouped import GroupedBatches, GroupedImages
from .mnist import MNIST
from .shapes import Shapes
from .shuffle import draw_labels
from .textured_mnist import FrequencyMNIST, TexturedMNIST

__all__ = [
    "CIFAR10",
    "MNIST",
    "Batch",
    "Batches",
    "DataSource",
    "Dataset",
    "Digits",
    "EnsembleBatches",
    "FrequencyMNIST",
    "GroupedBatches",
    "GroupedImages",
    "Shapes",
    "TexturedMNIST",
    "draw_labels",
]
