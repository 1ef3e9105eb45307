"""A binary range coder: adaptive bits in, bytes out, and back.

Source: docs/format.md, "Range coder". All arithmetic is on non-negative 64-bit integers, so every machine
writes the same bytes. The state is a small integer array, to be passed along by reference:

    state[LOW], state[RANGE]   the interval (encoder), or its offset from the code and its width (decoder)
    state[POSITION]            the next byte of the buffer

The range lies in [2**32, 2**48) between bits; 16 bits leave, or enter, at a time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

LOW, RANGE, POSITION = 0, 1, 2
ONE = 1 << 16  # probabilities are in units of 1 / ONE
_FULL = 1 << 48
_LEAST = 1 << 32

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]


@njit(nogil=True, inline="always")
def start_encoder(state: I64) -> None:
    state[LOW], state[RANGE], state[POSITION] = 0, _FULL - 1, 0


@njit(nogil=True, inline="always")
def encode_bit(state: I64, out: U8, bit: int, p1: int) -> None:
    """Write a bit that is 1 with probability ``p1 / ONE``; p1 in [16, ONE - 16]."""
    bound = (state[RANGE] >> 16) * p1
    if bit:
        state[RANGE] = bound
    else:
        state[LOW] += bound
        state[RANGE] -= bound
    while state[RANGE] < _LEAST:
        _shift(state, out)


@njit(nogil=True)
def _shift(state: I64, out: U8) -> None:
    """Move the top 16 bits of ``low`` to the buffer, a carry first."""
    low, position = state[LOW], state[POSITION]
    if low >= _FULL:
        low -= _FULL
        i = position - 1
        while out[i] == 255:
            out[i] = 0
            i -= 1
        out[i] += 1
    out[position] = low >> 40
    out[position + 1] = (low >> 32) & 255
    state[LOW] = (low & (_LEAST - 1)) << 16
    state[RANGE] <<= 16
    state[POSITION] = position + 2


@njit(nogil=True)
def finish_encoder(state: I64, out: U8) -> int:
    """Write the fewest bytes that name the interval; the number of bytes in the buffer."""
    top = state[LOW] + state[RANGE] - 1
    for zeros in range(48, -1, -8):  # as many zero bytes at the end as fit: the decoder reads them for free
        candidate = (top >> zeros) << zeros
        if candidate >= state[LOW]:
            state[LOW] = candidate
            break
    state[RANGE] = 1
    for _ in range(3):
        _shift(state, out)
    n = int(state[POSITION])
    while n > 0 and out[n - 1] == 0:
        n -= 1
    return n


@njit(nogil=True, inline="always")
def start_decoder(state: I64, data: U8) -> None:
    code = 0
    for i in range(6):
        code = code << 8 | (data[i] if i < data.size else 0)
    state[LOW], state[RANGE], state[POSITION] = code, _FULL - 1, 6


@njit(nogil=True, inline="always")
def decode_bit(state: I64, data: U8, p1: int) -> int:
    """Read a bit; behind its end the data reads as zeros."""
    bound = (state[RANGE] >> 16) * p1
    if state[LOW] < bound:
        state[RANGE] = bound
        bit = 1
    else:
        state[LOW] -= bound
        state[RANGE] -= bound
        bit = 0
    while state[RANGE] < _LEAST:
        position = state[POSITION]
        high = data[position] if position < data.size else 0
        low = data[position + 1] if position + 1 < data.size else 0
        state[LOW] = state[LOW] << 16 | high << 8 | low
        state[RANGE] <<= 16
        state[POSITION] = position + 2
    return bit
