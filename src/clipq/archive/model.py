"""The model of a code tensor: how likely each bit is, given all that came before it.

Source: docs/format.md, "Model". A code is coded as a zero flag, a sign, and the bits of its level. The
logit of each bit is a weighted sum of what several predictors say; the weights are learned as the coding goes on
(logistic mixing). The predictors are the running activity of the column, of its group and of the row, the
neighbours, and adaptive probabilities in contexts of them. What depends on earlier rows only is worked
out a row at a time, so that it can be vectorised. Rows of nothing but zeros take one flag, and the others are coded
as if these were not there.

Encoder and decoder are one function, made twice: they can never disagree. All arithmetic is on integers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from clipq.archive.rangecoder import (
    EVEN,
    I32,
    LEAST,
    START,
    adapted,
    decode_bit,
    encode_bit,
    finish,
    probability,
    shift_in,
    shift_out,
)
from clipq.archive.rangecoder import as_index as _u
from clipq.archive.tables import (
    ACTIVITY_CONTEXTS,
    CAPPED,
    LOG,
    NEAR,
    NEIGHBOUR_CONTEXTS,
    OUT_OF_SPACE,
    RECIPROCAL,
    STEP,
    STRETCH,
)
from clipq.jit import compiled_ahead

U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
I64 = npt.NDArray[np.int64]

ZERO_WEIGHTS = (24000, 5000, 0, 16000, 32000, 28000)  # column, group, above, row, two adaptive probabilities
LEVEL_WEIGHTS = (14000, 24000, 44000)  # activity, two adaptive probabilities
SIGN_WEIGHTS = (-690000, -545000, -63000, -800000)  # left, lag 1, above, column
MAX_WEIGHT = 1 << 20


@compiled_ahead
def _learned(weight: int, step: int) -> int:
    weight += step >> 16
    return -MAX_WEIGHT if weight < -MAX_WEIGHT else MAX_WEIGHT if weight > MAX_WEIGHT else weight


@compiled_ahead
def _look_above(
    signed: I8, here: int, row: int, m: int, lag2: int, column: I64, group: I64, mean: int, x0: I32, x1: I32, x2: I32
) -> None:
    """What earlier rows tell of this one: the activity of the column, of its group, and of the elements above."""
    log_mean, half = LOG[mean], mean >> 1
    for first in range(0, m, lag2):
        value = LOG[group[first // lag2] >> 8] - log_mean
        for j in range(first, min(first + lag2, m)):
            x1[j] = value
    above, above2 = signed[here - row - 1 : here - row + m + 1], signed[here - 2 * row : here - 2 * row + m]
    for j in range(m):
        near = 2 * abs(above[j + 1]) + abs(above2[j]) + abs(above[j]) + abs(above[j + 2])
        x0[j] = LOG[column[j] >> 8] - log_mean
        x2[j] = LOG[near * 25 + half] - log_mean


@compiled_ahead
def _correlation(error: I32, x: I32, m: int) -> int:
    total = 0
    for j in range(m):
        total += error[j] * x[j]
    return total >> 8


@compiled_ahead
def _remember(signed: I8, here: int, m: int, lag2: int, rows: int, column: I64, column_sign: I64, group: I64) -> None:
    """Bring the running means up to date with a row."""
    share = RECIPROCAL[rows + 2]
    for j in range(m):
        value = signed[here + j]
        column[j] += ((abs(value) << 16) - column[j]) * share >> 16
        column_sign[j] += ((value << 16) - column_sign[j]) >> 3
    share = RECIPROCAL[rows + 1]
    for first in range(0, m, lag2):
        last = min(first + lag2, m)
        total = 0
        for j in range(first, last):
            total += abs(signed[here + j])
        group[first // lag2] += ((total << 16) // (last - first) - group[first // lag2]) * share >> 16


def _build(decoding: bool) -> Callable[..., int]:
    """Make the coder of one tile: returns the number of words used, or `OUT_OF_SPACE`.

    Its arguments: codes (uint8, in or out); words (int32, 16 bits each, out or in; when decoding the last must be 0);
    room for it to work in, all zeros, as `clipq.archive.coder` measures it; row length; two lags at which neighbours in
    the row lie; pivot; levels; the bits of a level; mean activity in units of 1/256; the step of the zero flag's
    weights; how many bits an adaptive probability remembers.
    """

    @compiled_ahead
    def code_tile(
        codes: U8,
        words: I32,
        signed: I8,  # activity of each element, 0 to 8, with its sign
        room64: I64,
        room32: I32,
        slots: I32,
        row: int,
        lag1: int,
        lag2: int,
        pivot: int,
        levels: int,
        bits: int,
        mean: int,
        rate: int,
        limit: int,
    ) -> int:
        n = codes.size
        low, width, position = 0, START, 0
        if decoding:
            low = words[0] << 32 | words[1] << 16 | words[2]
            position = 3
        shift = bits - 3 if bits > 3 else 0
        pad = signed.size - n - row - 2
        column, column_sign, group = room64[:row], room64[row : 2 * row], room64[2 * row : 3 * row + 1]
        steps, weights = room64[3 * row + 1 : 3 * row + 11], room64[3 * row + 11 : 3 * row + 47]
        x0, x1, x2 = room32[:row], room32[row : 2 * row], room32[2 * row : 3 * row]
        x3, x4, x5 = room32[3 * row : 4 * row], room32[4 * row : 5 * row], room32[5 * row : 6 * row]
        known, error = room32[6 * row : 7 * row], room32[7 * row : 8 * row]
        for j in range(row):
            column[j] = mean << 8
        for j in range(row // lag2 + 1):
            group[j] = mean << 8
        for j in range(slots.size):
            slots[j] = EVEN
        for d in range(1, 9):
            for f in range(3):
                weights[4 * d + f] = LEVEL_WEIGHTS[f]
        z0, z1, z2, z3, z4, z5 = ZERO_WEIGHTS
        g0, g1, g2, g3 = SIGN_WEIGHTS
        log_mean = LOG[mean]
        if row > 2048:
            rate = (rate * 2048 + row - 1) // row

        flags = (NEIGHBOUR_CONTEXTS + ACTIVITY_CONTEXTS) << bits
        dead = seen = live = 0
        for start in range(0, n, row):
            m = row if row < n - start else n - start
            if not decoding and position + 7 * m + 4 > words.size:
                return OUT_OF_SPACE
            seen = 2 * (seen & 1) + dead
            s0 = slots[_u(flags + seen)]
            p1 = probability(STRETCH[_u(s0 >> 19)])
            if decoding:
                dead, low, width, position = decode_bit(low, width, position, words, p1)
            else:
                dead = 1
                for j in range(m):
                    if codes[_u(start + j)] != pivot:
                        dead = 0
                        break
                low, width, position = encode_bit(dead, low, width, position, words, p1)
            slots[_u(flags + seen)] = adapted(s0, dead, limit)
            if dead:
                if decoding:
                    codes[start : start + m] = pivot
                continue
            here = pad + live * row
            _look_above(signed, here, row, m, lag2, column, group, mean, x0, x1, x2)
            for j in range(m):
                known[j] = (x0[j] * z0 + x1[j] * z1 + x2[j] * z2) >> 16

            row_activity = mean << 8
            for j in range(m):
                q = here + j
                left, left2 = signed[_u(q - 1)], signed[_u(q - lag1)]
                left3, up = signed[_u(q - lag2)], signed[_u(q - row)]
                a = LOG[_u(row_activity >> 8)] - log_mean
                activity = known[_u(j)] + (a * z3 >> 16)
                h0 = (
                    27 * NEAR[_u(left + 8)] + 9 * NEAR[_u(left2 + 8)] + 3 * NEAR[_u(up + 8)] + NEAR[_u(left3 + 8)]
                ) << bits
                h1 = (activity >> 6) + 12
                h1 = (NEIGHBOUR_CONTEXTS + (0 if h1 < 0 else 23 if h1 > 23 else h1)) << bits
                s0, s1 = slots[_u(h0)], slots[_u(h1)]
                b, c = STRETCH[_u(s0 >> 19)], STRETCH[_u(s1 >> 19)]
                p1 = probability(activity + ((b * z4 + c * z5) >> 16))
                bound = (width >> 16) * p1
                code = pivot if decoding else pivot + (codes[_u(start + j)] - pivot)
                x3[_u(j)], x4[_u(j)], x5[_u(j)] = a, b, c

                # Two branches and no shared arithmetic: the processor runs ahead on the one that it expects.
                if low >= bound if decoding else code == pivot:
                    low = low - bound if decoding else low + bound
                    width -= bound
                    if width < LEAST:
                        if decoding:
                            low, width, position = shift_in(low, width, position, words)
                        else:
                            low, width, position = shift_out(low, width, position, words)
                    error[_u(j)] = -p1
                    slots[_u(h0)] = adapted(s0, 0, limit)
                    slots[_u(h1)] = adapted(s1, 0, limit)
                    row_activity -= row_activity * RECIPROCAL[_u(j + 8 if j < 242 else 250)] + 65535 >> 16
                else:
                    width = bound
                    if width < LEAST:
                        if decoding:
                            low, width, position = shift_in(low, width, position, words)
                        else:
                            low, width, position = shift_out(low, width, position, words)
                    error[_u(j)] = 65536 - p1
                    slots[_u(h0)] = adapted(s0, 1, limit)
                    slots[_u(h1)] = adapted(s1, 1, limit)
                    y0, y1, y2 = CAPPED[_u(left + 8)], CAPPED[_u(left2 + 8)], CAPPED[_u(up + 8)]
                    y3 = column_sign[_u(j)] >> 12
                    p1 = probability((y0 * g0 + y1 * g1 + y2 * g2 + y3 * g3) >> 16)
                    if decoding:
                        negative, low, width, position = decode_bit(low, width, position, words, p1)
                    else:
                        negative = 1 if code < pivot else 0
                        low, width, position = encode_bit(negative, low, width, position, words, p1)
                    e = ((negative << 16) - p1) * STEP[_u(steps[9])] >> 10
                    steps[9] += 1 if steps[9] < 255 else 0
                    g0 += (y0 * e + 8) >> 4
                    g1 += (y1 * e + 8) >> 4
                    g2 += (y2 * e + 8) >> 4
                    g3 += (y3 * e + 8) >> 4

                    node, level = 1, (pivot - code if negative else code - pivot) - 1
                    for d in range(1, bits + 1):
                        s0, s1 = slots[_u(h0 + node)], slots[_u(h1 + node)]
                        b, c = STRETCH[_u(s0 >> 19)], STRETCH[_u(s1 >> 19)]
                        w0, w1, w2 = weights[_u(4 * d)], weights[_u(4 * d + 1)], weights[_u(4 * d + 2)]
                        p1 = probability((activity * w0 + b * w1 + c * w2) >> 16)
                        if decoding:
                            bit, low, width, position = decode_bit(low, width, position, words, p1)
                        else:
                            bit = level >> (bits - d) & 1
                            low, width, position = encode_bit(bit, low, width, position, words, p1)
                        e = ((bit << 16) - p1) * STEP[_u(steps[_u(d)])] >> 10
                        steps[_u(d)] += 1 if steps[_u(d)] < 255 else 0
                        weights[_u(4 * d)] = w0 + ((activity * e + 8192) >> 14)
                        weights[_u(4 * d + 1)] = w1 + ((b * e + 8192) >> 14)
                        weights[_u(4 * d + 2)] = w2 + ((c * e + 8192) >> 14)
                        slots[_u(h0 + node)] = adapted(s0, bit, limit)
                        slots[_u(h1 + node)] = adapted(s1, bit, limit)
                        node = 2 * node + bit
                    level = node - (1 << bits)
                    size = 1 + (level >> shift)
                    signed[_u(q)] = -size if negative else size
                    row_activity += ((size << 16) - row_activity) * RECIPROCAL[_u(j + 8 if j < 242 else 250)] >> 16
                    if decoding:
                        code = pivot - 1 - level if negative else pivot + 1 + level
                if decoding:
                    codes[_u(start + j)] = 0 if code < 0 else levels - 1 if code >= levels else code

            z0 = _learned(z0, _correlation(error, x0, m) * rate)
            z1 = _learned(z1, _correlation(error, x1, m) * rate)
            z2 = _learned(z2, _correlation(error, x2, m) * rate)
            z3 = _learned(z3, _correlation(error, x3, m) * rate)
            z4 = _learned(z4, _correlation(error, x4, m) * rate)
            z5 = _learned(z5, _correlation(error, x5, m) * rate)
            _remember(signed, here, m, lag2, live if live < 60 else 60, column, column_sign, group)
            live += 1

        if not decoding:
            position = finish(low, width, position, words)
        return position

    return code_tile


encode_tile = _build(decoding=False)
decode_tile = _build(decoding=True)
