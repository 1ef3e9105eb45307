"""The operator on the CPU: many tensors in a few compiled calls, on as many threads as torch uses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from clipq.operator.cpu_bits import JOB, SIGNS
from clipq.operator.cpu_clip import (
    BINS,
    BLOCK,
    LARGEST,
    LIST_CAPACITY,
    SPLIT_BINS,
    TALLIES,
    count_pieces,
    count_segment,
    locate,
    settle,
)
from clipq.operator.cpu_quantize import (
    LOW_LIMB,
    MAX_SLOTS,
    SUMS,
    assign_pieces,
    assign_segment,
    prepare,
    quantize,
    round_levels,
    sum_pieces,
    sum_segment,
)
from clipq.operator.split import Reduction
from clipq.operator.threads import run_all

SPLIT_SIZE = 1 << 20
"""Tensors of at least so many weights are worked on by all threads, smaller ones by one thread each."""
OVERHEAD = 2000
"""What a tensor costs beyond its weights, in weights."""

WORTH_A_THREAD = 1 << 17
"""So many weights beside the largest tensor make it worth to wake another thread."""

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

    @functools.cached_property
    def pieces(self) -> tuple[NDArray[np.int64], ...]:
        """The same work by thread: rows of index, start and stop."""
        by_thread: list[list[tuple[int, int, int]]] = [[] for _ in range(self.threads)]
        for own, which in zip(by_thread, self.whole, strict=False):
            own += [(int(index), 0, self.sizes[index]) for index in which]
        for index, segments in self.split:
            for own, segment in zip(by_thread, segments, strict=True):
                own.append((index, *segment))
        return tuple(np.array(own, np.int64).reshape(-1, 3) for own in by_thread)


class CpuBatch:
    """Quantizes the same list of dense CPU tensors of one dtype again and again, for one caller at a time.

    From call to call it keeps, for each tensor, where its thresholds were; that makes them faster to find.

    Args:
        reduction: over the processes that the tensors are split over, all of them alike; None if they are not split.
            Every method but `recall` is then for all of these processes to call.
    """

    def __init__(
        self,
        pruning_rates: Sequence[float],
        bits: Sequence[int],
        dtype: torch.dtype,
        reduction: Reduction | None = None,
    ) -> None:
        self._tag = _TAGS[dtype]
        self._reduction = reduction
        self._levels = np.zeros((len(bits), MAX_SLOTS), np.int64 if dtype == torch.float64 else np.int32)
        self._jobs = np.zeros(len(bits), JOB)
        self._jobs["pruning_rate"] = pruning_rates
        self._jobs["bits"] = bits
        self._jobs["low"] = 1
        self._jobs["high"] = _INFINITY[dtype]
        self._jobs["infinity"] = _INFINITY[dtype]
        if reduction is not None:
            self._jobs["reach"] = _INFINITY[dtype] >> 12
        self._schedule = _Schedule((), 1, (), ())

    def locate(self, addresses: Sequence[int], sizes: Sequence[int], totals: Sequence[int]) -> int | None:
        """Find the thresholds of all tensors.

        Args:
            sizes: how many weights are at each address.
            totals: how many the tensor has in all processes.

        Returns:
            The index of the first tensor that has NaN or Inf, in whatever process, or None.
        """
        jobs = self._jobs
        jobs["weight"], jobs["size"], jobs["total"], jobs["found"] = addresses, sizes, totals, 0
        self._schedule = _scheduled(self._schedule, tuple(sizes), torch.get_num_threads())
        if self._reduction is None:
            self._locate()
        else:
            self._locate_split(self._reduction)
        bad = np.flatnonzero(jobs["largest"].max(axis=1) >= jobs["infinity"])
        return int(bad[0]) if len(bad) else None

    def quantize(self, addresses: Sequence[int]) -> None:
        """Write the quantized form of the tensors that `locate` was given to these addresses."""
        self._jobs["out"] = addresses
        if self._reduction is None:
            self._quantize()
        else:
            self._quantize_split(self._reduction)

    def recall(self, index: int, address: int, out: int) -> None:
        """Write to ``out`` what the last call wrote for one of the tensors, if the same weights are at ``address``."""
        job = self._jobs[index]
        job["weight"], job["out"] = address, out
        segments = _segments(int(job["size"]), self._schedule.threads)
        run_all([partial(assign_segment, job, *segment, self._tag, self._levels[index]) for segment in segments])

    def _locate(self) -> None:
        jobs, tag, schedule = self._jobs, self._tag, self._schedule
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

    def _quantize(self) -> None:
        jobs, tag, schedule = self._jobs, self._tag, self._schedule
        run_all([partial(quantize, jobs, which, tag, _sums(1), self._levels) for which in schedule.whole])
        for index, segments in schedule.split:
            job, sums, levels = jobs[index], _sums(len(segments)), self._levels[index]
            prepare(job, tag)
            run_all([partial(sum_segment, job, *segment, tag, sums[i]) for i, segment in enumerate(segments)])
            round_levels(job, tag, sums, levels)
            run_all([partial(assign_segment, job, *segment, tag, levels) for segment in segments])

    def _locate_split(self, reduction: Reduction) -> None:
        """Counting passes over the tensors whose thresholds are not found yet; after each the counts are added up."""
        jobs, n = self._jobs, len(self._jobs)
        length, keys = np.zeros((n, 1), np.int64), np.empty((n, 0), np.int64)  # no list
        number = torch.int32 if int(jobs["total"].max()) < 2**31 else torch.int64
        pending = np.ones(n, bool)
        largest: NDArray[np.int64] | None = None
        while pending.any():
            pieces = [own[pending[own[:, 0]]] for own in self._schedule.pieces]
            tally = np.zeros((len(pieces), n, SIGNS, TALLIES), np.int64)
            bins = np.zeros((len(pieces), n, SIGNS, SPLIT_BINS), np.int64)
            run_all(
                [
                    partial(count_pieces, jobs, own, self._tag, tally[i], length, keys, bins[i])
                    for i, own in enumerate(pieces)
                ]
            )
            if largest is None:
                largest = reduction.max(torch.from_numpy(tally[..., LARGEST].max(axis=0))).numpy()
            here = np.concatenate([tally.sum(axis=0)[..., :LARGEST], bins.sum(axis=0)], axis=-1)[pending]
            counts = reduction.sum(torch.from_numpy(here).to(number)).numpy().astype(np.int64)
            tallies = np.concatenate([counts[..., :LARGEST], largest[pending][..., None]], axis=-1)
            binned = np.ascontiguousarray(counts[..., LARGEST:])
            for i, index in enumerate(np.flatnonzero(pending)):
                pending[index] = not settle(jobs[index], tallies[i : i + 1], length[:1], keys[:1], binned[i : i + 1])

    def _quantize_split(self, reduction: Reduction) -> None:
        """One pass for the sums, which are then added up, and one that assigns levels."""
        jobs, tag, pieces = self._jobs, self._tag, self._schedule.pieces
        for job in jobs:
            prepare(job, tag)
        sums = np.zeros((len(pieces), len(jobs), MAX_SLOTS, SUMS), np.int64)
        run_all([partial(sum_pieces, jobs, own, tag, sums[i]) for i, own in enumerate(pieces)])
        slots = max(1 << int(jobs["bits"].max()), 3)  # with one bit, both sides have an interval
        columns = SUMS if self._levels.itemsize == 8 else LOW_LIMB
        here = np.ascontiguousarray(sums.sum(axis=0)[:, :slots, :columns])
        totals = np.zeros((len(jobs), MAX_SLOTS, SUMS), np.int64)
        totals[:, :slots, :columns] = reduction.sum(torch.from_numpy(here)).numpy()
        for index, job in enumerate(jobs):
            round_levels(job, tag, totals[index : index + 1], self._levels[index])
        run_all([partial(assign_pieces, jobs, own, tag, self._levels) for own in pieces])

    def _scratch(self, segments: int) -> tuple[NDArray[np.signedinteger], ...]:
        """What `count_segment` fills, one of each a segment: tally, length, keys, bins."""
        return (
            np.empty((segments, SIGNS, TALLIES), np.int64),
            np.empty((segments, 1), np.int64),
            np.empty((segments, LIST_CAPACITY), np.int64),
            np.empty((segments, SIGNS, BINS), np.int64),
        )


def _scheduled(last: _Schedule, sizes: tuple[int, ...], threads: int) -> _Schedule:
    """The schedule for tensors of these sizes: the last one if it was for the same."""
    if (last.sizes, last.threads) == (sizes, threads):
        return last
    smallest_split = SPLIT_SIZE if threads > 1 else max(sizes, default=0) + 1
    alone = sorted((i for i, size in enumerate(sizes) if size < smallest_split), key=lambda i: -sizes[i])
    spread_out = sum(sizes[i] + OVERHEAD for i in alone[1:]) // WORTH_A_THREAD
    loads = [0] * min(threads, 1 + spread_out)
    whole: list[list[int]] = [[] for _ in loads]
    for index in alone:
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
