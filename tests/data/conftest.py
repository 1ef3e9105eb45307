"""Small and empty data sets in the formats of the real ones."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

CIFAR10_BATCH_BYTES = 30_730_000


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist_root(tmp_path: Path) -> Path:
    """A data root with 50 training and 20 test images of random pixels."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train", 50), ("t10k", 20)):
        write_idx(folder / f"{name}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)))
        write_idx(folder / f"{name}-labels-idx1-ubyte", np.arange(n) % 10)
    return tmp_path


@pytest.fixture
def cifar10_root(tmp_path: Path) -> Path:
    """A data root whose six batches are whole and all black."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        with (folder / f"{name}.bin").open("wb") as file:
            file.truncate(CIFAR10_BATCH_BYTES)
    return tmp_path
