"""The data sets that clipq knows by name: digits, MNIST and CIFAR-10."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from clipq.data.download import fetch_cifar10, fetch_mnist
from clipq.data.files import read_cifar10, read_mnist
from clipq.data.images import CropAndFlip, Images, ImageSet, Normalisation
from clipq.data.split import stratified_split
from clipq.errors import DataError
from clipq.suggest import nearest

DATA_ROOT_VARIABLE = "CLIPQ_DATA"

DIGITS_NORMALISATION = Normalisation(scale=16, mean=(0.0,), std=(1.0,))
MNIST_NORMALISATION = Normalisation(scale=256, mean=(0.0,), std=(1.0,))  # of Caffe's LeNets
CIFAR10_NORMALISATION = Normalisation(scale=255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # ImageNet's


def digits(root: Path | None = None) -> ImageSet:
    """Scikit-learn's 1,797 handwritten digits, (N, 1, 8, 8), pixels 0 to 16. ``root`` is not needed.

    The set has no test part of its own; a fixed fifth of it, with every class in proportion, is ours.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = Images(
        torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 8, 8), torch.from_numpy(labels).to(torch.int64)
    )
    train, test = stratified_split(images.targets, 0.2, seed=0)
    return ImageSet("digits", images.subset(train), images.subset(test), 10, DIGITS_NORMALISATION)


def mnist(root: Path | None = None) -> ImageSet:
    """MNIST, (N, 1, 28, 28), from ``root/mnist``, or downloaded if there is no root."""
    folder = fetch_mnist() if root is None else root / "mnist"
    return ImageSet("mnist", read_mnist(folder, "train"), read_mnist(folder, "test"), 10, MNIST_NORMALISATION)


def cifar10(root: Path | None = None) -> ImageSet:
    """CIFAR-10, (N, 3, 32, 32), from ``root/cifar-10-batches-bin``, or downloaded if there is no root."""
    folder = fetch_cifar10() if root is None else root / "cifar-10-batches-bin"
    train, test = read_cifar10(folder, "train"), read_cifar10(folder, "test")
    return ImageSet("cifar10", train, test, 10, CIFAR10_NORMALISATION, CropAndFlip(padding=4))


DATA_SETS: Mapping[str, Callable[[Path | None], ImageSet]] = MappingProxyType(
    {"digits": digits, "mnist": mnist, "cifar10": cifar10}
)


def load_images(name: str, root: str | Path | None = None) -> ImageSet:
    """A data set by name.

    Args:
        name: "digits", "mnist" or "cifar10".
        root: the folder that holds the set's own folder; else the environment variable CLIPQ_DATA; with neither,
            the set is downloaded into the user's cache folder.

    Raises:
        DataError: the name is unknown, or the files are missing, damaged or cannot be downloaded.
    """
    if name not in DATA_SETS:
        raise DataError(
            f"data set {name!r} is not one of clipq's{nearest(name, DATA_SETS)}; it has {', '.join(DATA_SETS)}. "
            "Data of your own is named as 'file.py:function'"
        )
    chosen = root if root is not None else os.environ.get(DATA_ROOT_VARIABLE) or None
    folder = Path(chosen).expanduser() if chosen is not None else None
    if folder is not None and name != "digits" and not folder.is_dir():
        given = "the data root" if root is not None else DATA_ROOT_VARIABLE
        raise DataError(f"{given} is {folder}, which is not a folder; give the one that holds the data sets' folders")
    return DATA_SETS[name](folder)
