"""The signs and exponents of small float tensors, coded one after another; what is left of each is noise.

Source: docs/format.md, "Float blocks". Encoder and decoder are one function, made twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from clipq.archive.rangecoder import EVEN, I32, START, adapted, decode_bit, encode_bit, finish, probability
from clipq.archive.rangecoder import as_index as _u
from clipq.archive.tables import STEP, STRETCH
from clipq.jit import compiled_ahead

U16 = npt.NDArray[np.uint16]
I64 = npt.NDArray[np.int64]

SIGN_LIMIT, EXPONENT_LIMIT = 20, 60


def _build(decoding: bool) -> Callable[..., int]:
    """Make the coder of a block: returns the number of words used.

    Its arguments: for each element the sign in bit 8 and the exponent's top byte below (in or out); the number of
    elements of each tensor; words (int32, 16 bits each, out or in; when decoding the last must be 0); room for it to
    work in, all zeros.
    """

    @compiled_ahead
    def code_floats(tops: U16, counts: I64, words: I32, slots: I32, room64: I64) -> int:
        low, width, position = 0, START, 0
        if decoding:
            low = words[0] << 32 | words[1] << 16 | words[2]
            position = 3
        slots[:] = EVEN
        signs = slots[512:]
        weights, steps = room64[:16], room64[16:]
        weights[:] = 32768
        seen = tensor = 0
        left = counts[0]
        for i in range(tops.size):
            while left == 0:
                tensor += 1
                left = counts[tensor]
                slots[256:512] = EVEN
            left -= 1
            top: Any = np.int64(tops[_u(i)])
            s0 = signs[_u(seen)]
            p1 = probability(STRETCH[_u(s0 >> 19)])
            if decoding:
                sign, low, width, position = decode_bit(low, width, position, words, p1)
            else:
                sign = top >> 8
                low, width, position = encode_bit(sign, low, width, position, words, p1)
            signs[_u(seen)] = adapted(s0, sign, SIGN_LIMIT)
            seen = 2 * (seen & 1) + sign
            node = 1
            for d in range(8):
                s0, s1 = slots[_u(node)], slots[_u(256 + node)]
                a, b = STRETCH[_u(s0 >> 19)], STRETCH[_u(s1 >> 19)]
                w0, w1 = weights[_u(2 * d)], weights[_u(2 * d + 1)]
                p1 = probability((a * w0 + b * w1) >> 16)
                if decoding:
                    bit, low, width, position = decode_bit(low, width, position, words, p1)
                else:
                    bit = top >> (7 - d) & 1
                    low, width, position = encode_bit(bit, low, width, position, words, p1)
                e = ((bit << 16) - p1) * STEP[_u(steps[_u(d)])] >> 10
                steps[_u(d)] += 1 if steps[_u(d)] < 255 else 0
                weights[_u(2 * d)] = w0 + ((a * e + 8192) >> 14)
                weights[_u(2 * d + 1)] = w1 + ((b * e + 8192) >> 14)
                slots[_u(node)] = adapted(s0, bit, EXPONENT_LIMIT)
                slots[_u(256 + node)] = adapted(s1, bit, EXPONENT_LIMIT)
                node = 2 * node + bit
            if decoding:
                tops[_u(i)] = sign << 8 | node & 255
        return finish(low, width, position, words) if not decoding else position

    return code_floats


encode_floats = _build(decoding=False)
decode_floats = _build(decoding=True)
