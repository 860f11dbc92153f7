"""Data readers, the balanced draw of labels, and minibatches in an order that a seed fixes."""

from .cifar10 import CIFAR10
from .cifar100 import CIFAR100
from .dataset import Batch, Batches, Dataset, DataSource, EnsembleBatches
from .digits import Digits
from .grouped import GroupedBatches, GroupedImages
from .images import ImageDataset
from .mnist import MNIST
from .moving_mnist import MovingMNIST
from .occluded_moving_mnist import OccludedMovingDigits, OccludedMovingMNIST, SequenceBatch, SequenceBatches
from .piano_rolls import PianoRollBatch, PianoRollBatches, PianoRolls
from .shapes import Shapes
from .shuffle import draw_labels
from .stl10 import STL10
from .svhn import SVHN
from .textured_mnist import FrequencyMNIST, TexturedMNIST

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "STL10",
    "SVHN",
    "Batch",
    "Batches",
    "DataSource",
    "Dataset",
    "Digits",
    "EnsembleBatches",
    "FrequencyMNIST",
    "GroupedBatches",
    "GroupedImages",
    "ImageDataset",
    "MovingMNIST",
    "OccludedMovingDigits",
    "OccludedMovingMNIST",
    "PianoRollBatch",
    "PianoRollBatches",
    "PianoRolls",
    "SequenceBatch",
    "SequenceBatches",
    "Shapes",
    "TexturedMNIST",
    "draw_labels",
]
