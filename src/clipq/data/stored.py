"""Encoded images in files on any fsspec file system: read by index, many at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PAUSES = (1.0, 5.0, 25.0)
"""Seconds before each of the further tries to read what could not be read."""


@dataclass(frozen=True, eq=False)
class StoredImages:
    """Where N images lie: each is a file of its own, or a range of bytes in one.

    The tables are arrays, not lists of objects: worker processes then share their memory.

    Attributes:
        url: any URL of the file system.
        files: paths in it, UTF-8, shape (F,).
        file: in which of them each image lies, int64, shape (N,).
        ranges: first byte and the one after the last, int64, shape (N, 2); None if every file is one image.
        names: what to call each image, UTF-8, shape (N,).
        targets: int64 labels, shape (N,).
    """

    url: str
    files: npt.NDArray[np.bytes_]
    file: npt.NDArray[np.int64]
    ranges: npt.NDArray[np.int64] | None
    names: npt.NDArray[np.bytes_]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.file)

    def subset(self, indices: Tensor) -> StoredImages:
        """The images at these indices (int64, shape (K,))."""
        chosen = indices.numpy()
        return replace(
            self,
            file=self.file[chosen],
            ranges=None if self.ranges is None else self.ranges[chosen],
            names=self.names[chosen],
            targets=self.targets[indices],
        )

    def name(self, index: int) -> str:
        """What to call the image in an error."""
        return bytes(self.names[index]).decode()

    def read(self, indices: Sequence[int]) -> list[bytes | Exception]:
        """The encoded images at these indices; instead of one that cannot be read, what was raised.

        File systems in the network fetch them side by side. What fails is tried again, unless there is no such file.
        """
        found = self._read(indices)
        for pause in PAUSES:
            failed = [
                i
                for i, got in enumerate(found)
                if isinstance(got, Exception) and not isinstance(got, FileNotFoundError)
            ]
            if not failed:
                break
            time.sleep(pause)
            for i, got in zip(failed, self._read([indices[i] for i in failed]), strict=True):
                found[i] = got
        return found

    def _read(self, indices: Sequence[int]) -> list[bytes | Exception]:
        paths = [bytes(self.files[self.file[index]]).decode() for index in indices]
        ranges = [(None, None)] * len(paths) if self.ranges is None else self.ranges[list(indices)].tolist()
        starts, stops = (list(column) for column in zip(*ranges, strict=True))
        found: list[bytes | Exception] = file_system(self.url).cat_ranges(paths, starts, stops, on_error="return")
        return found


def file_system(url: str) -> Any:
    """The fsspec file system of a URL or local path, opened in this process: connections do not survive a fork."""
    return _opened(url, os.getpid())


@lru_cache(maxsize=8)
def _opened(url: str, process: int) -> Any:
    return fsspec.core.url_to_fs(url)[0]


def joined(images: Sequence[StoredImages]) -> StoredImages:
    """The images of several files of ranges, one after the other."""
    counts = np.cumsum([0, *(len(part.files) for part in images)])
    return StoredImages(
        images[0].url,
        np.concatenate([part.files for part in images]),
        np.concatenate([part.file + first for part, first in zip(images, counts, strict=False)]),
        np.concatenate([part.ranges for part in images if part.ranges is not None]),
        np.concatenate([part.names for part in images]),
        torch.cat([part.targets for part in images]),
    )
