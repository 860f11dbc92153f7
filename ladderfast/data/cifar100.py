"""CIFAR-100 from its binary or its Python files, unpacked or in their archive."""

from __future__ import annotations

from .cifar10 import CIFAR10, Layout


class CIFAR100(CIFAR10):
    """50,000 training and 10,000 test images of 32 x 32 pixels in three colours, of 100 classes, as x (N, 3072).

    Labels are the fine ones. Preprocessed as `CIFAR10`.

    Args:
        data_dir: folder with the two files, or with a folder cifar-100-binary or cifar-100-python of them, or with the
            archive cifar-100-binary.tar.gz or cifar-100-python.tar.gz as it is. Default: ladderfast/cifar100 in the
            user's cache.
        num_labels: labelled samples, the same number of each class; null for all 50,000.
        seed: draws the labelled samples.
        whiten: false leaves the images as `contrast` says.
        contrast: without whitening, each image less its mean and scaled to the norm 55; false: values 0..1.
        shift: training images are moved by up to so many pixels each way, at random.
        mirror: training images are mirrored left to right, every other one, at random.
        download: fetch the binary archive if there are no data.

    Raises FileNotFoundError where data are missing, ValueError for files that are truncated, damaged or not
    CIFAR-100's, OSError where a download fails from every mirror. Python files are read without executing what they
    may hold.
    """

    layout = Layout(
        name="CIFAR-100",
        cache="cifar100",
        batches=(
            ("train", "16019d7e3df5f24257cddd939b257f8d", 50000),
            ("test", "f0ef6b0ae62326f3e7ffdfab6717acfc", 10000),
        ),
        forms={
            "python": ("cifar-100-python", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
            "binary": ("cifar-100-binary", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
        },
        classes=100,
        labels="fine_labels",
        label_bytes=2,
    )
