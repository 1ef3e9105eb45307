"""Minibatches: in an order that depends on seed and epoch alone, and from any position on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from clipq.data.images import CropAndFlip, Images, Normalisation
from clipq.data.seeding import seeded_generator
from clipq.errors import DataError

Batch = tuple[Tensor, Tensor]


class Batches(Iterator[Batch]):
    """The minibatches of one epoch, each (inputs, targets).

    Attributes:
        total: how many there are in the whole epoch.
        position: how many of them lie behind; ``start=position`` in a later call goes on from here.
    """

    def __init__(self, pairs: Iterator[Batch], total: int, position: int) -> None:
        self._pairs = pairs
        self.total = total
        self.position = position

    def __next__(self) -> Batch:
        batch = next(self._pairs)
        self.position += 1
        return batch


class Samples(Protocol):
    """One part of a data set, such as its training samples, ready to be trained or evaluated on."""

    def __len__(self) -> int: ...

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = False,
        augment: bool = False,
        drop_last: bool = False,
        start: int = 0,
        channels_last: bool = False,
    ) -> Batches:
        """The minibatches of one epoch.

        Args:
            batch_size: samples in a batch; the last one may be smaller.
            seed, epoch: the same pair gives the same order and augmentation.
            shuffle: in random order, else in the order of the set.
            augment: with the set's own augmentation, if it has one.
            drop_last: leave a smaller last batch out.
            start: the first batch to give, counted from 0.
            channels_last: inputs of four dimensions in torch's channels-last layout.

        Raises:
            DataError: an argument is out of range, no batch is left, or a sample cannot be used.
        """
        ...


@dataclass(frozen=True, eq=False)
class ImageSamples:
    """Samples cut out of tensors: float32 inputs (B, channels, height, width) and int64 targets (B,)."""

    name: str
    images: Images
    normalisation: Normalisation
    augmentation: CropAndFlip | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = False,
        augment: bool = False,
        drop_last: bool = False,
        start: int = 0,
        channels_last: bool = False,
    ) -> Batches:
        """The minibatches of one epoch; see `Samples.batches`. Augmentation, too, resumes exactly at ``start``."""
        groups = batch_indices(self.name, len(self), batch_size, seed, epoch, shuffle, drop_last, start)
        augmentation = self.augmentation if augment else None

        def pairs() -> Iterator[Batch]:
            for position in range(start, len(groups)):
                pixels = self.images.inputs[groups[position]]
                if augmentation:
                    # A generator of its own for each batch: to resume, nothing need be drawn again.
                    pixels = augmentation(pixels, seeded_generator("augmentation", seed, epoch, position))
                yield as_channels_last(self.normalisation(pixels), channels_last), self.images.targets[groups[position]]

        return Batches(pairs(), len(groups), start)


def batch_indices(
    name: str, n: int, batch_size: int, seed: int, epoch: int, shuffle: bool, drop_last: bool, start: int
) -> list[Tensor]:
    """Which of n samples make up each minibatch of an epoch, in order: int64 indices, shape (B,).

    Raises:
        DataError: ``batch_size`` or ``start`` is out of range, or no full batch can be made.
    """
    if batch_size < 1:
        raise DataError(f"{name}: the batch size is {batch_size}; it must be at least 1")
    generator = seeded_generator("order", seed, epoch)
    order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
    groups = [order[first : first + batch_size] for first in range(0, n, batch_size)]
    if drop_last and n % batch_size:
        groups.pop()
    if not groups:
        raise DataError(
            f"{name}: {n} samples do not fill one batch of {batch_size}, and smaller ones are dropped. "
            "Use a smaller batch size or more data"
        )
    if not 0 <= start <= len(groups):
        raise DataError(
            f"{name}: cannot start at batch {start}; the epoch has {len(groups)}. "
            "Resume with the data and batch size that the run was started with"
        )
    return groups


def as_channels_last(inputs: Tensor, wanted: bool) -> Tensor:
    """The inputs in torch's channels-last layout, if that is wanted and they have four dimensions."""
    return inputs.contiguous(memory_format=torch.channels_last) if wanted and inputs.dim() == 4 else inputs
