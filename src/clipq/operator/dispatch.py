"""The one place that decides which implementation of the operator works on a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipq.errors import WeightError
from clipq.operator.reference import check_hyperparameters, check_weight, clip_quantize, non_finite

if TYPE_CHECKING:
    from clipq.operator.cpu import CpuBatch


@dataclass(frozen=True)
class QuantizerEntry:
    """One tensor of a `Quantizer`: its name (for errors), pruning rate and bit width."""

    name: str
    pruning_rate: float
    bits: int


class Quantizer:
    """Clips, partitions and quantizes the same list of tensors again and again, as training does.

    Between calls it keeps what makes the next call faster; it never changes the result, which is that of
    `clip_quantize` on each tensor, bit for bit. For one caller at a time.
    """

    def __init__(self, entries: Sequence[QuantizerEntry]) -> None:
        for entry in entries:
            check_hyperparameters(entry.pruning_rate, entry.bits, entry.name)
        self.entries = tuple(entries)
        self._batches: dict[tuple[torch.dtype, tuple[int, ...]], CpuBatch] = {}

    @torch.no_grad()
    def __call__(self, weights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Write the quantized form of ``weights[i]`` to ``out[i]``, for every entry i.

        Args:
            weights: full-precision weights, one per entry; float64, float32, bfloat16 or float16. Not modified.
            out: one per entry, same shape, dtype and device as the weight; may have other strides, and may be
                the weight itself.

        Raises:
            WeightError: a tensor has NaN or Inf; then nothing is written.
        """
        on_cpu: dict[torch.dtype, list[int]] = {}
        elsewhere: list[int] = []
        for i, (entry, weight, target) in enumerate(zip(self.entries, weights, out, strict=True)):
            check_weight(weight, entry.name)
            if (target.shape, target.dtype, target.device) != (weight.shape, weight.dtype, weight.device):
                raise WeightError(
                    f"{entry.name}: out is {tuple(target.shape)} {target.dtype} on {target.device}, the weight "
                    f"{tuple(weight.shape)} {weight.dtype} on {weight.device}; they must be alike"
                )
            if weight.device.type == "cpu":
                on_cpu.setdefault(weight.dtype, []).append(i)
            else:
                elsewhere.append(i)
        results = [(out[i], self._reference(i, weights[i])) for i in elsewhere]
        located = [self._locate(dtype, which, weights, out) for dtype, which in on_cpu.items()]
        for batch, _sources, targets, copies in located:
            batch.quantize([target.data_ptr() for target in targets])
            torch.autograd.graph.increment_version(targets)
            results += copies
        for target, result in results:
            target.copy_(result)

    def _reference(self, i: int, weight: Tensor) -> Tensor:
        entry = self.entries[i]
        return clip_quantize(weight, entry.pruning_rate, entry.bits, name=entry.name).quantized

    def _locate(
        self, dtype: torch.dtype, which: list[int], weights: Sequence[Tensor], out: Sequence[Tensor]
    ) -> tuple[CpuBatch, list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Thresholds of the CPU tensors of one dtype.

        Returns:
            The batch, what it reads (to be kept alive until it has), where it is to write, and what is to be
            copied on from there: pairs of target and source.
        """
        key = (dtype, tuple(which))
        if key not in self._batches:
            from clipq.operator.cpu import CpuBatch  # imports Numba, which takes a while

            entries = [self.entries[i] for i in which]
            self._batches[key] = CpuBatch([e.pruning_rate for e in entries], [e.bits for e in entries], dtype)
        batch = self._batches[key]
        sources, targets, copies = [], [], []
        for i in which:
            source, target = weights[i], out[i]
            if not (is_dense(source) and source.stride() == target.stride()):
                source = source.contiguous()
                target = torch.empty_like(source)
                copies.append((out[i], target))
            sources.append(source)
            targets.append(target)
        bad = batch.locate([s.data_ptr() for s in sources], [s.numel() for s in sources])
        if bad is not None:
            raise non_finite(weights[which[bad]], self.entries[which[bad]].name)
        return batch, sources, targets, copies


def is_dense(weight: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in whatever order, each once."""
    if weight.is_contiguous():
        return True
    extent = 1
    for stride, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size != 1:
            if stride != extent:
                return False
            extent *= size
    return True
