"""The operator on the CPU: many tensors in a few compiled calls, on as many threads as torch uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from clipq.operator.cpu_bits import JOB, SIGNS
from clipq.operator.cpu_clip import BINS, BLOCK, LIST_CAPACITY, TALLIES, count_segment, locate, settle
from clipq.operator.cpu_quantize import MAX_SLOTS, SUMS, assign_segment, prepare, quantize, round_levels, sum_segment
from clipq.operator.threads import run_all

SPLIT_SIZE = 1 << 18
"""Tensors of at least so many weights are worked on by all threads, smaller ones by one thread each."""
OVERHEAD = 2000
"""What a tensor costs beyond its weights, in weights."""

_TAGS = {
    torch.float64: np.empty(0, np.float64),
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.float16: np.empty(0, np.int16),
}
_INFINITY = {
    torch.float64: 0x7FF << 52,
    torch.float32: 0xFF << 23,
    torch.bfloat16: 0xFF << 7,
    torch.float16: 0x1F << 10,
}


@dataclass(frozen=True)
class _Schedule:
    """Which thread works on what: whole tensors by index, and the segments of the others."""

    sizes: tuple[int, ...]
    threads: int
    whole: tuple[NDArray[np.int64], ...]
    split: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


class CpuBatch:
    """Quantizes the same list of dense CPU tensors of one dtype again and again, for one caller at a time.

    From call to call it keeps, for each tensor, where its thresholds were; that makes them faster to find.
    """

    def __init__(self, pruning_rates: Sequence[float], bits: Sequence[int], dtype: torch.dtype) -> None:
        self._tag = _TAGS[dtype]
        self._level_type = np.int64 if dtype == torch.float64 else np.int32
        self._jobs = np.zeros(len(bits), JOB)
        self._jobs["pruning_rate"] = pruning_rates
        self._jobs["bits"] = bits
        self._jobs["low"] = 1
        self._jobs["high"] = _INFINITY[dtype]
        self._jobs["infinity"] = _INFINITY[dtype]
        self._schedule = _Schedule((), 0, (), ())

    def locate(self, addresses: Sequence[int], sizes: Sequence[int]) -> int | None:
        """Find the thresholds of all tensors.

        Returns:
            The index of the first tensor that has NaN or Inf, or None.
        """
        jobs, tag = self._jobs, self._tag
        jobs["weight"], jobs["size"], jobs["found"] = addresses, sizes, 0
        schedule = self._schedule = _scheduled(self._schedule, tuple(sizes), torch.get_num_threads())
        run_all([partial(locate, jobs, which, tag, *self._scratch(1)) for which in schedule.whole])
        for index, segments in schedule.split:
            job, scratch = jobs[index], self._scratch(len(segments))
            settled = False
            while not settled:
                run_all(
                    [
                        partial(count_segment, job, *segment, tag, *(array[i] for array in scratch))
                        for i, segment in enumerate(segments)
                    ]
                )
                settled = settle(job, *scratch)
        bad = np.flatnonzero(jobs["largest"].max(axis=1) >= jobs["infinity"])
        return int(bad[0]) if len(bad) else None

    def quantize(self, addresses: Sequence[int]) -> None:
        """Write the quantized form of the tensors that `locate` was given to these addresses."""
        jobs, tag, schedule = self._jobs, self._tag, self._schedule
        jobs["out"] = addresses
        run_all([partial(quantize, jobs, which, tag, _sums(1), self._table()) for which in schedule.whole])
        for index, segments in schedule.split:
            job, sums, table = jobs[index], _sums(len(segments)), self._table()
            prepare(job, tag)
            run_all([partial(sum_segment, job, *segment, tag, sums[i]) for i, segment in enumerate(segments)])
            round_levels(job, tag, sums, table)
            run_all([partial(assign_segment, job, *segment, tag, table) for segment in segments])

    def _scratch(self, segments: int) -> tuple[NDArray[np.signedinteger], ...]:
        """What `count_segment` fills, one of each a segment: tally, length, keys, bins."""
        return (
            np.empty((segments, SIGNS, TALLIES), np.int64),
            np.empty((segments, 1), np.int64),
            np.empty((segments, LIST_CAPACITY), np.int64),
            np.empty((segments, SIGNS, BINS), np.int64),
        )

    def _table(self) -> NDArray[np.signedinteger]:
        return np.empty(MAX_SLOTS, self._level_type)


def _scheduled(last: _Schedule, sizes: tuple[int, ...], threads: int) -> _Schedule:
    """The schedule for tensors of these sizes: the last one if it was for the same."""
    if (last.sizes, last.threads) == (sizes, threads):
        return last
    smallest_split = SPLIT_SIZE if threads > 1 else max(sizes, default=0) + 1
    loads = [0] * threads
    whole: list[list[int]] = [[] for _ in range(threads)]
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if sizes[index] < smallest_split:
            thread = loads.index(min(loads))
            whole[thread].append(index)
            loads[thread] += sizes[index] + OVERHEAD
    return _Schedule(
        sizes,
        threads,
        tuple(np.array(indices, np.int64) for indices in whole if indices),
        tuple((i, _segments(size, threads)) for i, size in enumerate(sizes) if size >= smallest_split),
    )


def _segments(size: int, threads: int) -> tuple[tuple[int, int], ...]:
    bounds = [size * i // threads // BLOCK * BLOCK for i in range(threads)] + [size]
    return tuple(pairwise(bounds))


def _sums(segments: int) -> NDArray[np.int64]:
    return np.zeros((segments, MAX_SLOTS, SUMS), np.int64)
