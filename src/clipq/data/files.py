"""Read the files of MNIST (IDX) and of CIFAR-10 (binary version) strictly: anything odd is an error.

Formats: the IDX description on the MNIST home page, and "Binary version" on the CIFAR-10 home page.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipq.data.images import Images, check_labels
from clipq.errors import DataError

MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
CIFAR10_FILES = {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)}

_IDX_UINT8 = 0x08  # the third byte of the magic number: the type; the fourth is the number of dimensions
_CIFAR10_ROWS, _CIFAR10_ROW = 10_000, 1 + 3 * 32 * 32
_GET_A_COPY = "The file is damaged or another one; get it again"


def read_mnist(folder: Path, part: str) -> Images:
    """The "train" or "test" images of MNIST, or of another set in its format, (N, 1, 28, 28), 10 classes.

    Raises:
        DataError: a file is missing, cannot be read, is damaged, or does not go with the other.
    """
    images_path, labels_path = (_plain_or_gzip(folder / name) for name in MNIST_FILES[part])
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1).long()
    if images.shape[1:] != (28, 28):
        raise DataError(f"{images_path}: images are {images.shape[1]} × {images.shape[2]}; MNIST's are 28 × 28")
    if len(images) != len(labels):
        raise DataError(f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path.name}")
    if not len(images):
        raise DataError(f"{images_path}: holds no images. {_GET_A_COPY}")
    check_labels(labels, 10, str(labels_path))
    return Images(images.unsqueeze(1), labels)


def read_cifar10(folder: Path, part: str) -> Images:
    """The "train" or "test" images of CIFAR-10, (N, 3, 32, 32), 10 classes.

    Raises:
        DataError: a file is missing, cannot be read or is damaged.
    """
    size = _CIFAR10_ROWS * _CIFAR10_ROW
    paths = [folder / name for name in CIFAR10_FILES[part]]
    rows = np.empty((len(paths), _CIFAR10_ROWS, _CIFAR10_ROW), np.uint8)
    for path, into in zip(paths, rows, strict=True):
        content = _read(path)
        if len(content) != size:
            raise DataError(
                f"{path}: {len(content):,} bytes; a batch of CIFAR-10 has {size:,} "
                f"({_CIFAR10_ROWS:,} × {_CIFAR10_ROW:,}). {_GET_A_COPY}"
            )
        into[:] = np.frombuffer(content, np.uint8).reshape(into.shape)
        check_labels(torch.from_numpy(into[:, 0].astype(np.int64)), 10, str(path))
    every = torch.from_numpy(rows.reshape(-1, _CIFAR10_ROW))
    return Images(every[:, 1:].reshape(-1, 3, 32, 32), every[:, 0].long())


def read_idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file of unsigned bytes, gzip-compressed if its name ends in ``.gz``: uint8, as many dimensions as told.

    Raises:
        DataError: the file cannot be read, or its magic number or size is wrong.
    """
    content = _read(path)
    header_size = 4 * (1 + dimensions)
    if len(content) < header_size:
        raise DataError(f"{path}: {len(content)} bytes, less than the header of an IDX file. {_GET_A_COPY}")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", content[:header_size])
    expected_magic = _IDX_UINT8 << 8 | dimensions
    if magic != expected_magic:
        raise DataError(
            f"{path}: starts with 0x{magic:08x}; an IDX file of bytes in {dimensions} dimensions starts with "
            f"0x{expected_magic:08x}. {_GET_A_COPY}"
        )
    size = header_size + math.prod(shape)
    if len(content) != size:
        raise DataError(
            f"{path}: {len(content):,} bytes; its header announces {' × '.join(map(str, shape))}, "
            f"so {size:,}. {_GET_A_COPY}"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header_size).reshape(shape).copy())


def _plain_or_gzip(path: Path) -> Path:
    return path if path.exists() else path.with_name(f"{path.name}.gz")


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: there is no such file. Give the folder that holds {path.parent.name}/ as --data-root or in "
            "CLIPQ_DATA, or neither to download the set"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}). {_GET_A_COPY}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
