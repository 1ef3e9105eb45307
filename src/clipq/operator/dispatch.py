"""The one place that decides which implementation of the operator works on a tensor."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipq.errors import WeightError
from clipq.operator.reference import check_hyperparameters, check_weight, clip_quantize, non_finite

if TYPE_CHECKING:
    from clipq.operator.cpu import CpuBatch
    from clipq.operator.gpu import GpuQuantizer


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
        self._on_gpu: dict[torch.device, GpuQuantizer] = {}

    def check(self) -> None:
        """Wait for the GPUs; raise `WeightError` if a tensor there had NaN or Inf in an earlier call."""
        for gpu in self._on_gpu.values():
            gpu.check()

    @torch.no_grad()
    def __call__(self, weights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Write the quantized form of ``weights[i]`` to ``out[i]``, for every entry i.

        Args:
            weights: full-precision weights, one per entry; float64, float32, bfloat16 or float16. Not modified.
            out: one per entry, same shape, dtype and device as the weight; may have other strides, and may be
                the weight itself.

        Raises:
            WeightError: a tensor has NaN or Inf; then nothing is written. Of a tensor on a GPU this is told later,
                as nothing here waits for the device: by one of the next calls, or by `check`.
        """
        on_cpu: dict[torch.dtype, list[int]] = {}
        on_gpu: dict[torch.device, list[int]] = {}
        elsewhere: list[int] = []
        kernels = _gpu_kernels() if any(weight.is_cuda for weight in weights) else None
        for i, (entry, weight, target) in enumerate(zip(self.entries, weights, out, strict=True)):
            check_weight(weight, entry.name)
            if (target.shape, target.dtype, target.device) != (weight.shape, weight.dtype, weight.device):
                raise WeightError(
                    f"{entry.name}: out is {tuple(target.shape)} {target.dtype} on {target.device}, the weight "
                    f"{tuple(weight.shape)} {weight.dtype} on {weight.device}; they must be alike"
                )
            if weight.device.type == "cpu":
                on_cpu.setdefault(weight.dtype, []).append(i)
            elif weight.is_cuda and kernels is not None and kernels.is_supported(weight):
                on_gpu.setdefault(weight.device, []).append(i)
            else:
                elsewhere.append(i)
        results = [(out[i], self._reference(i, weights[i])) for i in elsewhere]
        located = [self._locate(dtype, which, weights, out) for dtype, which in on_cpu.items()]
        for device, which in on_gpu.items():
            results += self._quantize_on_gpu(device, which, weights, out)
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
        sources, targets, copies = _dense(which, weights, out)
        bad = batch.locate([s.data_ptr() for s in sources], [s.numel() for s in sources])
        if bad is not None:
            raise non_finite(weights[which[bad]], self.entries[which[bad]].name)
        return batch, sources, targets, copies

    def _quantize_on_gpu(
        self, device: torch.device, which: list[int], weights: Sequence[Tensor], out: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Quantize the tensors on one GPU; what is to be copied on: pairs of target and source."""
        if device not in self._on_gpu:
            from clipq.operator.gpu import GpuQuantizer

            self._on_gpu[device] = GpuQuantizer(self.entries, device)
        sources, targets, copies = _dense(which, weights, out)
        for target, source in copies:
            source.copy_(target)  # in case nothing is written
        self._on_gpu[device](which, sources, targets)
        torch.autograd.graph.increment_version(targets)
        return copies


@functools.cache
def _gpu_kernels() -> ModuleType | None:
    """The module with the Triton kernels, if Triton is there."""
    try:
        from clipq.operator import gpu
    except ImportError:
        return None
    return gpu


def _dense(
    which: Sequence[int], weights: Sequence[Tensor], out: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
    """For some of the tensors, what to read and where to write, dense and of the same strides, and what to copy on."""
    sources, targets, copies = [], [], []
    for i in which:
        source, target = weights[i], out[i]
        if not (is_dense(source) and source.stride() == target.stride()):
            source = source.contiguous()
            target = torch.empty_like(source)
            copies.append((out[i], target))
        sources.append(source)
        targets.append(target)
    return sources, targets, copies


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
