"""Tensors of few distinct values: a codebook, and for each element an index into it.

Source: docs/format.md, "Code tensors". A tensor is cut into tiles of whole rows; each tile is one block that
is coded alone, so tiles are encoded and decoded in parallel and read one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipq.archive import dtypes
from clipq.archive.model import decode_codes, encode_codes
from clipq.archive.wire import Cursor, Sink

MAX_LEVELS = 256
TILE_ELEMENTS = 2**20

_LOOKUP = 2**14  # elements at a time: NumPy widens the indices to 64 bits

U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Codebook:
    """The distinct values of a tensor.

    Attributes:
        bits: their bit patterns, ascending by value; unsigned, 1-D, 1 to 256 of them.
        pivot: the index of the value that the others are counted from: zero, or else the commonest.
    """

    bits: npt.NDArray[np.unsignedinteger]
    pivot: int


def find_codes(bits: npt.NDArray[np.unsignedinteger], dtype_code: int) -> tuple[Codebook, U8] | None:
    """The codebook of a tensor and the index of each element, or None if it has too many distinct values.

    Args:
        bits: the elements' bit patterns, 1-D.
        dtype_code: the format's number of their type.
    """
    if bits.size == 0 or len(np.unique(bits[: 2**14])) > MAX_LEVELS:
        return None
    patterns, codes, counts = np.unique(bits, return_inverse=True, return_counts=True)
    if len(patterns) > MAX_LEVELS:
        return None
    order = np.argsort(dtypes.order_key(patterns, dtype_code))
    rank = np.empty(len(order), np.uint8)
    rank[order] = np.arange(len(order))
    patterns, counts = patterns[order], counts[order]
    zeros = np.flatnonzero(patterns == 0)
    pivot = int(zeros[0]) if len(zeros) else int(counts.argmax())
    return Codebook(patterns, pivot), rank[codes]


def tiles(shape: tuple[int, ...]) -> list[slice]:
    """How a tensor's elements, in row-major order, are cut into tiles: whole rows, up to `TILE_ELEMENTS`."""
    n, row = math.prod(shape), row_length(shape)
    step = TILE_ELEMENTS // row * row
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def tile_count(shape: tuple[int, ...]) -> int:
    """How many tiles a tensor has."""
    row = row_length(shape)
    return -(-math.prod(shape) // (TILE_ELEMENTS // row * row))


def row_length(shape: tuple[int, ...]) -> int:
    """Elements in a row: all dimensions but the first; of 1-D tensors all. Never above a tile's."""
    return min(max(math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape), 1), TILE_ELEMENTS)


def encode_tile(codebook: Codebook, codes: U8, shape: tuple[int, ...], first: bool, effort: str) -> bytes:
    """The payload of one tile; the first one of a tensor carries the codebook."""
    sink = Sink()
    if first:
        sink.byte(len(codebook.bits) - 1)
        sink.byte(codebook.pivot)
        sink.raw(codebook.bits.tobytes())
    if len(codebook.bits) > 1:
        out = np.empty(3 * codes.size + 64, np.uint8)
        n = encode_codes(codes, row_length(shape), codebook.pivot, len(codebook.bits), out)
        sink.raw(out[:n].tobytes())
    return bytes(sink.data)


def decode_codebook(payload: memoryview, itemsize: int, what: str) -> tuple[Codebook, int]:
    """The codebook in a tensor's first tile, and the bytes it takes there."""
    cursor = Cursor(payload, what)
    levels, pivot = cursor.byte() + 1, cursor.byte()
    if pivot >= levels:
        raise cursor.damaged(f"the pivot is level {pivot} of {levels}")
    bits = np.frombuffer(cursor.raw(levels * itemsize), f"<u{itemsize}")
    return Codebook(bits, pivot), cursor.position


def decode_tile(
    codebook: Codebook, data: memoryview, shape: tuple[int, ...], out: npt.NDArray[np.unsignedinteger], what: str
) -> None:
    """Decode one tile's elements, as bit patterns, into ``out``; ``data`` is its payload behind any codebook."""
    if len(codebook.bits) == 1:
        Cursor(data, what).end()
        out[:] = codebook.bits[0]
        return
    codes = np.empty(out.size, np.uint8)
    decode_codes(np.frombuffer(data, np.uint8), row_length(shape), codebook.pivot, len(codebook.bits), codes)
    for start in range(0, out.size, _LOOKUP):
        part = slice(start, start + _LOOKUP)
        np.take(codebook.bits, codes[part], out=out[part], mode="clip")
