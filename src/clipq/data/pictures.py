"""Samples from picture files: decoded, cut and augmented in worker processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipq.data.batches import Batch, Epoch, Samples
from clipq.data.preprocessing import Preprocessing
from clipq.data.seeding import seeded_generator
from clipq.data.stored import StoredImages
from clipq.errors import DataError

_Made = list[tuple[Tensor, int] | tuple[str, str]]
"""Of each picture its pixels and label, or its name and why it cannot be used."""


@dataclass(frozen=True, eq=False)
class PictureSamples(Samples):
    """Pictures as float32 inputs (B, 3, height, width) and int64 targets (B,).

    The augmentation of a picture depends on seed, epoch and its place in the set alone: batch size, workers and ranks
    change nothing.

    Attributes:
        name: in errors; the data and the part, such as "imagenet.yaml, training set".
        workers: processes that read and decode; 0 for this one.
        max_corrupt: how many pictures may turn out to be unusable. They are left out, each with a warning.
        corrupt: those found so far, by name, with the reason.
    """

    name: str
    images: StoredImages
    preprocessing: Preprocessing
    workers: int
    max_corrupt: int
    corrupt: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def make(self, epoch: Epoch) -> Iterator[Batch]:
        """See `Samples.make`. Minibatches with unusable pictures are smaller."""
        loader: DataLoader[Any] = DataLoader(
            _Pictures(self.images, self.preprocessing, (epoch.seed, epoch.epoch) if epoch.augment else None),
            batch_sampler=[group.tolist() for group in epoch.groups[epoch.start :]],
            num_workers=self.workers,
            collate_fn=self._collate,
            generator=seeded_generator("workers", epoch.seed, epoch.epoch),
            pin_memory=torch.cuda.is_available(),
        )
        for position, (inputs, targets, failures) in enumerate(loader, epoch.start):
            self._count(failures)
            if not len(targets):
                raise DataError(f"{self.name}: no picture of batch {position} can be used: {_listed(failures)}")
            yield inputs, targets

    def _collate(self, made: _Made) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
        good = [(pixels, label) for pixels, label in made if isinstance(pixels, Tensor)]
        size = self.preprocessing.size
        pixels = torch.stack([pixels for pixels, _ in good]) if good else torch.empty(0, 3, size, size)
        targets = torch.tensor([label for _, label in good], dtype=torch.int64)
        failures = [(name, str(reason)) for name, reason in made if isinstance(name, str)]
        return self.preprocessing.normalisation(pixels), targets, failures

    def _count(self, failures: Sequence[tuple[str, str]]) -> None:
        for name, reason in failures:
            if name not in self.corrupt:
                self.corrupt[name] = reason
                warnings.warn(f"{self.name}: {name} is left out ({reason}); {len(self.corrupt)} so far", stacklevel=3)
        if len(self.corrupt) > self.max_corrupt:
            raise DataError(
                f"{self.name}: {len(self.corrupt)} pictures cannot be used, and max_corrupt is {self.max_corrupt}: "
                f"{_listed(list(self.corrupt.items()))}. Repair or remove them, or allow more"
            )


@dataclass(frozen=True, eq=False)
class _Pictures(Dataset[Any]):
    """What a worker process does."""

    images: StoredImages
    preprocessing: Preprocessing
    draw: tuple[int, int] | None

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> _Made:
        made: _Made = []
        for index, encoded in zip(indices, self.images.read(indices), strict=True):
            try:
                if isinstance(encoded, Exception):
                    raise encoded
                draw = None if self.draw is None else (*self.draw, index)
                made.append((self.preprocessing(encoded, draw), int(self.images.targets[index])))
            except Exception as error:  # Pillow has no common class for what is wrong with a file
                reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
                made.append((self.images.name(index), reason))
        return made


def _listed(failures: Sequence[tuple[str, str]], most: int = 5) -> str:
    shown = "; ".join(f"{name} ({reason})" for name, reason in failures[:most])
    return shown + ("; …" if len(failures) > most else "")
