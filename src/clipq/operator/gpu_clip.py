"""Clipping on the GPU: the thresholds of all tensors, exactly, by counting; then what the next kernels need."""

from __future__ import annotations

import triton
import triton.language as tl

from clipq.operator.gpu_bits import (
    BIN_BITS,
    BINS,
    BITS,
    COPIES,
    DENSITY,
    EDGE,
    FLAG,
    FOUND,
    FROM_LOW,
    HIGH,
    INFINITY,
    INTERVALS,
    JOB_FIELDS,
    LARGEST,
    LOW,
    MAGNITUDE,
    NONZERO,
    RATE,
    REACH,
    SCALE,
    SHIFT,
    SIDE_FIELDS,
    SIZE,
    THRESHOLD,
    TOTAL,
    WEIGHT,
    bit_length,
    load_weights,
)


@triton.jit
def count(
    jobs: tl.tensor,
    work: tl.tensor,
    sides: tl.tensor,
    bins: tl.tensor,
    DTYPE: tl.constexpr,
    KEY_SHIFT: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Tallies, and the numbers of keys per bin of [low, high), for the tensors whose thresholds are not yet found.

    One program a chunk of a tensor: ``work`` has the tensor and the first weight of each.
    """
    program = tl.program_id(0)
    tensor = tl.load(work + 2 * program)
    start = tl.load(work + 2 * program + 1)
    negative_side = sides + tensor * (2 * SIDE_FIELDS)
    positive_side = negative_side + SIDE_FIELDS
    negative_found = tl.load(negative_side + FOUND)
    positive_found = tl.load(positive_side + FOUND)
    if negative_found + positive_found < 2:
        job = jobs + tensor * JOB_FIELDS
        address = tl.load(job + WEIGHT)
        size = tl.load(job + SIZE).to(tl.int32)
        negative_low = tl.load(negative_side + LOW)
        positive_low = tl.load(positive_side + LOW)
        # A side whose threshold is known has nothing left to look for.
        negative_high = tl.where(negative_found == 1, negative_low, tl.load(negative_side + HIGH))
        positive_high = tl.where(positive_found == 1, positive_low, tl.load(positive_side + HIGH))
        negative_shift = tl.load(negative_side + SHIFT)
        positive_shift = tl.load(positive_side + SHIFT)
        negative_copies = tl.load(negative_side + COPIES)
        positive_copies = tl.load(positive_side + COPIES)
        negative_bins = tensor * (2 * BINS) + (program & ((1 << negative_copies) - 1))
        positive_bins = tensor * (2 * BINS) + BINS + (program & ((1 << positive_copies) - 1))

        # Positive weights are counted in the low half, negative ones in the high half.
        nonzero = tl.zeros([TILE], tl.int32)
        from_low = tl.zeros([TILE], tl.int32)
        negative_largest = tl.zeros([TILE], tl.int32)
        positive_largest = tl.zeros([TILE], tl.int32)
        for first in range(start, tl.minimum(start + CHUNK, size), TILE):
            bits = load_weights(address, first, size, DTYPE, False, TILE)
            key = (bits & MAGNITUDE) >> KEY_SHIFT
            negative = bits < 0
            one = tl.where(negative, 0x10000, 1)
            low = tl.where(negative, negative_low, positive_low)
            high = tl.where(negative, negative_high, positive_high)
            nonzero += tl.where(key > 0, one, 0)
            from_low += tl.where(key >= low, one, 0)
            negative_largest = tl.maximum(negative_largest, tl.where(negative, key, 0))
            positive_largest = tl.maximum(positive_largest, tl.where(negative, 0, key))
            number = (key - low) >> tl.where(negative, negative_shift, positive_shift)
            at = tl.where(negative, negative_bins, positive_bins)
            at += number << tl.where(negative, negative_copies, positive_copies)
            tl.atomic_add(bins + at, 1, mask=(key >= low) & (key < high), sem="relaxed")
        all_nonzero = tl.sum(nonzero)
        all_from_low = tl.sum(from_low)
        tl.atomic_add(negative_side + NONZERO, all_nonzero >> 16, sem="relaxed")
        tl.atomic_add(positive_side + NONZERO, all_nonzero & 0xFFFF, sem="relaxed")
        tl.atomic_add(negative_side + FROM_LOW, all_from_low >> 16, sem="relaxed")
        tl.atomic_add(positive_side + FROM_LOW, all_from_low & 0xFFFF, sem="relaxed")
        tl.atomic_max(negative_side + LARGEST, tl.max(negative_largest), sem="relaxed")
        tl.atomic_max(positive_side + LARGEST, tl.max(positive_largest), sem="relaxed")


@triton.jit
def settle(
    jobs: tl.tensor,
    sides: tl.tensor,
    bins: tl.tensor,
    flags: tl.tensor,
    KEY_SHIFT: tl.constexpr,
    LEAST_REACH: tl.constexpr,
    MOST_REACH: tl.constexpr,
) -> None:
    """After a counting pass: the thresholds, or else where to look for them in the next one.

    One program a tensor. When both thresholds of a tensor are found, also its intervals and fixed-point format.
    A tensor with NaN or Inf raises its flag and keeps no weight.
    """
    tensor = tl.program_id(0)
    job = jobs + tensor * JOB_FIELDS
    negative_side = sides + tensor * (2 * SIDE_FIELDS)
    positive_side = negative_side + SIDE_FIELDS
    if tl.load(negative_side + FOUND) + tl.load(positive_side + FOUND) < 2:
        rate = tl.load(job + RATE).to(tl.float64, bitcast=True)
        largest = tl.maximum(tl.load(negative_side + LARGEST), tl.load(positive_side + LARGEST))
        finite = largest < (INFINITY >> KEY_SHIFT)
        for sign in tl.static_range(2):
            _settle_side(
                negative_side + sign * SIDE_FIELDS,
                bins + (tensor * 2 + sign) * BINS,
                rate,
                finite,
                KEY_SHIFT,
                LEAST_REACH,
                MOST_REACH,
            )
        if not finite:
            tl.store(flags, 1)
            tl.store(flags + tl.load(job + FLAG), 1)
        tl.debug_barrier()
        if tl.load(negative_side + FOUND) + tl.load(positive_side + FOUND) == 2:
            _prepare(job, negative_side, positive_side, finite, KEY_SHIFT)
        for sign in tl.static_range(2):
            side = negative_side + sign * SIDE_FIELDS
            tl.store(side + NONZERO, 0)
            tl.store(side + FROM_LOW, 0)
            tl.store(side + LARGEST, 0)


@triton.jit
def _settle_side(
    side: tl.tensor,
    bins: tl.tensor,
    rate: tl.tensor,
    finite: tl.tensor,
    KEY_SHIFT: tl.constexpr,
    LEAST_REACH: tl.constexpr,
    MOST_REACH: tl.constexpr,
) -> None:
    if tl.load(side + FOUND) == 0:
        low = tl.load(side + LOW)
        high = tl.load(side + HIGH)
        shift = tl.load(side + SHIFT)
        copies = tl.load(side + COPIES)
        last = tl.load(side + THRESHOLD)
        last_reach = tl.load(side + REACH)
        nonzero = tl.load(side + NONZERO)
        below = nonzero - tl.load(side + FROM_LOW)
        rank = tl.floor(rate * nonzero.to(tl.float64) + 0.5).to(tl.int32)

        at = bins + tl.arange(0, BINS)
        inside = tl.load(at)
        tl.store(at, 0)
        place = tl.sum((below + tl.cumsum(inside) < rank).to(tl.int32))

        infinity = INFINITY >> KEY_SHIFT
        # The one bin that has it, everything below, or everything above.
        least = low + ((place >> copies) << shift)
        is_below = rank <= below
        is_above = rank > below + tl.sum(inside)
        new_low = tl.where(is_below, 1, tl.where(is_above, high, least))
        new_high = tl.where(is_below, low, tl.where(is_above, infinity, tl.minimum(high, least + (1 << shift))))
        is_inside = (is_below | is_above) == 0
        found = (rank == 0) | (is_inside & (shift == 0)) | (finite == 0)

        threshold = tl.where(rank == 0, 0, least)
        moved = tl.where(last == 0, 0, tl.minimum(tl.abs(threshold - last), MOST_REACH))
        # Room for some 16 weights on either side where weights are as dense as usual around a threshold.
        octave = tl.full([], 0x800000 >> KEY_SHIFT, tl.int32)
        sparse = octave * 64 // tl.maximum(nonzero, 1)
        reach = tl.maximum(tl.maximum(4 * moved, last_reach // 2), sparse)
        reach = tl.minimum(tl.maximum(reach, LEAST_REACH), MOST_REACH)
        if found:
            new_low = tl.maximum(1, threshold - reach)
            new_high = tl.minimum(infinity, threshold + reach + 1)
            tl.store(side + FOUND, 1)
            if finite:
                tl.store(side + THRESHOLD, threshold)
                tl.store(side + REACH, reach)
        if finite:
            length = bit_length(new_high - new_low - 1)
            tl.store(side + LOW, new_low)
            tl.store(side + HIGH, new_high)
            tl.store(side + SHIFT, tl.maximum(length - BIN_BITS, 0))
            tl.store(side + COPIES, tl.maximum(-(length - BIN_BITS), 0))


@triton.jit
def _prepare(
    job: tl.tensor, negative_side: tl.tensor, positive_side: tl.tensor, finite: tl.tensor, KEY_SHIFT: tl.constexpr
) -> None:
    """The fixed-point format, as `reference.fixed_point`, and the intervals, as `reference.split_intervals`.

    With one bit both sides get an interval, until `round_levels` knows their gains.
    """
    negative_largest = tl.load(negative_side + LARGEST) << KEY_SHIFT
    positive_largest = tl.load(positive_side + LARGEST) << KEY_SHIFT
    largest = tl.maximum(negative_largest, positive_largest)
    exponent = tl.where(largest >= 0x800000, (largest >> 23) - 126, bit_length(largest) - 149)
    scale = 62 - bit_length(tl.load(job + TOTAL)) - exponent

    negative_edge = tl.load(negative_side + THRESHOLD) << KEY_SHIFT
    positive_edge = tl.load(positive_side + THRESHOLD) << KEY_SHIFT
    negative_range = negative_largest.to(tl.float32, bitcast=True) - negative_edge.to(tl.float32, bitcast=True)
    positive_range = positive_largest.to(tl.float32, bitcast=True) - positive_edge.to(tl.float32, bitcast=True)
    has_negative = finite & (negative_range > 0)
    has_positive = finite & (positive_range > 0)
    n = (1 << tl.load(job + BITS).to(tl.int32)) - 1
    favours_negative = negative_range > positive_range
    more = n - n // 2
    less = tl.where(n == 1, 1, n // 2)
    negative_intervals = tl.where(has_positive, tl.where(favours_negative, more, less), n)
    positive_intervals = tl.where(has_negative, tl.where(favours_negative, less, more), n)
    _store_side(negative_side, has_negative, negative_edge, negative_range, negative_intervals, scale)
    _store_side(positive_side, has_positive, positive_edge, positive_range, positive_intervals, scale)


@triton.jit
def _store_side(
    side: tl.tensor,
    has_intervals: tl.tensor,
    edge: tl.tensor,
    length: tl.tensor,
    intervals: tl.tensor,
    scale: tl.tensor,
) -> None:
    # As torch divides a number by a tensor: by its reciprocal.
    density = tl.div_rn(1.0, tl.where(has_intervals, length, 1.0)) * intervals.to(tl.float32)
    tl.store(side + EDGE, tl.where(has_intervals, edge, MAGNITUDE))
    tl.store(side + DENSITY, density.to(tl.int32, bitcast=True))
    tl.store(side + INTERVALS, tl.where(has_intervals, intervals, 0))
    tl.store(side + SCALE, scale)
