"""Minibatches: in an order that depends on seed and epoch alone, from any position on, and shared among processes.

Of several processes (ranks), the k-th minibatches together are the k-th minibatch of one process whose batches are so
many times larger: the same samples, in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clipq.data.images import CropAndFlip, Images, Normalisation
from clipq.data.seeding import seeded_generator
from clipq.errors import DataError

Batch = tuple[Tensor, Tensor]


class Batches(Iterator[Batch]):
    """The minibatches of one epoch, each (inputs, targets).

    Attributes:
        total: how many there are in the whole epoch, for this rank.
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


@dataclass(frozen=True)
class Epoch:
    """One pass over samples, as one rank makes it.

    Attributes:
        groups: the samples of each of the rank's minibatches, int64 indices of shape (B,).
        start: the first minibatch to make.
    """

    groups: list[Tensor]
    seed: int
    epoch: int
    start: int
    augment: bool
    rank: int
    world_size: int


class Samples(ABC):
    """One part of a data set, such as its training samples, ready to be trained or evaluated on."""

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def make(self, epoch: Epoch) -> Iterator[Batch]:
        """The minibatches from ``epoch.start`` on.

        Raises:
            DataError: a sample cannot be used.
        """

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
        rank: int = 0,
        world_size: int = 1,
    ) -> Batches:
        """The minibatches of one epoch.

        Args:
            batch_size: samples in a batch of one rank; the last one may be smaller.
            seed, epoch: the same pair gives the same order and augmentation.
            shuffle: in random order, else in the order of the set. If shuffled, every rank gets as many batches and
                samples as any other: the few that do not go round are left out, other ones in each epoch. If not,
                every sample is given once, and some ranks may get one batch less.
            augment: with the set's own augmentation, if it has one.
            drop_last: leave a smaller last batch out.
            start: the first batch to give, counted from 0; those before it are not made.
            channels_last: inputs of four dimensions in torch's channels-last layout.
            rank, world_size: which of how many processes this is; no two get the same sample.

        Raises:
            DataError: an argument is out of range, no batch is left, or a sample cannot be used.
        """
        groups = batch_indices(
            self.name, len(self), batch_size, seed, epoch, shuffle, drop_last, start, rank, world_size
        )
        made = self.make(Epoch(groups, seed, epoch, start, augment, rank, world_size))
        pairs = ((as_channels_last(inputs, channels_last), targets) for inputs, targets in made)
        return Batches(pairs, len(groups), start)


@dataclass(frozen=True, eq=False)
class ImageSamples(Samples):
    """Samples cut out of tensors: float32 inputs (B, channels, height, width) and int64 targets (B,)."""

    name: str
    images: Images
    normalisation: Normalisation
    augmentation: CropAndFlip | None = None

    def __len__(self) -> int:
        return len(self.images)

    def make(self, epoch: Epoch) -> Iterator[Batch]:
        """See `Samples.make`. Augmentation, too, resumes exactly at ``epoch.start``."""
        for position, group in enumerate(epoch.groups[epoch.start :], epoch.start):
            pixels = self.images.inputs[group]
            if self.augmentation and epoch.augment:
                # A generator of its own for each batch: to resume, nothing need be drawn again.
                generator = seeded_generator("augmentation", epoch.seed, epoch.epoch, position)
                pixels = self.augmentation(pixels, generator, epoch.rank, epoch.world_size)
            yield self.normalisation(pixels), self.images.targets[group]


def batch_indices(
    name: str,
    n: int,
    batch_size: int,
    seed: int,
    epoch: int,
    shuffle: bool,
    drop_last: bool,
    start: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[Tensor]:
    """Which of n samples make up each of a rank's minibatches of an epoch, in order: int64 indices, shape (B,).

    Raises:
        DataError: ``batch_size``, ``start`` or ``rank`` is out of range, or the samples do not suffice for every rank.
    """
    if batch_size < 1:
        raise DataError(f"{name}: the batch size is {batch_size}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise DataError(f"{name}: rank {rank} of {world_size} processes; ranks are 0 to the number of processes - 1")
    generator = seeded_generator("order", seed, epoch)
    order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
    together = batch_size * world_size
    if drop_last:
        order = order[: n - n % together]
    elif shuffle:
        order = order[: n - n % together % world_size]
    if not len(order):
        raise DataError(
            f"{name}: {n} samples do not fill one batch of {together}, and smaller ones are dropped. "
            "Use a smaller batch size or more data"
            if drop_last
            else f"{name}: {n} samples do not go round {world_size} processes. Use fewer processes or more data"
        )
    parts = [order[first : first + together].tensor_split(world_size)[rank] for first in range(0, len(order), together)]
    groups = [part for part in parts if len(part)]
    if not 0 <= start <= len(groups):
        raise DataError(
            f"{name}: cannot start at batch {start}; the epoch has {len(groups)}. "
            "Resume with the data, batch size and number of processes that the run was started with"
        )
    return groups


def as_channels_last(inputs: Tensor, wanted: bool) -> Tensor:
    """The inputs in torch's channels-last layout, if that is wanted and they have four dimensions."""
    return inputs.contiguous(memory_format=torch.channels_last) if wanted and inputs.dim() == 4 else inputs
