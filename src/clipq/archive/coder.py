"""The kernels that code tiles and floats, and the room that they work in.

What they do is in `clipq.archive.model` and `clipq.archive.floats`, of which they are compiled.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from clipq.archive.tables import ACTIVITY_CONTEXTS, NEIGHBOUR_CONTEXTS

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p
_ARRAY = (_POINTER, _POINTER, _NUMBER, _NUMBER, _POINTER, _NUMBER, _NUMBER)
_ONE_AT_A_TIME = threading.Lock()


class _Kernel:
    """A compiled function of arrays and numbers that gives a number. Other threads run while it does.

    Args:
        name: of its file, without ``.ll``.
        arrays: the types of its arrays, which are 1-D and contiguous; they come first.
        numbers: how many numbers follow.
    """

    def __init__(self, name: str, arrays: tuple[npt.DTypeLike, ...], numbers: int = 0) -> None:
        self._name, self._arrays = name, tuple(np.dtype(kind) for kind in arrays)
        self._prototype = ctypes.CFUNCTYPE(
            ctypes.c_int32, _POINTER, _POINTER, *_ARRAY * len(arrays), *[_NUMBER] * numbers
        )

    def __call__(self, *arguments: Any) -> int:
        result, error = _NUMBER(), _POINTER()
        passed: list[Any] = [ctypes.byref(result), ctypes.byref(error)]
        arrays, numbers = arguments[: len(self._arrays)], arguments[len(self._arrays) :]
        for array, dtype in zip(arrays, self._arrays, strict=True):
            if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
                raise TypeError(
                    f"{self._name} takes contiguous 1-D arrays of {dtype}, not {array.ndim}-D {array.dtype}"
                )
            passed += [None, None, array.size, array.itemsize, array.ctypes.data, array.size, array.itemsize]
        status = self._function(*passed, *numbers)
        assert status == 0, f"{self._name} ended with status {status}"
        return result.value

    @functools.cached_property
    def _function(self) -> Callable[..., int]:
        from clipq.archive import native  # imports LLVM, which takes a while

        with _ONE_AT_A_TIME:
            return self._prototype(native.address(self._name))


WORDS_PER_ELEMENT = 7  # of floats, at most: nine bits, each of them at most 11 bits of data
_OF_TILE = (np.uint8, np.int32, np.int8, np.int64, np.int32, np.int32)
_OF_FLOATS = (np.uint16, np.int64, np.int32, np.int32, np.int64)
_encode_tile, _decode_tile = _Kernel("encode_tile", _OF_TILE, 9), _Kernel("decode_tile", _OF_TILE, 9)
_encode_floats, _decode_floats = _Kernel("encode_floats", _OF_FLOATS), _Kernel("decode_floats", _OF_FLOATS)


def code_tile(
    decoding: bool,
    codes: U8,
    words: I32,
    row: int,
    lag1: int,
    lag2: int,
    pivot: int,
    levels: int,
    mean: int,
    rate: int,
    limit: int,
) -> int:
    """Code one tile.

    Args:
        decoding: codes come from words, and not words from codes.
        codes: 1-D.
        words: 16 bits each; when decoding the last must be 0.
        row: elements in a row.
        lag1, lag2: at which distances neighbours in the row lie.
        pivot, levels: of the codebook.
        mean: mean activity in units of 1/256.
        rate: the step of the zero flag's weights.
        limit: how many bits an adaptive probability remembers.

    Returns:
        The number of words used, or `clipq.archive.tables.OUT_OF_SPACE`.
    """
    bits = (max(pivot, levels - 1 - pivot) - 1).bit_length()
    signed = np.zeros(max(2 * row + 2, lag1, lag2) + codes.size + row + 2, np.int8)
    room64, room32 = np.zeros(3 * row + 47, np.int64), np.zeros(8 * row, np.int32)
    slots = np.zeros((NEIGHBOUR_CONTEXTS + ACTIVITY_CONTEXTS << bits) + 4, np.int32)
    kernel = _decode_tile if decoding else _encode_tile
    return kernel(codes, words, signed, room64, room32, slots, row, lag1, lag2, pivot, levels, bits, mean, rate, limit)


def code_floats(decoding: bool, tops: U16, counts: I64, words: I32) -> int:
    """Code the signs and exponents of a block of floats.

    Args:
        decoding: tops come from words, and not words from tops.
        tops: of each element the sign in bit 8 and the exponent's top byte below.
        counts: elements of each tensor.
        words: 16 bits each; when decoding the last must be 0.

    Returns:
        The number of words used.
    """
    kernel = _decode_floats if decoding else _encode_floats
    return kernel(tops, counts, words, np.zeros(516, np.int32), np.zeros(24, np.int64))
