"""Partitioning and quantizing on the CPU, once the thresholds are known.

One pass sums the unclipped weights per interval: they are first packed together, so that the work on them is
proportional to their number. Another one assigns levels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from clipq.operator.cpu_bits import (
    LOOK_UP_LANES,
    NEGATIVE,
    POSITIVE,
    SMALL_BITS,
    VECTOR_BYTES,
    append_between,
    compiled,
    compute_type,
    fence,
    look_up,
    look_up_past_cache,
    look_up_small,
    look_up_small_past_cache,
    magnitude,
    rounded_bits,
    use_wide_vectors,
    weights_at,
)

BLOCK = 1024
MAX_SLOTS = 256
PAST_CACHE_SIZE = 1 << 22
"""Results of at least so many weights are written past the cache, which would be full of them otherwise."""
COUNT, HIGH_LIMB, LOW_LIMB, SUMS = 0, 1, 2, 3


@compiled
def quantize(jobs: Any, which: Any, tag: Any, sums: Any, levels: Any) -> None:
    """Partition and quantize some whole tensors.

    The arrays are those of `sum_segment` for one segment, and those of `round_levels`, one a tensor.
    """
    for index in which:
        job = jobs[index]
        prepare(job, tag)
        sum_segment(job, 0, job.size, tag, sums[0])
        round_levels(job, tag, sums, levels[index])
        assign_segment(job, 0, job.size, tag, levels[index])


@compiled
def sum_pieces(jobs: Any, pieces: Any, tag: Any, sums: Any) -> None:
    """`sum_segment` for some pieces (index, start, stop) of tensors, into the row of each tensor."""
    for i in range(pieces.shape[0]):
        index, start, stop = pieces[i]
        sum_segment(jobs[index], start, stop, tag, sums[index])


@compiled
def assign_pieces(jobs: Any, pieces: Any, tag: Any, levels: Any) -> None:
    """`assign_segment` for some pieces (index, start, stop) of tensors."""
    for i in range(pieces.shape[0]):
        index, start, stop = pieces[i]
        assign_segment(jobs[index], start, stop, tag, levels[index])


@compiled
def prepare(job: Any, tag: Any) -> None:
    """The fixed-point format, as `reference.fixed_point`, and the intervals, as `reference.split_intervals`.

    With one bit both sides get an interval, until `round_levels` knows their gains.
    """
    length = 0
    while job.total >> length:
        length += 1
    largest = np.float64(magnitude(max(job.largest[NEGATIVE], job.largest[POSITIVE]), tag))
    job.limb_bits = 62 - length
    job.scale_exponent = min(job.limb_bits - math.frexp(largest)[1], 1023)

    n = (1 << job.bits) - 1
    less, more = n // 2, n - n // 2
    negative_range, positive_range = _range(job, NEGATIVE, tag), _range(job, POSITIVE, tag)
    if positive_range == 0:
        less, more = (n if negative_range > 0 else 0), 0
    elif negative_range == 0:
        less, more = 0, n
    elif n == 1:
        less = 1
    elif negative_range > positive_range:
        less, more = more, less
    job.intervals[NEGATIVE], job.intervals[POSITIVE] = less, more


@compiled
def _range(job: Any, sign: int, tag: Any) -> Any:
    """From the threshold to the largest magnitude; 0 for a sign without weights."""
    if job.largest[sign] == 0:
        return compute_type(0, tag)
    return compute_type(magnitude(job.largest[sign], tag) - magnitude(job.threshold[sign], tag), tag)


@compiled
def _side(job: Any, sign: int, tag: Any) -> Any:
    """Threshold, intervals per unit of magnitude, and the last interval.

    No magnitude is above the threshold of a side without intervals.
    """
    n = job.intervals[sign]
    if n == 0:
        return compute_type(np.inf, tag), compute_type(0, tag), compute_type(0, tag)
    # As torch divides a number by a tensor: by its reciprocal.
    density = compute_type(compute_type(1, tag) / _range(job, sign, tag), tag)
    return (
        magnitude(job.threshold[sign], tag),
        compute_type(density * compute_type(n, tag), tag),
        compute_type(n - 1, tag),
    )


@compiled
def _slot(bits: Any, tag: Any, key_mask: Any, zero: Any, n_side: Any, p_side: Any) -> Any:
    """The slot of a weight: ascending in value, the negative intervals, zero, the positive intervals."""
    m = magnitude(bits & key_mask, tag)
    is_negative = bits < 0
    threshold = n_side[0] if is_negative else p_side[0]
    density = n_side[1] if is_negative else p_side[1]
    last = n_side[2] if is_negative else p_side[2]
    is_kept = m > threshold
    position = min(last, (m - threshold) * density) if is_kept else compute_type(0, tag)
    step = np.int32(np.int32(position) + np.int32(is_kept))
    # Unsigned, as an index that needs no check for a negative one.
    return np.uint32(np.int32(zero - step) if is_negative else np.int32(zero + step))


@compiled
def sum_segment(job: Any, start: int, stop: int, tag: Any, sums: Any) -> None:
    """Number and fixed-point sum of the weights of ``weight[start:stop]`` in each slot but that of zero."""
    for slot in range(MAX_SLOTS):
        for i in range(SUMS):
            sums[slot, i] = 0
    bits = weights_at(job.weight, job.size, tag)
    narrow = bits.dtype.type
    highest = narrow(job.infinity - 1)
    n_above = narrow(job.threshold[NEGATIVE]) if job.intervals[NEGATIVE] else highest
    p_above = narrow(job.threshold[POSITIVE]) if job.intervals[POSITIVE] else highest
    sign_bit = narrow(np.int64(-1) << (8 * bits.itemsize - 1))
    lanes = VECTOR_BYTES // bits.itemsize
    kept = np.empty(2 * BLOCK + VECTOR_BYTES, bits.dtype)
    n = 0
    for first in range(start, stop, BLOCK):
        part = bits[first : min(first + BLOCK, stop)]
        vectors = part.shape[0] // lanes
        for i in range(vectors):
            n = append_between(part, i * lanes, kept, n, p_above, highest, n_above, highest)
        for i in range(vectors * lanes, part.shape[0]):
            kept[n] = part[i]
            n += part[i] > p_above or narrow(part[i] ^ sign_bit) > n_above
        if n >= BLOCK:
            _sum_kept(kept[:BLOCK], job, tag, sums)
            for i in range(n - BLOCK):
                kept[i] = kept[BLOCK + i]
            n -= BLOCK
    _sum_kept(kept[:n], job, tag, sums)


@compiled
def _sum_kept(kept: Any, job: Any, tag: Any, sums: Any) -> None:
    use_wide_vectors()
    key_mask = kept.dtype.type(~(np.int64(-1) << (8 * kept.itemsize - 1)))
    n_side, p_side = _side(job, NEGATIVE, tag), _side(job, POSITIVE, tag)
    zero = np.int32(job.intervals[NEGATIVE])
    scale, limb = math.ldexp(1.0, job.scale_exponent), math.ldexp(1.0, job.limb_bits)
    slots = np.empty(BLOCK, np.uint32)
    high = np.empty(BLOCK, np.int64)
    low = np.empty(BLOCK, np.int64)
    for i in range(kept.shape[0]):
        slots[i] = _slot(kept[i], tag, key_mask, zero, n_side, p_side)
        scaled = np.float64(magnitude(kept[i] & key_mask, tag)) * scale
        digit = np.int64(scaled)
        high[i] = -digit if kept[i] < 0 else digit
        if tag.itemsize == 8:
            rest = np.int64((scaled - np.float64(digit)) * limb)
            low[i] = -rest if kept[i] < 0 else rest
    for i in range(kept.shape[0]):
        sums[slots[i], COUNT] += 1
        sums[slots[i], HIGH_LIMB] += high[i]
        if tag.itemsize == 8:
            sums[slots[i], LOW_LIMB] += low[i]


@compiled
def round_levels(job: Any, tag: Any, sums: Any, levels: Any) -> None:
    """The levels (paper, step 3) from the sums of all segments, as bits of the weight's dtype.

    0 for an interval without weights. With one bit this also decides the side: the other side's level is 0, so
    that its weights become zero.
    """
    n_slots = job.intervals[NEGATIVE] + 1 + job.intervals[POSITIVE]
    lost = -1
    if job.bits == 1 and n_slots == 3:
        lost = 2 if _gain(sums, 0) > _gain(sums, 2) else 0
    for slot in range(MAX_SLOTS):
        levels[slot] = 0
        if slot >= n_slots or slot == job.intervals[NEGATIVE] or slot == lost:
            continue
        count = max(1, _total(sums, slot, COUNT))
        mean = np.float64(_total(sums, slot, HIGH_LIMB)) / count * math.ldexp(1.0, -job.scale_exponent)
        if tag.itemsize == 8:
            low_mean = np.float64(_total(sums, slot, LOW_LIMB)) / count
            mean += low_mean * math.ldexp(1.0, -job.scale_exponent - job.limb_bits)
        levels[slot] = rounded_bits(mean, tag)


@compiled
def _total(sums: Any, slot: int, which: int) -> Any:
    total = 0
    for segment in range(sums.shape[0]):
        total += sums[segment, slot, which]
    return total


@compiled
def _gain(sums: Any, slot: int) -> Any:
    total = np.float64(_total(sums, slot, HIGH_LIMB))
    return total * total / _total(sums, slot, COUNT)


@compiled
def assign_segment(job: Any, start: int, stop: int, tag: Any, table: Any) -> None:
    """Write ``table[slot]`` for the slot of each weight of ``weight[start:stop]`` to ``out[start:stop]``."""
    use_wide_vectors()
    bits = weights_at(job.weight, job.size, tag)[start:stop]
    out = weights_at(job.out, job.size, tag)[start:stop]
    key_mask = bits.dtype.type(~(np.int64(-1) << (8 * bits.itemsize - 1)))
    n_side, p_side = _side(job, NEGATIVE, tag), _side(job, POSITIVE, tag)
    zero = np.int32(job.intervals[NEGATIVE])
    slots = np.empty(BLOCK, np.uint32)
    past_cache = job.size >= PAST_CACHE_SIZE and (job.out + start * bits.itemsize) % VECTOR_BYTES == 0
    for first in range(0, bits.shape[0], BLOCK):
        part = bits[first : first + BLOCK]
        target = out[first : first + BLOCK]
        for i in range(part.shape[0]):
            slots[i] = _slot(part[i], tag, key_mask, zero, n_side, p_side)
        vectors = part.shape[0] // LOOK_UP_LANES
        if job.bits <= SMALL_BITS and past_cache:
            for i in range(vectors):
                look_up_small_past_cache(table, slots, i * LOOK_UP_LANES, target)
        elif job.bits <= SMALL_BITS:
            for i in range(vectors):
                look_up_small(table, slots, i * LOOK_UP_LANES, target)
        elif past_cache:
            for i in range(vectors):
                look_up_past_cache(table, slots, i * LOOK_UP_LANES, target)
        else:
            for i in range(vectors):
                look_up(table, slots, i * LOOK_UP_LANES, target)
        for i in range(vectors * LOOK_UP_LANES, part.shape[0]):
            target[i] = table[slots[i]]
    if past_cache:
        fence()
