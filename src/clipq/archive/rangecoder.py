"""The range coder, and the adaptive probabilities that both models are made of.

Source: docs/format.md, "Range coder". Encoder and decoder keep their state in local variables of the kernels, so
these functions take it and give it back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from clipq.archive.tables import ADAPT, SQUASH
from clipq.jit import compiled_ahead

I32 = npt.NDArray[np.int32]

# An index of this type spares the look at whether it is negative. To the type checker it is a plain integer.
as_index: Any = np.uint64
LEAST = 1 << 32
START = (1 << 48) - 1
EVEN = 1 << 30  # an adaptive probability of a half that saw no bit yet: 23 bits of probability, 8 of count


@compiled_ahead
def adapted(slot: int, bit: int, limit: int) -> int:
    """An adaptive probability after it saw a bit."""
    count, p = slot & 255, slot >> 8
    share: int = ADAPT[as_index(count)]
    p += (((bit << 23) - (bit << 3) - p) * share) >> 16
    return p << 8 | (count + 1 if count < limit else limit)


@compiled_ahead
def shift_in(low: int, width: int, position: int, words: I32) -> tuple[int, int, int]:
    """Take the next word of the coded data."""
    return low << 16 | words[as_index(position)], width << 16, position + (1 if position + 1 < words.size else 0)


@compiled_ahead
def shift_out(low: int, width: int, position: int, words: I32) -> tuple[int, int, int]:
    """Give away the word that is settled but for a carry, up to 17 bits: carries are added at the end."""
    words[as_index(position)] = low >> 32
    return (low & (LEAST - 1)) << 16, width << 16, position + 1


@compiled_ahead
def decode_bit(low: int, width: int, position: int, words: I32, p1: int) -> tuple[int, int, int, int]:
    bound = (width >> 16) * p1
    bit = 1 if low < bound else 0
    low = low if bit else low - bound
    width = bound if bit else width - bound
    if width < LEAST:
        low, width, position = shift_in(low, width, position, words)
    return bit, low, width, position


@compiled_ahead
def encode_bit(bit: int, low: int, width: int, position: int, words: I32, p1: int) -> tuple[int, int, int]:
    bound = (width >> 16) * p1
    low = low if bit else low + bound
    width = bound if bit else width - bound
    if width < LEAST:
        low, width, position = shift_out(low, width, position, words)
    return low, width, position


@compiled_ahead
def probability(logit: int) -> int:
    p: int = SQUASH[as_index(2048 + (-2047 if logit < -2047 else 2047 if logit > 2047 else logit))]
    return p


@compiled_ahead
def finish(low: int, width: int, position: int, words: I32) -> int:
    """Give away what is left: the number in the interval with the most zeros at its end, as those are not stored."""
    top = low + width - 1
    for zeros in range(48, -1, -8):
        if top >> zeros << zeros >= low:
            low = top >> zeros << zeros
            break
    words[position], words[position + 1], words[position + 2] = low >> 32, low >> 16 & 65535, low & 65535
    position += 3
    carry = 0
    for i in range(position - 1, -1, -1):
        total = words[i] + carry
        words[i], carry = total & 65535, total >> 16
    return position
