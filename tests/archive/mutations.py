"""Hostile files: whole ones, broken with knowledge of their structure, checksums made right again."""

from __future__ import annotations

import random
import struct
import zlib

import numpy as np

from clipq import archive
from clipq.archive.container import MAGIC, PRELUDE
from clipq.errors import ArchiveError
from tests.vectors import make

LIMIT = 2**22


def seeds() -> list[bytes]:
    """Small whole files that hold every kind of tensor."""
    rng = np.random.default_rng(0)
    few = make.quantized(rng, (6, 5, 3, 3), 7, 0.4)
    several = {
        "a.weight": few,
        "a.bias": rng.normal(size=6).astype(np.float32),
        "b.weight": archive.Tied("a.weight"),
        "b.bias": rng.normal(size=9),
        "steps": np.array(3),
        "flag": np.array([True, False, True]),
        "none": np.zeros((0, 4), np.float16),
    }
    return [
        archive.encode_file({"w": few}),
        archive.encode_file(several, metadata={"format": "pt"}),
        archive.encode_file({"constant": np.full(9000, 2.5), "w": make.quantized(rng, (40, 30), 200, 0.7)}),
        archive.encode_file({"raw": np.arange(20_000, dtype=np.float32)}),
    ]


def read_all(content: bytes) -> None:
    """Do all that a reader can do with a file; every refusal must be an `ArchiveError`."""
    try:
        with archive.Archive(content, limit=LIMIT) as file:
            whole, _ = file.salvage(threads=1)
            for name in whole:
                file.stored_bytes(name)
                file.levels(name)
    except ArchiveError:
        pass


def mutate(content: bytes, random: random.Random) -> bytes:
    """Change some bytes anywhere; or change the header's table or the blocks and make all checksums right again."""
    try:
        table, blocks = _open(content)
    except (struct.error, zlib.error, ValueError, IndexError):
        return _scramble(content, random)
    where = random.randrange(4)
    if where == 0:
        return _scramble(content, random)
    if where < 3:
        table = _scramble(table, random)
    if where > 1 and blocks:
        i = random.randrange(len(blocks))
        new = _scramble(blocks[i], random)
        blocks[i] = new if random.randrange(2) else (new + bytes(len(blocks[i])))[: len(blocks[i])]
    return _close(table, blocks, packed=bool(random.randrange(2)))


def _scramble(data: bytes, random: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(1 + random.randrange(4)):
        at = random.randrange(len(out) + 1)
        how = random.randrange(6)
        if how == 0 and out:
            out[at % len(out)] ^= 1 << random.randrange(8)
        elif how == 1 and out:
            out[at % len(out)] = random.choice([0, 1, 2, 3, 0x3F, 0x40, 0x7F, 0x80, 0xC0, 0xFF])
        elif how == 2:
            out[at:at] = random.choice([b"\0", b"\xff" * 8 + b"\x7f", b"\x80\x80\x40", random.randbytes(3)])
        elif how == 3:
            del out[at : at + 1 + random.randrange(4)]
        elif how == 4:
            out = out[:at]
        else:
            start = random.randrange(len(out) + 1)
            out[at:at] = out[start : start + random.randrange(16)]
    return bytes(out)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _write_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _open(content: bytes) -> tuple[bytes, list[bytes]]:
    """The table, and the blocks, of a file whose header can be read."""
    *_, size, _ = PRELUDE.unpack(content[: PRELUDE.size])
    body = content[PRELUDE.size : PRELUDE.size + size]
    plain, at = _varint(body, 0)
    packed, at = _varint(body, at)
    stored = body[at : at + (packed or plain)]
    table = zlib.decompressobj(-15).decompress(stored, 2**20) if packed else stored
    n, at = _varint(table, 0)
    for _ in range(min(2 * n, 100)):
        length, at = _varint(table, at)
        at += length
    n, at = _varint(table, at)
    _, at = _varint(table, at)
    blocks, start = [], PRELUDE.size + size
    for _ in range(min(n, 1000)):
        length, at = _varint(table, at)
        blocks.append(content[start : start + length])
        start += length
    return table, blocks


def _close(table: bytes, blocks: list[bytes], packed: bool) -> bytes:
    stored = table
    if packed:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        stored = packer.compress(table) + packer.flush()
    sums = b"".join(struct.pack("<I", zlib.crc32(block)) for block in blocks)
    body = _write_varint(len(table)) + _write_varint(len(stored) if packed else 0) + stored + sums
    start = struct.pack("<8sBI", MAGIC, 1, len(body))
    return start + struct.pack("<I", zlib.crc32(start + body)) + body + b"".join(blocks)
