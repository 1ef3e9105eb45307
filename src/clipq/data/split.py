"""Hold part of a labelled set out, with every class in proportion."""

from __future__ import annotations

import torch
from torch import Tensor

from clipq.data.seeding import seeded_generator
from clipq.errors import DataError


def stratified_split(targets: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the part to keep and of the part held out, both ascending.

    ``round(fraction · N)`` samples are held out, at least one and at most N - 1. Each class gives its share,
    rounded down or up so that the total comes out (largest remainders first).

    Args:
        targets: int64 labels from 0 on, shape (N,).
        fraction: of the samples to hold out; above 0 and below 1.
        seed: the same seed gives the same split on every machine.

    Raises:
        DataError: the fraction is out of range, or there are fewer than two samples.
    """
    if not 0 < fraction < 1:
        raise DataError(f"the fraction to hold out is {fraction}; it must be above 0 and below 1, such as 0.1")
    n = len(targets)
    if n < 2:
        raise DataError(f"a set of {n} samples cannot be split in two; it needs at least 2")
    counts = targets.bincount()
    shares = counts.double() * fraction
    held_counts = shares.floor().long()
    missing = min(max(round(n * fraction), 1), n - 1) - int(held_counts.sum())
    held_counts[(shares - held_counts).argsort(descending=True, stable=True)[:missing]] += 1

    generator = seeded_generator("split", seed)
    held = torch.zeros(n, dtype=torch.bool)
    for label, count in enumerate(held_counts.tolist()):
        members = (targets == label).nonzero().flatten()
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()
