"""Partitioning and quantizing on the GPU, once the thresholds are known."""

from __future__ import annotations

import triton
import triton.language as tl

from clipq.operator.gpu_bits import (
    BITS,
    DENSITY,
    EDGE,
    FLOAT32,
    FOUND,
    INTERVALS,
    JOB_FIELDS,
    MAGNITUDE,
    OUT,
    SCALE,
    SIDE_FIELDS,
    SIZE,
    WEIGHT,
    load_weights,
    rounded_bits,
    store_weights,
)


@triton.jit
def add_up(
    jobs: tl.tensor,
    work: tl.tensor,
    sides: tl.tensor,
    counts: tl.tensor,
    sums: tl.tensor,
    DTYPE: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Number and fixed-point sum of the magnitudes in each slot.

    Slots are the intervals of the negative side, innermost first, then those of the positive side. There are
    ``COLUMNS`` copies of the table, so that not all programs add to the same one.
    """
    program = tl.program_id(0)
    tensor = tl.load(work + 2 * program)
    start = tl.load(work + 2 * program + 1)
    job = jobs + tensor * JOB_FIELDS
    address = tl.load(job + WEIGHT)
    size = tl.load(job + SIZE).to(tl.int32)
    negative_side = sides + tensor * (2 * SIDE_FIELDS)
    scale = tl.load(negative_side + SCALE)
    left = tl.maximum(scale - 149, 39)
    negative_edge, negative_density, negative_intervals = _partition(negative_side)
    positive_edge, positive_density, positive_intervals = _partition(negative_side + SIDE_FIELDS)
    table = (tensor * COLUMNS + program % COLUMNS) * SLOTS
    for first in range(start, tl.minimum(start + CHUNK, size), TILE):
        bits = load_weights(address, first, size, DTYPE, False, TILE)
        kept, slot = _slot(
            bits,
            negative_edge,
            negative_density,
            negative_intervals,
            positive_edge,
            positive_density,
            positive_intervals,
        )
        magnitude = bits & MAGNITUDE
        exponent = magnitude >> 23
        digits = tl.where(exponent > 0, (magnitude & 0x7FFFFF) | 0x800000, magnitude)
        # The weight is digits * 2**(max(exponent, 1) - 150). First left by as many bits as any weight needs, which is
        # 39, or more if all are subnormal and have fewer digits; then right.
        shift = tl.minimum(left + 150 - scale - tl.maximum(exponent, 1), 63)
        fixed = (digits.to(tl.int64) << left) >> shift
        tl.atomic_add(counts + table + slot, 1, mask=kept, sem="relaxed")
        tl.atomic_add(sums + table + slot, fixed, mask=kept, sem="relaxed")


@triton.jit
def round_levels(
    jobs: tl.tensor,
    sides: tl.tensor,
    counts: tl.tensor,
    sums: tl.tensor,
    levels: tl.tensor,
    DTYPE: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The levels (paper, step 3), as bits of the weight's dtype; 0 for an interval without weights.

    One program a tensor. With one bit this also decides the side: the other side's level is 0.
    """
    tensor = tl.program_id(0)
    negative_side = sides + tensor * (2 * SIDE_FIELDS)
    positive_side = negative_side + SIDE_FIELDS
    slot = tl.arange(0, SLOTS)
    at = tensor * (COLUMNS * SLOTS) + tl.arange(0, COLUMNS)[:, None] * SLOTS + slot[None, :]
    count = tl.sum(tl.load(counts + at), axis=0).to(tl.float64)
    total = tl.sum(tl.load(sums + at), axis=0).to(tl.float64)
    tl.store(counts + at, 0)
    tl.store(sums + at, 0)

    scale = tl.load(negative_side + SCALE).to(tl.int64)
    unit = ((1023 - scale) << 52).to(tl.float64, bitcast=True)
    value = ((total / tl.maximum(count, 1.0)) * unit).to(tl.float32)
    negative_intervals = tl.load(negative_side + INTERVALS)
    positive_intervals = tl.load(positive_side + INTERVALS)
    if (tl.load(jobs + tensor * JOB_FIELDS + BITS) == 1) & (negative_intervals + positive_intervals == 2):
        gain = total * total / tl.maximum(count, 1.0)
        negative_gain = tl.sum(tl.where(slot == 0, gain, 0.0))
        positive_gain = tl.sum(tl.where(slot == 1, gain, 0.0))
        value = tl.where(slot == tl.where(negative_gain > positive_gain, 1, 0), 0.0, value)
    bits = rounded_bits(value, DTYPE)
    sign = tl.where((slot < negative_intervals) & (bits != 0), -2147483648, 0)
    tl.store(levels + tensor * SLOTS + slot, bits | (sign >> (0 if DTYPE == FLOAT32 else 16)))
    tl.store(negative_side + FOUND, 0)
    tl.store(positive_side + FOUND, 0)


@triton.jit
def assign(
    jobs: tl.tensor,
    work: tl.tensor,
    sides: tl.tensor,
    levels: tl.tensor,
    flags: tl.tensor,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Write each weight's level; nothing at all if any tensor's flag is raised."""
    program = tl.program_id(0)
    if tl.load(flags) == 0:
        tensor = tl.load(work + 2 * program)
        start = tl.multiple_of(tl.load(work + 2 * program + 1), CHUNK)
        job = jobs + tensor * JOB_FIELDS
        address = tl.load(job + WEIGHT)
        out = tl.load(job + OUT)
        size = tl.load(job + SIZE).to(tl.int32)
        negative_side = sides + tensor * (2 * SIDE_FIELDS)
        negative_edge, negative_density, negative_intervals = _partition(negative_side)
        positive_edge, positive_density, positive_intervals = _partition(negative_side + SIDE_FIELDS)
        table = levels + tensor * SLOTS
        for first in range(start, tl.minimum(start + CHUNK, size), TILE):
            bits = load_weights(address, first, size, DTYPE, ALIGNED, TILE)
            kept, slot = _slot(
                bits,
                negative_edge,
                negative_density,
                negative_intervals,
                positive_edge,
                positive_density,
                positive_intervals,
            )
            store_weights(out, first, size, tl.load(table + slot, mask=kept, other=0), DTYPE, ALIGNED, TILE)


@triton.jit
def _partition(side: tl.tensor) -> tuple[tl.tensor, ...]:
    density = tl.load(side + DENSITY).to(tl.float32, bitcast=True)
    return tl.load(side + EDGE), density, tl.load(side + INTERVALS)


@triton.jit
def _slot(
    bits: tl.tensor,
    negative_edge: tl.tensor,
    negative_density: tl.tensor,
    negative_intervals: tl.tensor,
    positive_edge: tl.tensor,
    positive_density: tl.tensor,
    positive_intervals: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Whether each weight is kept, and the slot of those that are (`reference`, partitioning)."""
    is_negative = bits < 0
    magnitude = bits & MAGNITUDE
    edge = tl.where(is_negative, negative_edge, positive_edge)
    density = tl.where(is_negative, negative_density, positive_density)
    first_slot = tl.where(is_negative, 0, negative_intervals)
    intervals = tl.where(is_negative, negative_intervals, positive_intervals)
    kept = magnitude > edge
    distance = magnitude.to(tl.float32, bitcast=True) - edge.to(tl.float32, bitcast=True)
    position = tl.where(kept, distance * density, 0.0)
    return kept, first_slot + tl.minimum(position, (intervals - 1).to(tl.float32)).to(tl.int32)
