"""Clipping on the CPU: the thresholds, exactly, mostly in one pass over the weights.

A counting pass counts the keys below, in and above a narrow range around the last call's threshold, and lists
those inside; the threshold is then selected from the list. Where the range misses the threshold it moves; where
the list has no room for the range, keys are counted in bins and the range becomes one bin. A tensor that is split
over processes has no list, only counts, which the processes add up after each pass.

The counting loop is written so that LLVM turns it into vector code: counters as narrow as the keys, integer
maxima, no branch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from clipq.operator.cpu_bits import (
    NEGATIVE,
    POSITIVE,
    SIGNS,
    VECTOR_BYTES,
    append_between,
    compiled,
    use_wide_vectors,
    weights_at,
)

BLOCK = 1024
BINS = 2048
SPLIT_BINS = 1024
"""Bins for a tensor that is split over processes: they send them to each other."""
LIST_CAPACITY = 32768
NONZERO, FROM_LOW, FROM_HIGH, LARGEST, TALLIES = 0, 1, 2, 3, 4


@compiled
def locate(jobs: Any, which: Any, tag: Any, tally: Any, length: Any, keys: Any, bins: Any) -> None:
    """The thresholds of some whole tensors; the arrays are those of `count_segment` for one segment, stacked."""
    for index in which:
        job = jobs[index]
        settled = False
        while not settled:
            count_segment(job, 0, job.size, tag, tally[0], length[0], keys[0], bins[0])
            settled = settle(job, tally, length, keys, bins)


@compiled
def count_pieces(jobs: Any, pieces: Any, tag: Any, tally: Any, length: Any, keys: Any, bins: Any) -> None:
    """`count_segment` for some pieces (index, start, stop) of tensors, into the arrays' row of each tensor."""
    for i in range(pieces.shape[0]):
        index, start, stop = pieces[i]
        count_segment(jobs[index], start, stop, tag, tally[index], length[index], keys[index], bins[index])


@compiled
def count_segment(job: Any, start: int, stop: int, tag: Any, tally: Any, length: Any, keys: Any, bins: Any) -> None:
    """One counting pass over ``weight[start:stop]``.

    Args:
        tally: per sign, gets the number of non-zero keys, of keys >= low and >= high, and the largest key.
        length, keys: the list gets the keys in [low, high), those of negative weights as -key, as far as there
            is room.
        bins: per sign, gets the number of those keys by their distance from low, see `bin_shift`; only for a
            tensor of more weights than there is room in the list.
    """
    bits = weights_at(job.weight, job.size, tag)
    for sign in range(SIGNS):
        for i in range(TALLIES):
            tally[sign, i] = 0
        if job.size > keys.shape[0]:
            for i in range(bins.shape[1]):
                bins[sign, i] = 0
    listed = 0
    sign_bit = np.int64(-1) << (8 * bits.itemsize - 1)
    fresh = np.empty(BLOCK + VECTOR_BYTES, bits.dtype)
    for first in range(start, stop, BLOCK):
        part = bits[first : min(first + BLOCK, stop)]
        if _count_block(part, job, tally):
            n_fresh = _list_block(part, job, fresh)
            for i in range(n_fresh):
                key = np.int64(fresh[i])
                if listed < keys.shape[0]:
                    keys[listed] = key if key > 0 else -(key ^ sign_bit)
                    listed += 1
            if job.size > keys.shape[0]:
                _bin_keys(fresh[:n_fresh], sign_bit, job, bins)
    length[0] = listed


@compiled
def _count_block(part: Any, job: Any, tally: Any) -> Any:
    """Add a block's counts to the tally; whether any key is in [low, high)."""
    use_wide_vectors()
    narrow = part.dtype.type
    sign_bit = narrow(np.int64(-1) << (8 * part.itemsize - 1))
    n_below, n_upto = narrow(job.low[NEGATIVE] - 1), narrow(job.high[NEGATIVE] - 1)
    p_below, p_upto = narrow(job.low[POSITIVE] - 1), narrow(job.high[POSITIVE] - 1)
    n_nonzero = n_from_low = n_from_high = n_largest = narrow(0)
    p_nonzero = p_from_low = p_from_high = p_largest = narrow(0)
    for i in range(part.shape[0]):
        p = part[i]
        n = narrow(p ^ sign_bit)
        n_nonzero = narrow(n_nonzero + (n > 0))
        p_nonzero = narrow(p_nonzero + (p > 0))
        n_from_low = narrow(n_from_low + (n > n_below))
        p_from_low = narrow(p_from_low + (p > p_below))
        n_from_high = narrow(n_from_high + (n > n_upto))
        p_from_high = narrow(p_from_high + (p > p_upto))
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
    return n_from_low + p_from_low > n_from_high + p_from_high


@compiled
def _list_block(part: Any, job: Any, fresh: Any) -> Any:
    """The weights of a block whose keys are in [low, high); how many."""
    narrow = part.dtype.type
    n_below, n_upto = narrow(job.low[NEGATIVE] - 1), narrow(job.high[NEGATIVE] - 1)
    p_below, p_upto = narrow(job.low[POSITIVE] - 1), narrow(job.high[POSITIVE] - 1)
    sign_bit = narrow(np.int64(-1) << (8 * part.itemsize - 1))
    lanes = VECTOR_BYTES // part.itemsize
    vectors = part.shape[0] // lanes
    n = 0
    for i in range(vectors):
        n = append_between(part, i * lanes, fresh, n, p_below, p_upto, n_below, n_upto)
    for i in range(vectors * lanes, part.shape[0]):
        key = narrow(part[i] ^ sign_bit) if part[i] < 0 else part[i]
        if (n_below < key <= n_upto) if part[i] < 0 else (p_below < key <= p_upto):
            fresh[n] = part[i]
            n += 1
    return n


@compiled
def _bin_keys(fresh: Any, sign_bit: int, job: Any, bins: Any) -> None:
    n_shift = bin_shift(job.high[NEGATIVE] - job.low[NEGATIVE], bins.shape[1])
    p_shift = bin_shift(job.high[POSITIVE] - job.low[POSITIVE], bins.shape[1])
    for i in range(fresh.shape[0]):
        key = np.int64(fresh[i])
        if key < 0:
            bins[NEGATIVE, ((key ^ sign_bit) - job.low[NEGATIVE]) >> n_shift] += 1
        else:
            bins[POSITIVE, (key - job.low[POSITIVE]) >> p_shift] += 1


@compiled
def bin_shift(width: int, n_bins: int) -> Any:
    """How far to shift a key's distance from low, in [0, width), for it to be a bin's number."""
    shift = 0
    while (width - 1) >> shift >= n_bins:
        shift += 1
    return shift


@compiled
def settle(job: Any, tally: Any, length: Any, keys: Any, bins: Any) -> Any:
    """Threshold of each sign from the counting pass over all segments, or else where to look in the next pass.

    The arrays are those of `count_segment`, stacked.

    Returns:
        Whether both thresholds are final; also if a weight is not finite: then the largest key is not below
        infinity, and the thresholds are not set.
    """
    for sign in range(SIGNS):
        job.largest[sign] = 0
        for segment in range(tally.shape[0]):
            job.largest[sign] = max(job.largest[sign], tally[segment, sign, LARGEST])
    if max(job.largest[NEGATIVE], job.largest[POSITIVE]) >= job.infinity:
        return True
    for sign in range(SIGNS):
        if not job.found[sign]:
            _settle_sign(job, sign, tally, length, keys, bins)
    return job.found[NEGATIVE] + job.found[POSITIVE] == SIGNS


@compiled
def _settle_sign(job: Any, sign: int, tally: Any, length: Any, keys: Any, bins: Any) -> None:
    nonzero = from_low = from_high = 0
    for segment in range(tally.shape[0]):
        nonzero += tally[segment, sign, NONZERO]
        from_low += tally[segment, sign, FROM_LOW]
        from_high += tally[segment, sign, FROM_HIGH]
    rank = np.int64(math.floor(job.pruning_rate * nonzero + 0.5))
    low, high = job.low[sign], job.high[sign]
    below, inside = nonzero - from_low, from_low - from_high
    reach = 64 * min(max(high - low, 1), job.infinity >> 6)
    if rank == 0:
        job.low[sign] = job.high[sign] = job.infinity
        job.threshold[sign], job.found[sign] = 0, 1
    elif rank <= below:
        job.low[sign], job.high[sign] = max(1, low - reach), low
    elif rank > below + inside:
        job.low[sign], job.high[sign] = high, high + min(reach, job.infinity - high)
    elif high - low == 1:
        _finish(job, sign, low, nonzero, inside)
    else:
        gathered = _gather(sign, length, keys)
        if gathered.shape[0] == inside:
            _finish(job, sign, _kth_smallest(gathered, rank - below), nonzero, inside)
            return
        shift = bin_shift(high - low, bins.shape[2])
        number, under = -1, below
        while under < rank:
            number += 1
            for segment in range(bins.shape[0]):
                under += bins[segment, sign, number]
        low += number << shift
        if shift == 0:
            _finish(job, sign, low, nonzero, inside)
        else:
            job.low[sign], job.high[sign] = low, min(high, low + (1 << shift))


@compiled
def _gather(sign: int, length: Any, keys: Any) -> Any:
    """The listed keys of one sign, of all segments."""
    total = 0
    for segment in range(length.shape[0]):
        total += length[segment, 0]
    gathered = np.empty(total, np.int64)
    n = 0
    for segment in range(length.shape[0]):
        for i in range(length[segment, 0]):
            key = keys[segment, i]
            gathered[n] = abs(key)
            n += (key < 0) == (sign == NEGATIVE)
    return gathered[:n]


@compiled
def _finish(job: Any, sign: int, key: int, nonzero: int, inside: int) -> None:
    """Note a threshold, and where to look for it in the next call: around it, wider the more it moves."""
    moved = abs(key - job.threshold[sign]) if job.threshold[sign] else 0
    if job.reach[sign]:
        half = max(min(4 * min(moved, job.infinity >> 3), job.infinity >> 1), job.reach[sign] // 2, SPLIT_BINS // 2 - 1)
        job.reach[sign] = half
    else:
        keys_per_weight = float(job.high[sign] - job.low[sign]) / inside
        wanted = min(max(nonzero / 512, 16.0), LIST_CAPACITY / 16) * keys_per_weight
        most = min(max(nonzero / 32, 32.0), LIST_CAPACITY / 4) * keys_per_weight
        half = np.int64(min(max(wanted, 4.0 * moved), most, float(job.infinity >> 1)))
    job.threshold[sign], job.found[sign] = key, 1
    job.low[sign] = max(1, key - half)
    job.high[sign] = key + min(half + 1, job.infinity - key)


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
            first = last = at
    return keys[at]
