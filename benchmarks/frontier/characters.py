"""A small transformer that predicts the next character of tiny Shakespeare."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from clipq.data.named import DATA_ROOT_VARIABLE

WIDTH, HEADS, DEPTH, LENGTH, CHARACTERS = 96, 4, 2, 64, 65


class Block(nn.Module):
    """Attention to earlier characters and a feed-forward network, each on normalized inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        made: Tensor = x + self.narrow(F.gelu(self.wide(self.norm2(x))))
        return made


class Transformer(nn.Module):
    """Two blocks of width 96, 242,561 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.character, self.position = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS)

    def forward(self, text: Tensor) -> Tensor:
        """Scores of shape (N, 65, length) for characters of shape (N, length), int64."""
        x = self.character(text) + self.position(torch.arange(text.shape[1]))
        scores: Tensor = self.head(self.norm(self.blocks(x))).transpose(1, 2)
        return scores


def text() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """The text in order: 90 % to train, 5 % to validate, 5 % to test; each in pieces of 64 characters and the next."""
    written = (Path(os.environ[DATA_ROOT_VARIABLE]) / "text" / "tinyshakespeare.txt").read_text()
    known = {c: i for i, c in enumerate(sorted(set(written)))}
    codes = torch.tensor([known[c] for c in written])
    bounds = [0, int(0.9 * len(codes)), int(0.95 * len(codes)), len(codes)]
    training, validation, test = (
        TensorDataset(pieces[:, :-1], pieces[:, 1:])
        for first, last in itertools.pairwise(bounds)
        for pieces in (codes[first:last].unfold(0, LENGTH + 1, LENGTH),)
    )
    return training, validation, test
