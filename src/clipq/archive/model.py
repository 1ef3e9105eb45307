"""The model of a tensor of codes: which bit is likely where."""

from __future__ import annotations

import numpy as np
from numba import njit, types

from clipq.archive.rangecoder import (
    ONE,
    U8,
    decode_bit,
    encode_bit,
    finish_encoder,
    start_decoder,
    start_encoder,
)

_READONLY = types.Array(types.uint8, 1, "C", readonly=True)
N_ZERO, N_SIGN, N_LEVEL = 27, 9, 3 * 256


@njit(nogil=True, inline="always")
def _adapt(p: np.ndarray, i: int, bit: int) -> None:
    if bit:
        p[i] += (ONE - 32 - p[i]) >> 5
    else:
        p[i] -= (p[i] - 32) >> 5


@njit(nogil=True, inline="always")
def _context(left: int, left2: int, up: int) -> int:
    return min(abs(left), 2) * 9 + min(abs(left2), 2) * 3 + min(abs(up), 2)


@njit(types.int64(_READONLY, types.int64, types.int64, types.int64, types.uint8[::1]), nogil=True, cache=True)
def encode_codes(codes: U8, row: int, pivot: int, levels: int, out: U8) -> int:
    """Encode codes, ``row`` a row, into ``out``; the number of bytes used."""
    state = np.zeros(3, np.int64)
    start_encoder(state)
    p = np.full(N_ZERO + N_SIGN + N_LEVEL, ONE // 2, np.int64)
    for i in range(codes.size):
        left = codes[i - 1] - pivot if i >= 1 else 0
        left2 = codes[i - 2] - pivot if i >= 2 else 0
        up = codes[i - row] - pivot if i >= row else 0
        value = codes[i] - pivot
        context = _context(left, left2, up)
        encode_bit(state, out, int(value != 0), p[context])
        _adapt(p, context, int(value != 0))
        if value != 0:
            s = N_ZERO + (0 if left == 0 else 1 if left < 0 else 2) * 3 + (0 if up == 0 else 1 if up < 0 else 2)
            encode_bit(state, out, int(value < 0), p[s])
            _adapt(p, s, int(value < 0))
            rest = abs(value) - 1
            base = N_ZERO + N_SIGN + 256 * min(2, (abs(left) + abs(up)) >> 1)
            node = 1
            for shift in range(7, -1, -1):
                bit = (rest >> shift) & 1
                encode_bit(state, out, bit, p[base + node])
                _adapt(p, base + node, bit)
                node = node * 2 + bit
    return finish_encoder(state, out)


@njit(types.void(_READONLY, types.int64, types.int64, types.int64, types.uint8[::1]), nogil=True, cache=True)
def decode_codes(data: U8, row: int, pivot: int, levels: int, codes: U8) -> None:
    """Decode as many codes as there is room for; never one above ``levels - 1``."""
    state = np.zeros(3, np.int64)
    start_decoder(state, data)
    p = np.full(N_ZERO + N_SIGN + N_LEVEL, ONE // 2, np.int64)
    for i in range(codes.size):
        left = codes[i - 1] - pivot if i >= 1 else 0
        left2 = codes[i - 2] - pivot if i >= 2 else 0
        up = codes[i - row] - pivot if i >= row else 0
        context = _context(left, left2, up)
        bit = decode_bit(state, data, p[context])
        _adapt(p, context, bit)
        value = 0
        if bit:
            s = N_ZERO + (0 if left == 0 else 1 if left < 0 else 2) * 3 + (0 if up == 0 else 1 if up < 0 else 2)
            negative = decode_bit(state, data, p[s])
            _adapt(p, s, negative)
            base = N_ZERO + N_SIGN + 256 * min(2, (abs(left) + abs(up)) >> 1)
            node = 1
            for _ in range(8):
                bit = decode_bit(state, data, p[base + node])
                _adapt(p, base + node, bit)
                node = node * 2 + bit
            value = node - 255
            value = -value if negative else value
        codes[i] = min(max(pivot + value, 0), levels - 1)
