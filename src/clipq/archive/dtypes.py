"""The element types a file can hold, and how they look in NumPy.

Source: docs/format.md, "Element types". The numbers are part of the format and never change.
"""

from __future__ import annotations

from types import MappingProxyType

import ml_dtypes
import numpy as np
import numpy.typing as npt

from clipq.errors import ArchiveError

BY_CODE: MappingProxyType[int, tuple[str, np.dtype[np.generic]]] = MappingProxyType(
    {
        0: ("bool", np.dtype(np.bool_)),
        1: ("uint8", np.dtype(np.uint8)),
        2: ("int8", np.dtype(np.int8)),
        3: ("uint16", np.dtype("<u2")),
        4: ("int16", np.dtype("<i2")),
        5: ("uint32", np.dtype("<u4")),
        6: ("int32", np.dtype("<i4")),
        7: ("uint64", np.dtype("<u8")),
        8: ("int64", np.dtype("<i8")),
        9: ("float16", np.dtype("<f2")),
        10: ("bfloat16", np.dtype(ml_dtypes.bfloat16)),
        11: ("float32", np.dtype("<f4")),
        12: ("float64", np.dtype("<f8")),
        13: ("complex32", np.dtype([("real", "<f2"), ("imag", "<f2")])),  # NumPy has no such type
        14: ("complex64", np.dtype("<c8")),
        15: ("complex128", np.dtype("<c16")),
        16: ("float8_e4m3fn", np.dtype(ml_dtypes.float8_e4m3fn)),
        17: ("float8_e5m2", np.dtype(ml_dtypes.float8_e5m2)),
        18: ("float8_e4m3fnuz", np.dtype(ml_dtypes.float8_e4m3fnuz)),
        19: ("float8_e5m2fnuz", np.dtype(ml_dtypes.float8_e5m2fnuz)),
        20: ("float8_e8m0fnu", np.dtype(ml_dtypes.float8_e8m0fnu)),
        21: ("float4_e2m1fn_x2", np.dtype([("two", "u1")])),  # two values a byte
    }
)
BY_NAME: MappingProxyType[str, tuple[int, np.dtype[np.generic]]] = MappingProxyType(
    {name: (code, dtype) for code, (name, dtype) in BY_CODE.items()}
)
_CODE_OF_DTYPE = {dtype: code for code, (_, dtype) in BY_CODE.items()}

_SIGNED = frozenset({2, 4, 6, 8})
_FLOATING = frozenset({9, 10, 11, 12, 16, 17, 18, 19})


def code_of(array: npt.NDArray[np.generic], name: str) -> int:
    """The format's number for the element type of an array.

    Raises:
        ArchiveError: the file format has no such type.
    """
    code = _CODE_OF_DTYPE.get(array.dtype.newbyteorder("<"))
    if code is None:
        accepted = ", ".join(known for known, _ in BY_CODE.values())
        raise ArchiveError(f"{name}: elements of type {array.dtype} cannot be stored; accepted are {accepted}")
    return code


def bits_dtype(dtype: np.dtype[np.generic]) -> np.dtype[np.unsignedinteger]:
    """The unsigned type as wide as ``dtype``, for types of up to 8 bytes."""
    return np.dtype(f"<u{dtype.itemsize}")


def order_key(bits: npt.NDArray[np.unsignedinteger], code: int) -> npt.NDArray[np.unsignedinteger]:
    """Bit patterns as unsigned numbers that ascend as the values do (for floats, IEEE 754's total order)."""
    top = bits.dtype.type(1 << (8 * bits.dtype.itemsize - 1))
    if code in _FLOATING:
        return np.where(bits & top, ~bits, bits | top)
    return bits ^ top if code in _SIGNED else bits


def bits_from_key(keys: npt.NDArray[np.unsignedinteger], code: int) -> npt.NDArray[np.unsignedinteger]:
    """The inverse of `order_key`."""
    top = keys.dtype.type(1 << (8 * keys.dtype.itemsize - 1))
    if code in _FLOATING:
        return np.where(keys & top, keys ^ top, ~keys)
    return keys ^ top if code in _SIGNED else keys
