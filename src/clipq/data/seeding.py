"""Random generators that depend on named numbers alone."""

from __future__ import annotations

import hashlib

import torch


def seeded_generator(purpose: str, seed: int, *stream: int) -> torch.Generator:
    """A CPU generator for one purpose, such as "order", and one stream of it, such as an epoch.

    Other purposes, seeds or streams give unrelated random numbers; the same ones give the same, on every machine.
    """
    digest = hashlib.sha256(repr((purpose, seed, *stream)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
