"""Tensors of few distinct values: a codebook, and for each element an index into it.

Source: docs/format.md, "Code tensors".
"""

from __future__ import annotations

import itertools
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from clipq.archive import dtypes
from clipq.archive.wire import Cursor, Sink

MAX_LEVELS = 256
_CHUNK = 2**18
_SAMPLE = 2**12
_USUAL, _ESCAPE = 12, 5  # of the lengths of a codebook's distances: the first is compared to the width less 12

U8 = npt.NDArray[np.uint8]
Bits = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Codebook:
    """The distinct values of a tensor.

    Attributes:
        bits: their bit patterns, ascending by value; unsigned, 1-D, 1 to 256 of them.
        pivot: the index of the value that the others are counted from: zero, or else the commonest.
    """

    bits: Bits
    pivot: int


def find_codes(bits: Bits, dtype_code: int, pool: Executor) -> tuple[Codebook, U8] | None:
    """The codebook of a tensor and the index of each element, or None if it has too many distinct values.

    Args:
        bits: the elements' bit patterns, 1-D, not empty.
        dtype_code: the format's number of their type.
        pool: looks through parts of the tensor at once.
    """
    chunks = [bits[start : start + _CHUNK] for start in range(0, bits.size, _CHUNK)]
    known = np.unique(bits[:: -(-bits.size // _SAMPLE)])
    while len(known) <= MAX_LEVELS:
        ranks = np.empty(len(known), np.uint8)
        order = np.argsort(dtypes.order_key(known, dtype_code))
        ranks[order] = np.arange(len(order))
        at_once = pool.map if len(chunks) > 1 else map
        parts, unknown = zip(*at_once(partial(_look_up, known, ranks), chunks), strict=True)
        if not any(len(values) for values in unknown):
            codes = np.concatenate(parts)
            zeros = np.flatnonzero(known[order] == 0)
            pivot = zeros[0] if len(zeros) else np.bincount(codes).argmax()
            return Codebook(known[order], int(pivot)), codes
        known = np.unique(np.concatenate([known, *unknown]))
    return None


def _look_up(known: Bits, ranks: U8, values: Bits) -> tuple[U8, Bits]:
    """The rank of each value among the known ones, which ascend; and the values that are not among them."""
    nearest = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return ranks[nearest], np.unique(values[known[nearest] != values])


def encode_codebook(sink: Sink, codebook: Codebook, dtype_code: int) -> None:
    """Write a codebook: the first value as it is, of the others the distance in order from the one before; no zero.

    The distances are written as bit strings: the number of bits after the first one, by how far it is from the last
    such number, then these bits.
    """
    itemsize = codebook.bits.dtype.itemsize
    keys = [int(key) for key in dtypes.order_key(codebook.bits, dtype_code)]
    field = _length_field(itemsize)
    sink.byte(len(keys) - 1)
    sink.byte(codebook.pivot)
    string = n = 1
    if codebook.bits[codebook.pivot] == 0:
        del keys[codebook.pivot]
    else:
        string = 0
    if keys:
        string, n = string << 8 * itemsize | keys[0], n + 8 * itemsize
    last = 8 * itemsize - _USUAL
    for before, key in itertools.pairwise(keys):
        distance = key - before
        length = distance.bit_length() - 1
        change = 2 * abs(length - last) - (length < last)
        if change < _ESCAPE:
            string, n, last = string << (change + 1) | 1, n + change + 1, length
        else:
            string, n = string << (_ESCAPE + field) | length, n + _ESCAPE + field
        string, n = string << length | (distance - (1 << length)), n + length
    n_bytes = -(-n // 8)
    sink.raw((string << (8 * n_bytes - n)).to_bytes(n_bytes, "big"))


def decode_codebook(cursor: Cursor, dtype_code: int) -> Codebook:
    """Read a codebook.

    Raises:
        DamagedFileError: it ends too soon, or a value is beyond the type's last one.
    """
    levels, pivot = cursor.byte() + 1, cursor.byte()
    if pivot >= levels:
        raise cursor.damaged(f"the pivot is level {pivot} of {levels}")
    width = 8 * dtypes.BY_CODE[dtype_code][1].itemsize
    field = _length_field(width // 8)
    string = n = 0

    def take(bits: int) -> int:
        nonlocal string, n
        if n < bits:
            more = -(-(bits - n) // 8)
            string, n = string << 8 * more | int.from_bytes(cursor.raw(more), "big"), n + 8 * more
        n -= bits
        value, string = string >> n, string & ((1 << n) - 1)
        return value

    zero = take(1)
    keys = [take(width)] if levels > zero else []
    last = width - _USUAL
    for _ in range(levels - zero - 1):
        change = 0
        while change < _ESCAPE and not take(1):
            change += 1
        if change == _ESCAPE:
            length = take(field)
        else:
            length = last = last + (-(change // 2 + 1) if change % 2 else change // 2)
        if not 0 <= length < width:
            raise cursor.damaged("a distance in the codebook is longer than its type")
        keys.append(keys[-1] + (1 << length | take(length)))
    if zero:
        keys.insert(pivot, int(dtypes.order_key(np.zeros(1, f"<u{width // 8}"), dtype_code)[0]))
    if keys[-1] >> width or any(key >= after for key, after in itertools.pairwise(keys)):
        raise cursor.damaged("a codebook's values do not fit its type, or do not ascend")
    return Codebook(dtypes.bits_from_key(np.array(keys, f"<u{width // 8}"), dtype_code), pivot)


def _length_field(itemsize: int) -> int:
    return (8 * itemsize).bit_length() - 1
