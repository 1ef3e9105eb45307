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
from clipq.operator.split import Part, Reduction, mark_written, part_of

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
        self._batches: dict[tuple[torch.dtype, Reduction | None, tuple[int, ...]], CpuBatch] = {}
        self._latest: dict[int, tuple[CpuBatch, int]] = {}  # by entry: the batch and the place in it
        self._on_gpu: dict[torch.device, GpuQuantizer] = {}

    def check(self) -> None:
        """Wait for the GPUs; raise `WeightError` if a tensor there had NaN or Inf in an earlier call."""
        for gpu in self._on_gpu.values():
            gpu.check()

    @torch.no_grad()
    def __call__(self, weights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Write the quantized form of ``weights[i]`` to ``out[i]``, for every entry i.

        Args:
            weights: full-precision weights, one per entry; float64, float32, bfloat16 or float16. Not modified. Of a
                DTensor that is split over processes all of them must make this call; they add up counts and sums.
            out: one per entry, same shape, dtype and device as the weight; may have other strides, and may be
                the weight itself.

        Raises:
            WeightError: a tensor has NaN or Inf; then nothing is written. Of a tensor on a GPU this is told later,
                as nothing here waits for the device: by one of the next calls, or by `check`.
        """
        on_cpu: dict[tuple[torch.dtype, Reduction | None], list[int]] = {}
        on_gpu: dict[torch.device, list[int]] = {}
        elsewhere: list[int] = []
        parts, targets = [], []
        for i, (entry, weight, target) in enumerate(zip(self.entries, weights, out, strict=True)):
            part, local = _checked(entry, weight, target)
            parts.append(part)
            targets.append(local)
            if part.local.device.type == "cpu":
                on_cpu.setdefault((part.local.dtype, part.reduction), []).append(i)
            elif _has_gpu_kernels(part):
                on_gpu.setdefault(part.local.device, []).append(i)
            else:
                elsewhere.append(i)
        results = [(targets[i], self._reference(i, parts[i])) for i in elsewhere]
        located = [self._locate(*key, which, parts, targets) for key, which in on_cpu.items()]
        for device, which in on_gpu.items():
            results += self._quantize_on_gpu(device, which, parts, targets)
        for batch, _sources, written, copies in located:
            batch.quantize([target.data_ptr() for target in written])
            torch.autograd.graph.increment_version(written)
            results += copies
        for target, result in results:
            target.copy_(result)
        mark_written(out)

    @torch.no_grad()
    def recall(self, i: int, weight: Tensor, out: Tensor) -> None:
        """Write to ``out`` what the last call wrote for entry i, if ``weight`` is what it was given.

        Without a word to other processes, also for a tensor that is split over them. Nothing is written for a tensor
        on a GPU that had NaN or Inf.
        """
        part, target = _checked(self.entries[i], weight, out)
        copies: list[tuple[Tensor, Tensor]]
        if i in self._latest:
            (source,), (written,), copies = _dense([part.local], [target])
            batch, place = self._latest[i]
            batch.recall(place, source.data_ptr(), written.data_ptr())
            torch.autograd.graph.increment_version(written)
        elif part.local.device in self._on_gpu and _has_gpu_kernels(part):
            (source,), (written,), copies = _dense([part.local], [target])
            self._on_gpu[part.local.device].recall(i, source, written)
            torch.autograd.graph.increment_version(written)
        else:
            copies = [(target, self._reference(i, part))]
        for into, result in copies:
            into.copy_(result)
        mark_written([out])

    def _reference(self, i: int, part: Part) -> Tensor:
        entry = self.entries[i]
        if part.reduction is not None:
            raise WeightError(
                f"{entry.name}: a {part.local.dtype} tensor of {part.total} weights on {part.local.device} is split "
                f"over processes, for which there is no kernel; split tensors can be on the CPU, or on a GPU as "
                f"float32, bfloat16 or float16 with Triton installed"
            )
        return clip_quantize(part.local, entry.pruning_rate, entry.bits, name=entry.name).quantized

    def _locate(
        self,
        dtype: torch.dtype,
        reduction: Reduction | None,
        which: list[int],
        parts: Sequence[Part],
        out: Sequence[Tensor],
    ) -> tuple[CpuBatch, list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Thresholds of the CPU tensors of one dtype, split over the same processes.

        Returns:
            The batch, what it reads (to be kept alive until it has), where it is to write, and what is to be
            copied on from there: pairs of target and source.
        """
        key = (dtype, reduction, tuple(which))
        if key not in self._batches:
            from clipq.operator.cpu import CpuBatch  # imports Numba, which takes a while

            entries = [self.entries[i] for i in which]
            rates, bits = [e.pruning_rate for e in entries], [e.bits for e in entries]
            self._batches[key] = CpuBatch(rates, bits, dtype, reduction)
        batch = self._batches[key]
        self._latest |= {i: (batch, place) for place, i in enumerate(which)}
        sources, targets, copies = _dense([parts[i].local for i in which], [out[i] for i in which])
        sizes, totals = [s.numel() for s in sources], [parts[i].total for i in which]
        bad = batch.locate([s.data_ptr() for s in sources], sizes, totals)
        if bad is not None:
            raise non_finite(parts[which[bad]].local, self.entries[which[bad]].name)
        return batch, sources, targets, copies

    def _quantize_on_gpu(
        self, device: torch.device, which: list[int], parts: Sequence[Part], out: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Quantize the tensors on one GPU; what is to be copied on: pairs of target and source."""
        if device not in self._on_gpu:
            from clipq.operator.gpu import GpuQuantizer

            self._on_gpu[device] = GpuQuantizer(self.entries, device)
        for i in which:
            self._latest.pop(i, None)
        sources, targets, copies = _dense([parts[i].local for i in which], [out[i] for i in which])
        for target, source in copies:
            source.copy_(target)  # in case nothing is written
        dense_parts = [parts[i]._replace(local=source) for i, source in zip(which, sources, strict=True)]
        self._on_gpu[device](which, dense_parts, targets)
        torch.autograd.graph.increment_version(targets)
        return copies


def _checked(entry: QuantizerEntry, weight: Tensor, out: Tensor) -> tuple[Part, Tensor]:
    """What is here of a weight and of where its quantized form is to go."""
    check_weight(weight, entry.name)
    part, target = part_of(weight, entry.name), part_of(out, entry.name)
    here, there = part.local, target.local
    if (there.shape, there.dtype, there.device) != (here.shape, here.dtype, here.device):
        raise WeightError(
            f"{entry.name}: out is {tuple(there.shape)} {there.dtype} on {there.device}, the weight "
            f"{tuple(here.shape)} {here.dtype} on {here.device}; they must be alike"
        )
    return part, there


def _has_gpu_kernels(part: Part) -> bool:
    kernels = _gpu_kernels() if part.local.is_cuda else None
    return kernels is not None and bool(kernels.is_supported(part.local.dtype, part.total))


@functools.cache
def _gpu_kernels() -> ModuleType | None:
    """The module with the Triton kernels, if Triton is there."""
    try:
        from clipq.operator import gpu
    except ImportError:
        return None
    return gpu


def _dense(
    weights: Sequence[Tensor], out: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
    """What to read and where to write, dense and of the same strides, and what to copy on: pairs of target, source."""
    sources, targets, copies = [], [], []
    for weight, original in zip(weights, out, strict=True):
        source, target = weight, original
        if not (is_dense(source) and source.stride() == target.stride()):
            source = source.contiguous()
            target = torch.empty_like(source)
            copies.append((original, target))
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
