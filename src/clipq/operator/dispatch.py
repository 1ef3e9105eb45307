"""The one place that decides which implementation of the operator works on a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipq.operator.reference import check_hyperparameters, check_weight, clip_quantize


@dataclass(frozen=True)
class QuantizerEntry:
    """One tensor of a `Quantizer`: its name (for errors), pruning rate and bit width."""

    name: str
    pruning_rate: float
    bits: int


class Quantizer:
    """Clips, partitions and quantizes the same list of tensors again and again, as training does.

    Between calls it may keep what makes the next call faster; it never changes the result, which is that of
    `clip_quantize` on each tensor, bit for bit.
    """

    def __init__(self, entries: Sequence[QuantizerEntry]) -> None:
        for entry in entries:
            check_hyperparameters(entry.pruning_rate, entry.bits, entry.name)
        self.entries = tuple(entries)

    @torch.no_grad()
    def __call__(self, weights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Write the quantized form of ``weights[i]`` to ``out[i]``, for every entry i.

        Args:
            weights: full-precision weights, one per entry; float64, float32, bfloat16 or float16. Not modified.
            out: one per entry, same shape, dtype and device as the weight; may have other strides.

        Raises:
            WeightError: a tensor has NaN or Inf; ``out`` is then not fully written.
        """
        for entry, weight, target in zip(self.entries, weights, out, strict=True):
            check_weight(weight, entry.name)
            target.copy_(clip_quantize(weight, entry.pruning_rate, entry.bits, name=entry.name).quantized)
