"""Tensors that are not quantized: exact, as planes of bytes.

Source: docs/format.md, "Raw blocks" and "Float blocks". The bytes of the elements are sorted by significance, because
the top bytes of weights are alike and the low ones are noise; each plane is packed if that makes it smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import zstandard

from clipq.archive import dtypes
from clipq.archive.coder import WORDS_PER_ELEMENT, code_floats
from clipq.archive.wire import Cursor, Sink

U8 = npt.NDArray[np.uint8]

RAW_BLOCK_BYTES = 2**20
_MANTISSA_BITS = {9: 7, 10: 7, 11: 23, 12: 55}  # of the types whose top bits are coded: all but the top nine bits
_LEVEL = {"default": 9, "max": 19}


def block_step(itemsize: int) -> int:
    """How many bytes of a large raw tensor one block holds: whole elements."""
    return RAW_BLOCK_BYTES // itemsize * itemsize


def encode_raw(data: U8, itemsize: int, effort: str) -> bytes:
    """The payload of one block.

    Args:
        data: the elements' bytes, little-endian, 1-D.
        itemsize: bytes of an element.
        effort: "default" or "max".
    """
    sink = Sink()
    planes = []
    for plane in data.reshape(-1, itemsize).T:
        plain = plane.tobytes()
        packed = zstandard.ZstdCompressor(level=_LEVEL[effort], write_content_size=False).compress(plain)
        smaller = len(packed) < len(plain)
        sink.varint(len(packed) if smaller else 0)
        planes.append(packed if smaller else plain)
    return bytes(sink.data) + b"".join(planes)


def decode_raw(payload: memoryview, out: U8, itemsize: int, what: str) -> None:
    """Fill ``out``, 1-D, with the elements' bytes.

    Raises:
        DamagedFileError: the payload does not hold that many elements.
    """
    cursor = Cursor(payload, what)
    planes = out.reshape(-1, itemsize)
    elements = len(planes)
    for i, size in enumerate([cursor.varint(cursor.left) for _ in range(itemsize)]):
        stored: memoryview | bytes = cursor.raw(size or elements)
        if size:
            try:
                # A size given in the frame is what the library would allocate, whatever it is told.
                if not elements or zstandard.frame_content_size(stored) != -1:
                    raise cursor.damaged("a packed plane is empty, or gives its own size")
                unpacker = zstandard.ZstdDecompressor()
                stored = unpacker.decompress(stored, max_output_size=elements, allow_extra_data=False)
            except zstandard.ZstdError as error:
                raise cursor.damaged("a plane of bytes cannot be unpacked") from error
            if len(stored) != elements:
                raise cursor.damaged(f"a plane has {len(stored)} bytes in place of {elements}")
        planes[:, i] = np.frombuffer(stored, np.uint8)
    cursor.end()


def encode_group(data: U8, counts: Sequence[int], dtype_code: int, effort: str) -> bytes:
    """The payload of a block with several tensors: planes, or for floats coded signs and exponents if that is smaller.

    Args:
        data: the elements' bytes, little-endian, 1-D.
        counts: elements of each tensor.
        dtype_code: the format's number of their type.
        effort: "default" or "max".
    """
    itemsize = dtypes.BY_CODE[dtype_code][1].itemsize
    planes = encode_raw(data, itemsize, effort)
    if dtype_code not in _MANTISSA_BITS or not data.size:
        return planes
    rest = _MANTISSA_BITS[dtype_code]
    bits = data.view(f"<u{itemsize}")
    words = np.zeros(WORDS_PER_ELEMENT * bits.size + 8, np.int32)
    n = code_floats(False, (bits >> rest).astype(np.uint16), np.array(counts, np.int64), words)
    coded = words[:n].astype(">u2").tobytes().rstrip(b"\0")
    kept = rest
    while kept and not (bits & ((1 << (rest - kept + 1)) - 1)).any():
        kept -= 1
    string = np.unpackbits(bits.byteswap().view(np.uint8).reshape(-1, itemsize), axis=1)[:, 9 : 9 + kept]
    sink = Sink()
    sink.byte(kept + 1)
    sink.varint(len(coded))
    sink.raw(coded)
    sink.raw(np.packbits(string).tobytes())
    return bytes(sink.data) if len(sink.data) < len(planes) + 1 else b"\0" + planes


def decode_group(payload: memoryview, out: U8, counts: Sequence[int], dtype_code: int, what: str) -> None:
    """Fill ``out``, 1-D, with the bytes of several tensors' elements.

    Raises:
        DamagedFileError: the payload does not hold that many elements.
    """
    itemsize = dtypes.BY_CODE[dtype_code][1].itemsize
    if dtype_code not in _MANTISSA_BITS or not out.size:
        decode_raw(payload, out, itemsize, what)
        return
    cursor, rest = Cursor(payload, what), _MANTISSA_BITS[dtype_code]
    kept = cursor.byte() - 1
    if kept < 0:
        decode_raw(payload[1:], out, itemsize, what)
        return
    if kept > rest:
        raise cursor.damaged(f"{kept} bits of mantissa are kept of {rest}")
    bits = out.view(f"<u{itemsize}")
    data = bytes(cursor.raw(cursor.varint(cursor.left)))
    string = cursor.raw(-(-bits.size * kept // 8))
    cursor.end()
    words = np.zeros(len(data) // 2 + 4, np.int32)
    words[: -(-len(data) // 2)] = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2")
    tops = np.empty(bits.size, np.uint16)
    code_floats(True, tops, np.array(counts, np.int64), words)
    mantissas = np.zeros((bits.size, 8 * itemsize), np.uint8)
    found = np.unpackbits(np.frombuffer(string, np.uint8), count=bits.size * kept)
    mantissas[:, 9 : 9 + kept] = found.reshape(bits.size, kept)
    bits[:] = np.packbits(mantissas).view(f">u{itemsize}")
    bits |= tops.astype(bits.dtype) << rest
