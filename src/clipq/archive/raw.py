"""Tensors that are not quantized: exact, as planes of bytes.

Source: docs/format.md, "Raw blocks". The bytes of the elements are sorted by significance, because the top
bytes of weights are alike and the low ones are noise; each plane is packed if that makes it smaller.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import zstandard

from clipq.archive.wire import Cursor, Sink

U8 = npt.NDArray[np.uint8]

RAW_BLOCK_BYTES = 2**20
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
