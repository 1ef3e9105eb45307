"""The operator's loops over memory, compiled by Numba.

Importing this module imports Numba; a kernel is compiled at its first call for a dtype, and cached on disk.

A weight is handled by its *key*: its bits without the sign, an integer that orders as the magnitude does. A
kernel knows the dtype by its ``tag``, an empty array: float32, float64, uint16 (bfloat16), int16 (float16).
Weights come as dense memory; their order is of no account, since all sums are exact.

The loops over blocks are written so that LLVM turns them into vector code: integer maxima, counters as narrow as
the keys, no early exit, no branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.np.numpy_support import carray

NEGATIVE, POSITIVE = 0, 1
SIGNS = 2
BLOCK = 1024
SEARCH_BINS = 2048
LIST_CAPACITY = 32768
MAX_SLOTS = 256
FEW_SLOTS = 8

JOB = np.dtype(
    [
        ("weight", np.int64),  # address
        ("out", np.int64),  # address
        ("size", np.int64),
        ("pruning_rate", np.float64),
        ("bits", np.int64),
        ("low", np.int64, SIGNS),  # the threshold's key is looked for in [low, high)
        ("high", np.int64, SIGNS),
        ("threshold", np.int64, SIGNS),  # keys, from here on
        ("largest", np.int64, SIGNS),
        ("found", np.int64, SIGNS),
        ("intervals", np.int64, SIGNS),
        ("scale_exponent", np.int64),
        ("limb_bits", np.int64),
    ]
)
"""One tensor of a batch, from the first pass to the last; low, high and threshold live from call to call."""

NONZERO, FROM_LOW, FROM_HIGH, LARGEST, TALLIES = 0, 1, 2, 3, 4  # what a counting pass finds per sign
COUNT, HIGH_LIMB, LOW_LIMB, SUMS = 0, 1, 2, 3  # what a summing pass finds per slot

compiled: Callable[..., Any] = njit(nogil=True, cache=True, error_model="numpy")
intrinsic: Callable[..., Any] = extending.intrinsic


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    """An int32 read as the float32 with these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _double_of_bits(typing_context: Any, bits: Any) -> Any:
    """An int64 read as the float64 with these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


def _specialize(general: Callable[..., Any]) -> Callable[[Callable[..., Any]], None]:
    """`overload` for a function with annotations: Numba wants them alike in the implementations, which have none."""

    def register(choose: Callable[..., Any]) -> None:
        choose.__annotations__ = {}
        extending.overload(general)(choose)

    return register


def weights_at(address: int, size: int, tag: Any) -> Any:
    """The bits of the weights at an address, as signed integers."""


def magnitude(key: Any, tag: Any) -> Any:
    """The magnitude with this key, in the compute type."""


def infinity(tag: Any) -> Any:
    """The key of infinity: all keys below it are finite."""


def compute_type(value: Any, tag: Any) -> Any:
    """A number in the compute type."""


@_specialize(weights_at)
def _weights_at(address: Any, size: Any, tag: Any) -> Any:
    if tag.dtype == types.float32:
        return lambda address, size, tag: carray(_pointer(address), (size,), np.int32)
    if tag.dtype == types.float64:
        return lambda address, size, tag: carray(_pointer(address), (size,), np.int64)
    return lambda address, size, tag: carray(_pointer(address), (size,), np.int16)


@_specialize(magnitude)
def _magnitude(key: Any, tag: Any) -> Any:
    if tag.dtype == types.float32:
        return lambda key, tag: _float_of_bits(np.int32(key))
    if tag.dtype == types.float64:
        return lambda key, tag: _double_of_bits(np.int64(key))
    if tag.dtype == types.uint16:
        return lambda key, tag: _float_of_bits(np.int32(np.int32(key) << np.int32(16)))
    # The exponent's bias is 15 in float16 and 127 in float32; multiplying also makes its subnormals right.
    shift = np.float32(2.0**112)
    return lambda key, tag: _float_of_bits(np.int32(np.int32(key) << np.int32(13))) * shift


@_specialize(infinity)
def _infinity(tag: Any) -> Any:
    key = {types.float32: 0xFF << 23, types.float64: 0x7FF << 52, types.uint16: 0xFF << 7, types.int16: 0x1F << 10}
    value = key[tag.dtype]
    return lambda tag: value


@_specialize(compute_type)
def _compute_type(value: Any, tag: Any) -> Any:
    if tag.dtype == types.float64:
        return lambda value, tag: np.float64(value)
    return lambda value, tag: np.float32(value)


# --- Clipping: the thresholds ---------------------------------------------------------------------------------


@compiled
def count_segment(job: Any, start: int, stop: int, tag: Any, tally: Any, listed: Any, keys: Any, bins: Any) -> None:
    """One counting pass over ``weight[start:stop]``.

    ``tally[sign]`` gets the number of non-zero keys, of keys >= low and >= high, and the largest key; the keys
    in [low, high) are listed in ``keys[sign]`` as long as there is room and, where there might not be, counted
    in ``bins[sign]``.
    """
    bits = weights_at(job.weight, job.size, tag)[start:stop]
    tally[:] = 0
    listed[:] = 0
    use_bins = job.size > LIST_CAPACITY
    if use_bins:
        bins[:] = 0
    for block in range(0, stop - start, BLOCK):
        part = bits[block : block + BLOCK]
        before = tally[NEGATIVE, FROM_LOW] - tally[NEGATIVE, FROM_HIGH]
        before += tally[POSITIVE, FROM_LOW] - tally[POSITIVE, FROM_HIGH]
        _count_block(part, job, tally)
        after = tally[NEGATIVE, FROM_LOW] - tally[NEGATIVE, FROM_HIGH]
        after += tally[POSITIVE, FROM_LOW] - tally[POSITIVE, FROM_HIGH]
        if after > before:
            for sign in range(SIGNS):
                _list_block(part, job, sign, listed, keys, bins, use_bins)


@compiled
def _count_block(part: Any, job: Any, tally: Any) -> None:
    narrow = part.dtype.type
    sign_bit = narrow(np.int64(-1) << (8 * part.itemsize - 1))
    n_below = narrow(job.low[NEGATIVE] - 1)
    n_last = narrow(job.high[NEGATIVE] - 1)
    p_below = narrow(job.low[POSITIVE] - 1)
    p_last = narrow(job.high[POSITIVE] - 1)
    n_nonzero = n_from_low = n_from_high = n_largest = narrow(0)
    p_nonzero = p_from_low = p_from_high = p_largest = narrow(0)
    for i in range(part.shape[0]):
        p = part[i]  # the key of a positive weight; negative for the others
        n = narrow(p ^ sign_bit)  # the key of a negative weight; negative for the others
        n_nonzero = narrow(n_nonzero + (n > 0))
        p_nonzero = narrow(p_nonzero + (p > 0))
        n_from_low = narrow(n_from_low + (n > n_below))
        p_from_low = narrow(p_from_low + (p > p_below))
        n_from_high = narrow(n_from_high + (n > n_last))
        p_from_high = narrow(p_from_high + (p > p_last))
        n_largest = max(n_largest, n)
        p_largest = max(p_largest, p)
    tally[NEGATIVE, NONZERO] += n_nonzero
    tally[POSITIVE, NONZERO] += p_nonzero
    tally[NEGATIVE, FROM_LOW] += n_from_low
    tally[POSITIVE, FROM_LOW] += p_from_low
    tally[NEGATIVE, FROM_HIGH] += n_from_high
    tally[POSITIVE, FROM_HIGH] += p_from_high
    tally[NEGATIVE, LARGEST] = max(tally[NEGATIVE, LARGEST], n_largest)
    tally[POSITIVE, LARGEST] = max(tally[POSITIVE, LARGEST], p_largest)


@compiled
def _list_block(part: Any, job: Any, sign: int, listed: Any, keys: Any, bins: Any, use_bins: bool) -> None:
    narrow = part.dtype.type
    flip = narrow(0) if sign == POSITIVE else narrow(np.int64(-1) << (8 * part.itemsize - 1))
    below, last = narrow(job.low[sign] - 1), narrow(job.high[sign] - 1)
    shift = bin_shift(job.high[sign] - job.low[sign])
    n = listed[sign]
    for first in range(0, part.shape[0], 32):
        few = part[first : first + 32]
        inside = narrow(0)
        for i in range(few.shape[0]):
            key = narrow(few[i] ^ flip)
            inside = narrow(inside + (narrow(key > below) & narrow(key <= last)))
        if inside == 0:
            continue
        for i in range(few.shape[0]):
            key = narrow(few[i] ^ flip)
            if below < key <= last:
                if n < LIST_CAPACITY:
                    keys[sign, n] = key
                    n += 1
                if use_bins:
                    bins[sign, (np.int64(key) - below - 1) >> shift] += 1
    listed[sign] = n


@compiled
def bin_shift(width: int) -> int:
    """How far to shift a key's distance from low, in [0, width), for it to be a bin's number."""
    shift = 0
    while (width - 1) >> shift >= SEARCH_BINS:
        shift += 1
    return shift


@compiled
def settle(job: Any, tag: Any, tally: Any, listed: Any, keys: Any, bins: Any) -> Any:
    """Threshold of each sign from the counting pass over all segments, or else where to look in the next pass.

    ``tally``, ``listed``, ``keys`` and ``bins`` are those of `count_segment`, stacked.

    Returns:
        Whether both thresholds are final; also true if a weight is not finite, which `is_finite` tells.
    """
    for sign in range(SIGNS):
        job.largest[sign] = tally[:, sign, LARGEST].max()
    if not is_finite(job, tag):
        return True
    for sign in range(SIGNS):
        if not job.found[sign]:
            _settle_sign(job, sign, tag, tally[:, sign], listed[:, sign], keys[:, sign], bins[:, sign])
    return job.found[NEGATIVE] and job.found[POSITIVE]


@compiled
def is_finite(job: Any, tag: Any) -> Any:
    """Whether all weights are finite, after a counting pass."""
    return max(job.largest[NEGATIVE], job.largest[POSITIVE]) < infinity(tag)


@compiled
def _settle_sign(job: Any, sign: int, tag: Any, tally: Any, listed: Any, keys: Any, bins: Any) -> None:
    n = tally[:, NONZERO].sum()
    rank = np.int64(math.floor(job.pruning_rate * n + 0.5))
    low, high = job.low[sign], job.high[sign]
    below = n - tally[:, FROM_LOW].sum()
    inside = n - below - tally[:, FROM_HIGH].sum()
    reach = 64 * min(max(high - low, 1), infinity(tag) >> 6)
    if rank == 0:
        job.low[sign] = job.high[sign] = infinity(tag)
        job.threshold[sign], job.found[sign] = 0, 1
    elif rank <= below:
        job.low[sign], job.high[sign] = max(1, low - reach), low
    elif rank > below + inside:
        job.low[sign], job.high[sign] = high, high + min(reach, infinity(tag) - high)
    elif high - low == 1:
        _finish_sign(job, sign, low, n, inside, tag)
    elif listed.sum() == inside:
        gathered = np.empty(inside, np.int64)
        at = 0
        for segment in range(listed.shape[0]):
            gathered[at : at + listed[segment]] = keys[segment, : listed[segment]]
            at += listed[segment]
        _finish_sign(job, sign, _kth_smallest(gathered, rank - below), n, inside, tag)
    else:
        shift = bin_shift(high - low)
        number = 0
        under = below + bins[:, 0].sum()
        while under < rank:
            number += 1
            under += bins[:, number].sum()
        low += number << shift
        if shift == 0:
            _finish_sign(job, sign, low, n, inside, tag)
        else:
            job.low[sign], job.high[sign] = low, min(high, low + (1 << shift))


@compiled
def _finish_sign(job: Any, sign: int, key: int, n: int, inside: int, tag: Any) -> None:
    """Note a threshold, and where to look for it in the next call: around it, wider the more it moves."""
    moved = abs(key - job.threshold[sign]) if job.threshold[sign] else 0
    keys_per_weight = float(job.high[sign] - job.low[sign]) / inside
    wanted = min(max(n / 512, 16.0), LIST_CAPACITY / 8) * keys_per_weight
    most = min(max(n / 32, 32.0), LIST_CAPACITY / 3) * keys_per_weight
    half = np.int64(min(max(wanted, 4.0 * moved), most, float(infinity(tag) >> 1)))
    job.threshold[sign], job.found[sign] = key, 1
    job.low[sign] = max(1, key - half)
    job.high[sign] = key + min(half + 1, infinity(tag) - key)


@compiled
def _kth_smallest(keys: Any, k: int) -> Any:
    """The k-th smallest, from 1, by quickselect; reorders the keys."""
    first, last, at = 0, keys.shape[0] - 1, k - 1
    random = np.uint64(88172645463325252)
    while first < last:
        random ^= random << np.uint64(13)
        random ^= random >> np.uint64(7)
        random ^= random << np.uint64(17)
        pivot = keys[first + np.int64(random % np.uint64(last - first + 1))]
        i, j = first, last
        while i <= j:
            while keys[i] < pivot:
                i += 1
            while keys[j] > pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if at <= j:
            last = j
        elif at >= i:
            first = i
        else:
            return np.int64(keys[at])
    return np.int64(keys[at])


# --- Partitioning and quantizing ------------------------------------------------------------------------------


@compiled
def choose_format(job: Any, tag: Any) -> None:
    """The fixed-point format of the sums, as `reference.fixed_point`."""
    length = 0
    while job.size >> length:
        length += 1
    largest = np.float64(magnitude(max(job.largest[NEGATIVE], job.largest[POSITIVE]), tag))
    job.limb_bits = 62 - length
    job.scale_exponent = min(job.limb_bits - math.frexp(largest)[1], 1023)


@compiled
def choose_intervals(job: Any, tag: Any) -> None:
    """The intervals of each side, as `reference.split_intervals`; one a side for b = 1, until the gains are known."""
    n = (1 << job.bits) - 1
    negative_range = _threshold_and_range(job, NEGATIVE, tag)[1]
    positive_range = _threshold_and_range(job, POSITIVE, tag)[1]
    less, more = n // 2, n - n // 2
    if positive_range == 0:
        negative, positive = n if negative_range > 0 else 0, 0
    elif negative_range == 0:
        negative, positive = 0, n
    elif n == 1:
        negative, positive = 1, 1
    elif negative_range > positive_range:
        negative, positive = more, less
    else:
        negative, positive = less, more
    job.intervals[NEGATIVE], job.intervals[POSITIVE] = negative, positive


@compiled
def _threshold_and_range(job: Any, sign: int, tag: Any) -> Any:
    threshold = magnitude(job.threshold[sign], tag)
    if job.largest[sign] == 0:
        return threshold, threshold
    return threshold, compute_type(magnitude(job.largest[sign], tag) - threshold, tag)


@compiled
def _side(job: Any, sign: int, tag: Any) -> Any:
    """Threshold, intervals per unit of magnitude, and the last interval; no magnitude is above the threshold of
    a side without intervals."""
    threshold, length = _threshold_and_range(job, sign, tag)
    n = job.intervals[sign]
    if n == 0:
        return compute_type(np.inf, tag), compute_type(0, tag), compute_type(0, tag)
    # As torch divides a number by a tensor: by its reciprocal.
    density = compute_type(compute_type(compute_type(1, tag) / length, tag) * compute_type(n, tag), tag)
    return threshold, density, compute_type(n - 1, tag)


@compiled
def _partition_block(part: Any, job: Any, tag: Any, n_side: Any, p_side: Any, slots: Any) -> None:
    """The slot of each weight: ascending in value, the negative intervals, zero, the positive intervals."""
    narrow = part.dtype.type
    key_mask = narrow(~(np.int64(-1) << (8 * part.itemsize - 1)))
    n_threshold, n_density, n_last = n_side
    p_threshold, p_density, p_last = p_side
    zero = np.int32(job.intervals[NEGATIVE])
    for i in range(part.shape[0]):
        bits = part[i]
        m = magnitude(narrow(bits & key_mask), tag)
        is_negative = bits < 0
        threshold = n_threshold if is_negative else p_threshold
        density = n_density if is_negative else p_density
        last = n_last if is_negative else p_last
        is_kept = m > threshold
        position = min(last, (m - threshold) * density) if is_kept else compute_type(0, tag)
        step = np.int32(np.int32(position) + np.int32(is_kept))
        slots[i] = np.int32(zero - step) if is_negative else np.int32(zero + step)


@compiled
def sum_segment(job: Any, start: int, stop: int, tag: Any, sums: Any) -> None:
    """Add the weights of ``weight[start:stop]``, in fixed point, to the ``sums[slot]`` they belong to."""
    bits = weights_at(job.weight, job.size, tag)[start:stop]
    sums[:] = 0
    n_side, p_side = _side(job, NEGATIVE, tag), _side(job, POSITIVE, tag)
    slots = np.empty(BLOCK, np.int32)
    high = np.empty(BLOCK, np.int64)
    low = np.empty(BLOCK, np.int64)
    n_slots = job.intervals[NEGATIVE] + 1 + job.intervals[POSITIVE]
    for block in range(0, stop - start, BLOCK):
        part = bits[block : block + BLOCK]
        _partition_block(part, job, tag, n_side, p_side, slots)
        _fixed_point_block(part, job, tag, high, low)
        if n_slots <= FEW_SLOTS:
            for slot in range(n_slots):
                if slot != job.intervals[NEGATIVE]:
                    _sum_slot(slots[: part.shape[0]], slot, high, low, tag, sums[slot])
        else:
            _sum_block(slots[: part.shape[0]], high, low, tag, sums)


@compiled
def _fixed_point_block(part: Any, job: Any, tag: Any, high: Any, low: Any) -> None:
    narrow = part.dtype.type
    key_mask = narrow(~(np.int64(-1) << (8 * part.itemsize - 1)))
    scale = math.ldexp(1.0, job.scale_exponent)
    limb = math.ldexp(1.0, job.limb_bits)
    for i in range(part.shape[0]):
        bits = part[i]
        scaled = np.float64(magnitude(narrow(bits & key_mask), tag)) * scale
        digit = np.int64(scaled)
        high[i] = -digit if bits < 0 else digit
        if tag.itemsize == 8:
            rest = np.int64((scaled - np.float64(digit)) * limb)
            low[i] = -rest if bits < 0 else rest


@compiled
def _sum_slot(slots: Any, slot: int, high: Any, low: Any, tag: Any, sums: Any) -> None:
    count, high_sum, low_sum = np.int32(0), np.int64(0), np.int64(0)
    for i in range(slots.shape[0]):
        here = slots[i] == slot
        count = np.int32(count + here)
        high_sum += high[i] if here else 0
        if tag.itemsize == 8:
            low_sum += low[i] if here else 0
    sums[COUNT] += count
    sums[HIGH_LIMB] += high_sum
    sums[LOW_LIMB] += low_sum


@compiled
def _sum_block(slots: Any, high: Any, low: Any, tag: Any, sums: Any) -> None:
    for i in range(slots.shape[0]):
        slot = slots[i]
        sums[slot, COUNT] += 1
        sums[slot, HIGH_LIMB] += high[i]
        if tag.itemsize == 8:
            sums[slot, LOW_LIMB] += low[i]


@compiled
def round_levels(job: Any, tag: Any, sums: Any, levels: Any) -> None:
    """The levels (paper, step 3) from the sums over all segments, as bits of the weight's dtype.

    0 for an interval without weights. With one bit this also decides the side, as `reference.split_intervals`
    does: the other side's level is 0, so that its weights become zero.
    """
    n_slots = job.intervals[NEGATIVE] + 1 + job.intervals[POSITIVE]
    zero = job.intervals[NEGATIVE]
    means = np.zeros(MAX_SLOTS, np.float64)
    for slot in range(n_slots):
        if slot == zero:
            continue
        count = max(1, sums[:, slot, COUNT].sum())
        mean = np.float64(sums[:, slot, HIGH_LIMB].sum()) / count * math.ldexp(1.0, -job.scale_exponent)
        if tag.itemsize == 8:
            low_mean = np.float64(sums[:, slot, LOW_LIMB].sum()) / count
            mean += low_mean * math.ldexp(1.0, -job.scale_exponent - job.limb_bits)
        means[slot] = mean
    if job.bits == 1 and n_slots == 3:
        means[2 if _gain(sums[:, 0]) > _gain(sums[:, 2]) else 0] = 0
    to_bits(means, tag, levels)
    for slot in range(n_slots):
        if means[slot] == 0 or levels[slot] << 1 == 0:
            levels[slot] = 0  # never -0


@compiled
def _gain(sums: Any) -> Any:
    total = np.float64(sums[:, HIGH_LIMB].sum())
    return total * total / sums[:, COUNT].sum()


def to_bits(values: Any, tag: Any, bits: Any) -> None:
    """Round float64 values to float32 and then to the weight's dtype, halves to even, and give their bits."""


@_specialize(to_bits)
def _to_bits(values: Any, tag: Any, bits: Any) -> Any:
    rounded = {
        types.float64: _float64_bits,
        types.float32: _float32_bits,
        types.uint16: _bfloat16_bits,
        types.int16: _float16_bits,
    }[tag.dtype]
    return lambda values, tag, bits: rounded(values, bits)


@compiled
def _float64_bits(values: Any, bits: Any) -> None:
    bits[:] = values.view(np.int64)


@compiled
def _float32_bits(values: Any, bits: Any) -> None:
    bits[:] = values.astype(np.float32).view(np.int32)


@compiled
def _bfloat16_bits(values: Any, bits: Any) -> None:
    wide = values.astype(np.float32).view(np.int32)
    for i in range(wide.shape[0]):
        bits[i] = np.int16((np.int64(wide[i]) + 0x7FFF + ((wide[i] >> 16) & 1)) >> 16)


@compiled
def _float16_bits(values: Any, bits: Any) -> None:
    single = values.astype(np.float32)
    for i in range(single.shape[0]):
        value = abs(np.float64(single[i]))
        exponent = max(math.frexp(value)[1] - 1, -14)
        key = ((exponent + 14) << 10) + np.int64(np.rint(math.ldexp(value, 10 - exponent)))
        bits[i] = np.int16(key | -0x8000 if single[i] < 0 else key)


@compiled
def assign_segment(job: Any, start: int, stop: int, tag: Any, table: Any) -> None:
    """Write ``table[slot]`` for the slot of each weight of ``weight[start:stop]`` to ``out[start:stop]``.

    ``out`` holds elements of the table's dtype.
    """
    out = carray(_pointer(job.out), (job.size,), table.dtype)
    bits = weights_at(job.weight, job.size, tag)[start:stop]
    n_side, p_side = _side(job, NEGATIVE, tag), _side(job, POSITIVE, tag)
    slots = np.empty(BLOCK, np.int32)
    for block in range(0, stop - start, BLOCK):
        part = bits[block : block + BLOCK]
        _partition_block(part, job, tag, n_side, p_side, slots)
        target = out[start + block : start + block + part.shape[0]]
        for i in range(part.shape[0]):
            target[i] = table[slots[i]]


# --- Whole tensors, several in one call -----------------------------------------------------------------------


@compiled
def locate(jobs: Any, which: Any, tag: Any, tally: Any, listed: Any, keys: Any, bins: Any) -> None:
    """The thresholds of some whole tensors."""
    for index in which:
        job = jobs[index]
        job.found[:] = 0
        settled = False
        while not settled:
            count_segment(job, 0, job.size, tag, tally[0], listed[0], keys[0], bins[0])
            settled = settle(job, tag, tally[:1], listed[:1], keys[:1], bins[:1])


@compiled
def quantize(jobs: Any, which: Any, tag: Any, sums: Any, levels: Any) -> None:
    """Partition and quantize some whole tensors whose thresholds are known."""
    for index in which:
        job = jobs[index]
        prepare(job, tag)
        sum_segment(job, 0, job.size, tag, sums[0])
        round_levels(job, tag, sums[:1], levels)
        assign_segment(job, 0, job.size, tag, levels)


@compiled
def prepare(job: Any, tag: Any) -> None:
    """Choose the fixed-point format and the intervals of a tensor whose thresholds are known."""
    choose_format(job, tag)
    choose_intervals(job, tag)
