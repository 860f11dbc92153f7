"""Data readers, the balanced draw of labels, and minibatches in an order that a seed fixes."""

from .cifar10 import CIFAR10
from .dataset import Batch, Batches, Dataset, DataSource, EnsembleBatches
from .digits import Digits
from .mnist import MNIST
from .occluded_moving_mnist import OccludedMovingDigits, OccludedMovingMNIST, SequenceBatch, SequenceBatches
from .piano_rolls import PianoRollBatch, PianoRollBatches, PianoRolls
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
    "OccludedMovingDigits",
    "OccludedMovingMNIST",
    "PianoRollBatch",
    "PianoRollBatches",
    "PianoRolls",
    "SequenceBatch",
    "SequenceBatches",
    "draw_labels",
]
