"""The operator on the GPU: all tensors of a dtype in a fixed number of launches, and never a wait for the device.

A call launches, for each dtype,

1. several times `count` and `settle`, which find the thresholds: the first pass looks around those of the last call
   and mostly finds them; a pass that has nothing left to find ends at once. There are as many as it can ever take;
2. `add_up` and `round_levels`: the sums of the intervals, and from them the levels;
3. `assign`.

What the kernels keep, on the device: per sign of a tensor where its threshold was (see `gpu_bits`), counters,
which each kernel that reads them leaves at zero for the next, and a flag for tensors with NaN or Inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipq.errors import WeightError
from clipq.operator import gpu_bits, gpu_clip, gpu_quantize
from clipq.operator.split import Part, Reduction

CHUNK = 16384
"""Weights that one program works on."""
TILE = 1024
"""Weights that it works on at a time."""
LEAST_COLUMNS, TABLE_SIZE = 32, 2048
"""Copies of a tensor's table of sums: at least so many, or as many as make a table of that size."""


_STORAGE = {
    torch.float32: (gpu_bits.FLOAT32.value, 0),
    torch.bfloat16: (gpu_bits.BFLOAT16.value, 16),
    torch.float16: (gpu_bits.FLOAT16.value, 13),
}
"""Per dtype its code for the kernels, and how many of float32's bits it has not."""
LARGEST_SIZE = 2**31 - 2 * CHUNK


class Entry(Protocol):
    """What this module needs to know of a `clipq.operator.QuantizerEntry`."""

    @property
    def name(self) -> str: ...
    @property
    def pruning_rate(self) -> float: ...
    @property
    def bits(self) -> int: ...


def is_supported(dtype: torch.dtype, total: int) -> bool:
    """Whether the kernels take tensors of this dtype and so many weights; the others are left to the reference."""
    return dtype in _STORAGE and total <= LARGEST_SIZE


class GpuQuantizer:
    """Quantizes lists of dense tensors on one device again and again, for one caller and one stream at a time.

    A tensor with NaN or Inf is noticed on the device, where from then on nothing is written. The host hears of it
    without waiting: it is raised by the first call that finds the news arrived, mostly the next one, or by `check`.
    """

    def __init__(self, entries: Sequence[Entry], device: torch.device) -> None:
        self._entries = tuple(entries)
        self._device = device
        self._flags = _Flags([entry.name for entry in entries], device)
        self._batches: dict[tuple[torch.dtype, Reduction | None, tuple[int, ...]], _Batch] = {}
        self._latest: dict[int, tuple[_Batch, int]] = {}  # by entry: the batch and the place in it

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._entries, self._device)

    def __call__(self, which: Sequence[int], weights: Sequence[Part], out: Sequence[Tensor]) -> None:
        """Write the quantized form of ``weights[j]``, by entry ``which[j]``, to ``out[j]``.

        Args:
            weights, out: dense, on the device, of a dtype and size that `is_supported`; out with the strides of the
                weight.

        Raises:
            WeightError: in an earlier call a tensor had NaN or Inf, and nothing was written since.
        """
        self._flags.raise_if_known()
        groups: dict[tuple[torch.dtype, Reduction | None], list[int]] = {}
        for j, weight in enumerate(weights):
            groups.setdefault((weight.local.dtype, weight.reduction), []).append(j)
        batches = []
        with self._current_device():
            for (dtype, reduction), members in groups.items():
                key = (dtype, reduction, tuple(which[j] for j in members))
                if key not in self._batches:
                    entries = [self._entries[i] for i in key[2]]
                    self._batches[key] = _Batch(entries, key[2], dtype, self._flags.device_flags, reduction)
                batch = self._batches[key]
                self._latest |= {i: (batch, place) for place, i in enumerate(key[2])}
                batch.locate([weights[j] for j in members], [out[j] for j in members])
                batches.append(batch)
            for batch in batches:
                batch.quantize()
            self._flags.send()

    def recall(self, i: int, weight: Tensor, out: Tensor) -> None:
        """Write to ``out`` what the last call wrote for entry i, if it was given the same weights."""
        batch, place = self._latest[i]
        with self._current_device():
            batch.recall(place, weight, out)

    def _current_device(self) -> torch.cuda.device:
        return torch.cuda.device(self._device if self._device.type == "cuda" else -1)

    def check(self) -> None:
        """Wait for the device; raise `WeightError` if in any call so far a tensor had NaN or Inf."""
        self._flags.wait()
        self._flags.raise_if_known()


class _Flags:
    """Which tensors had NaN or Inf: on the device, and as the host last heard of it."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.device_flags = torch.zeros(1 + len(names), dtype=torch.int32, device=device)  # any, then one a tensor
        self._names = names
        self._heard = torch.zeros(1 + len(names), dtype=torch.int32, pin_memory=on_gpu)
        self._arrived: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._under_way = False

    def send(self) -> None:
        """Have the flags copied to the host, unless they are under way already; they stay raised, so none is missed.

        Not while a CUDA graph is captured: a replay has no one to look at the copy.
        """
        if self._under_way or (self._arrived is not None and torch.cuda.is_current_stream_capturing()):
            return
        self._heard.copy_(self.device_flags, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        self._under_way = True

    def raise_if_known(self) -> None:
        if not self._under_way or (self._arrived is not None and torch.cuda.is_current_stream_capturing()):
            return
        if self._arrived is not None and not self._arrived.query():
            return
        self._under_way = False
        bad = [name for name, flag in zip(self._names, self._heard[1:].tolist(), strict=True) if flag]
        if bad:
            self.device_flags.zero_()
            others = f" (and {len(bad) - 1} more tensors)" if len(bad) > 1 else ""
            raise WeightError(
                f"{bad[0]}{others}: had NaN or Inf in an earlier step, and nothing was quantized since; weights must "
                f"be finite. Lower the learning rate, or go back to the last good checkpoint"
            )

    def wait(self) -> None:
        if self._arrived is not None:
            torch.cuda.synchronize(self.device_flags.device)
        self._heard.copy_(self.device_flags)
        self._under_way = True


class _Batch:
    """The tensors of one dtype: their tables on the device, and the launches that work on them.

    Those of a batch are all split over the same processes, or not at all. All of the processes then make the same
    calls, but for `recall`, and add up counts in between.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        which: Sequence[int],
        dtype: torch.dtype,
        flags: Tensor,
        reduction: Reduction | None,
    ) -> None:
        n, device = len(entries), flags.device
        self._device, self._flags = device, flags
        self._reduction = reduction
        code, self._key_shift = _STORAGE[dtype]
        infinity = int(gpu_bits.INFINITY.value) >> self._key_shift
        octave = 0x800000 >> self._key_shift  # keys from a power of two to the next
        bins, bin_bits = int(gpu_bits.BINS.value), int(gpu_bits.BIN_BITS.value)
        self._passes = 1 + math.ceil(infinity.bit_length() / bin_bits)
        # Half a bin count, so that one pass can be enough, but not more than a few keys of a coarse dtype.
        self._least_reach = max(min(bins // 2 - 1, octave // 64), 1)
        self._most_reach = octave // 4
        slots = 1 << max(entry.bits for entry in entries)
        columns = max(LEAST_COLUMNS, TABLE_SIZE // slots)
        self._table = {"SLOTS": slots, "COLUMNS": columns}
        self._tiles: dict[str, Any] = {
            "DTYPE": code,
            "ALIGNED": True,
            "CHUNK": CHUNK,
            "TILE": TILE,
            "num_warps": 4,
            "enable_fp_fusion": False,
        }
        rates = np.array([entry.pruning_rate for entry in entries], np.float64)
        self._hyperparameters = np.zeros((n, gpu_bits.JOB_FIELDS.value), np.int64)
        self._hyperparameters[:, gpu_bits.RATE.value] = rates.view(np.int64)
        self._hyperparameters[:, gpu_bits.BITS.value] = [entry.bits for entry in entries]
        self._hyperparameters[:, gpu_bits.FLAG.value] = [1 + i for i in which]
        sides = np.zeros((n, 2, gpu_bits.SIDE_FIELDS.value), np.int32)
        sides[:, :, gpu_bits.LOW.value] = 1
        sides[:, :, gpu_bits.HIGH.value] = infinity
        sides[:, :, gpu_bits.SHIFT.value] = max((infinity - 2).bit_length() - bin_bits, 0)
        sides[:, :, gpu_bits.REACH.value] = self._most_reach // 4
        self._sides = _upload(sides, device)
        self._bins = torch.zeros(n * 2 * bins, dtype=torch.int32, device=device)
        self._counts = torch.zeros(n * columns * slots, dtype=torch.int32, device=device)
        self._sums = torch.zeros(n * columns * slots, dtype=torch.int64, device=device)
        self._levels = torch.zeros(n * slots, dtype=torch.int32, device=device)
        self._placed: tuple[tuple[int, int, int, int], ...] = ()
        self._jobs = self._work = self._flags
        self._programs = 0

    def locate(self, weights: Sequence[Part], out: Sequence[Tensor]) -> None:
        """Find the thresholds of all tensors; for these also note where to write."""
        self._place(
            tuple(
                (w.local.data_ptr(), o.data_ptr(), w.local.numel(), w.total) for w, o in zip(weights, out, strict=True)
            )
        )
        for _ in range(self._passes):
            gpu_clip.count[(self._programs,)](
                self._jobs, self._work, self._sides, self._bins, KEY_SHIFT=self._key_shift, **self._tiles
            )
            if self._reduction is not None:
                self._add_up_counts(self._reduction)
            gpu_clip.settle[(len(weights),)](
                self._jobs,
                self._sides,
                self._bins,
                self._flags,
                KEY_SHIFT=self._key_shift,
                LEAST_REACH=self._least_reach,
                MOST_REACH=self._most_reach,
                num_warps=16,
                enable_fp_fusion=False,
            )

    def quantize(self) -> None:
        """Write the quantized form of the tensors that `locate` was given to where it was told."""
        gpu_quantize.add_up[(self._programs,)](
            self._jobs, self._work, self._sides, self._counts, self._sums, **self._table, **self._tiles
        )
        if self._reduction is not None:
            self._add_up_sums(self._reduction)
        gpu_quantize.round_levels[(len(self._placed),)](
            self._jobs,
            self._sides,
            self._counts,
            self._sums,
            self._levels,
            DTYPE=self._tiles["DTYPE"],
            **self._table,
            num_warps=8,
            enable_fp_fusion=False,
        )
        gpu_quantize.assign[(self._programs,)](
            self._jobs, self._work, self._sides, self._levels, self._flags, SLOTS=self._table["SLOTS"], **self._tiles
        )

    def recall(self, place: int, weight: Tensor, out: Tensor) -> None:
        """Assign the levels of the last `quantize` to the tensor in one place; its weights may lie elsewhere now."""
        first = range(0, weight.numel(), CHUNK)
        jobs = self._jobs.clone()
        at = [gpu_bits.WEIGHT.value, gpu_bits.OUT.value]
        jobs[place, at[0] : at[1] + 1] = _upload(np.array([weight.data_ptr(), out.data_ptr()], np.int64), self._device)
        work = _upload(np.array([(place, start) for start in first], np.int32).reshape(-1, 2), self._device)
        aligned = weight.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0
        tiles = {**self._tiles, "ALIGNED": aligned}
        gpu_quantize.assign[(len(first),)](
            jobs, work, self._sides, self._levels, self._flags, SLOTS=self._table["SLOTS"], **tiles
        )

    def _add_up_counts(self, reduction: Reduction) -> None:
        """What `count` counted here → what it counted in all processes."""
        tallies = self._sides[:, :, gpu_bits.NONZERO.value : gpu_bits.FROM_LOW.value + 1]
        counts = reduction.sum(torch.cat([tallies.reshape(-1), self._bins]))
        tallies.copy_(counts[: tallies.numel()].view_as(tallies))
        self._bins.copy_(counts[tallies.numel() :])
        largest = self._sides[:, :, gpu_bits.LARGEST.value]
        largest.copy_(reduction.max(largest.contiguous()))

    def _add_up_sums(self, reduction: Reduction) -> None:
        """What `add_up` added up here → what it added up in all processes, in the first copy of its tables."""
        tables = [t.view(-1, self._table["COLUMNS"], self._table["SLOTS"]) for t in (self._counts, self._sums)]
        totals = reduction.sum(torch.stack([table.sum(1, dtype=torch.int64) for table in tables]))
        for table, total in zip(tables, totals, strict=True):
            table.zero_()
            table[:, 0] = total

    def _place(self, placed: tuple[tuple[int, int, int, int], ...]) -> None:
        """Have the tables for tensors at these addresses (weight, out), of these sizes and totals, on the device."""
        if placed == self._placed:
            return
        jobs = self._hyperparameters.copy()
        jobs[:, [c.value for c in (gpu_bits.WEIGHT, gpu_bits.OUT, gpu_bits.SIZE, gpu_bits.TOTAL)]] = placed
        work = [(t, first) for t, (_, _, size, _) in enumerate(placed) for first in range(0, size, CHUNK)]
        self._jobs = _upload(jobs, self._device)
        self._work = _upload(np.array(work, np.int32).reshape(-1, 2), self._device)
        self._programs = len(work)
        self._tiles["ALIGNED"] = all(address % 16 == 0 for entry in placed for address in entry[:2])
        self._placed = placed


def _upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """To the device, from pinned memory: a copy that the host does not wait for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
