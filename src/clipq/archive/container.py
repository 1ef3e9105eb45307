"""The layout of a file: a fixed prelude, a header that says everything, and checksummed blocks of payload.

Source: docs/format.md, "Layout". This module turns the header into values and back; what the blocks hold
is the business of `codes` and `raw`.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from clipq.archive import dtypes
from clipq.archive.raw import block_step
from clipq.archive.tiles import can_swap, tile_count
from clipq.archive.wire import Cursor, Sink
from clipq.errors import ArchiveError, DamagedFileError

MAGIC = b"\x89CLIPQ\r\n"
VERSION = 1
PRELUDE = struct.Struct("<8sBII")  # magic, version, bytes of header, CRC-32 of these 13 bytes and the header
MAX_HEADER = 16 * 2**20
MAX_DIMENSIONS = 64
MAX_ENTRIES = 2**16  # tensors, and metadata entries: what a small header can make a reader do is bounded
MAX_GROUP_BYTES = 2**18
MAX_BLOCK_BYTES = 2**21

Kind = Literal["codes", "raw", "group", "tied"]
_KINDS: tuple[Kind, ...] = ("codes", "raw", "group", "tied")
_PLANNED, _SWAPPED = 0x80, 0x40
_RATE_UNIT = 1_000_000


@dataclass(frozen=True)
class Planned:
    """The pruning rate and bit width that a tensor was trained with; kept for people to see, to six decimals."""

    pruning_rate: float
    bits: int


@dataclass(frozen=True)
class Block:
    """A run of payload bytes under one checksum."""

    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class TensorHeader:
    """What the header says of a tensor.

    Attributes:
        name: unique in the file.
        dtype: the format's name of the element type.
        shape: in elements.
        kind: "codes" (a codebook, and an index into it for each element), "raw" (planes of bytes), "group"
            (raw, in one block with other small tensors) or "tied" (the same tensor as an earlier one).
        blocks: which of the file's blocks hold it, in order; for "group" the one that it shares.
        swapped: of "codes": its first two dimensions changed places before it was coded.
        tied_to: the name of the earlier tensor, for "tied".
        planned: p and b, if they were given.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: Kind
    blocks: range = range(0)
    swapped: bool = False
    tied_to: str | None = None
    planned: Planned | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded tensor."""
        return self.elements * dtypes.BY_NAME[self.dtype][1].itemsize


@dataclass(frozen=True)
class Header:
    """Everything the header says: tensors, blocks in file order (those of groups first), and free text."""

    tensors: tuple[TensorHeader, ...]
    blocks: tuple[Block, ...]
    metadata: Mapping[str, str]


def encode_header(tensors: Sequence[TensorHeader], payloads: Sequence[bytes], metadata: Mapping[str, str]) -> bytes:
    """The prelude and header of a file with these tensors and block payloads, groups' blocks first."""
    if max(len(tensors), len(metadata)) > MAX_ENTRIES:
        raise ArchiveError(
            f"{len(tensors)} tensors and {len(metadata)} metadata entries: a file holds at most {MAX_ENTRIES} of each; "
            f"split the model into several files"
        )
    sink = Sink()
    sink.varint(len(metadata))
    for key, value in metadata.items():
        for text in (key.encode(), value.encode()):
            sink.varint(len(text))
            sink.raw(text)
    sink.varint(len(payloads))
    sink.varint(len({t.blocks[0] for t in tensors if t.kind == "group"}))
    for payload in payloads:
        sink.varint(len(payload))
    sink.varint(len(tensors))
    index = {t.name: i for i, t in enumerate(tensors)}
    previous = b""
    for t in tensors:
        name = t.name.encode()
        shared = _common_prefix(previous, name)
        sink.varint(shared)
        sink.varint(len(name) - shared)
        sink.raw(name[shared:])
        previous = name
        sink.byte(_KINDS.index(t.kind) | (_PLANNED if t.planned else 0) | (_SWAPPED if t.swapped else 0))
        if t.planned:
            sink.varint(round(t.planned.pruning_rate * _RATE_UNIT))
            sink.byte(t.planned.bits)
        if t.tied_to is not None:
            sink.varint(index[t.tied_to])
            continue
        sink.byte(dtypes.BY_NAME[t.dtype][0])
        sink.varint(len(t.shape))
        for n in t.shape:
            sink.varint(n)
        sink.varint(t.blocks[0] if t.kind == "group" else len(t.blocks))
    return _seal(bytes(sink.data), struct.pack(f"<{len(payloads)}I", *map(zlib.crc32, payloads)))


def _seal(plain: bytes, checksums: bytes) -> bytes:
    packed = _deflate(plain)
    body = Sink()
    body.varint(len(plain))
    body.varint(len(packed) if len(packed) < len(plain) else 0)
    body.raw(packed if len(packed) < len(plain) else plain)
    body.raw(checksums)
    if max(len(plain), len(body.data)) > MAX_HEADER:
        raise ArchiveError(
            f"names, shapes and metadata take {len(plain)} bytes, more than the {MAX_HEADER} of a file's header; "
            f"split the model into several files"
        )
    start = PRELUDE.pack(MAGIC, VERSION, len(body.data), 0)[:-4]
    return start + struct.pack("<I", zlib.crc32(bytes(body.data), zlib.crc32(start))) + bytes(body.data)


def check_prelude(prelude: bytes, file_size: int) -> int:
    """Check the first `PRELUDE.size` bytes of a file; the size of the header that follows.

    Raises:
        DamagedFileError: it is no `.clipq` file, or one of a later version, or its header is too large.
    """
    if not prelude or prelude[: len(MAGIC)] != MAGIC[: len(prelude)]:
        raise DamagedFileError(
            f"this is no .clipq file: it starts with {prelude[: len(MAGIC)]!r} in place of {MAGIC!r}; "
            f"give a file that clipq wrote"
        )
    if len(prelude) < PRELUDE.size:
        raise DamagedFileError(f"the file ends after {len(prelude)} bytes; get a whole copy of it")
    _, version, header_size, _ = PRELUDE.unpack(prelude)
    if version != VERSION:
        raise DamagedFileError(f"the file has format version {version}, this clipq reads {VERSION}; update clipq")
    if header_size > min(MAX_HEADER, file_size - PRELUDE.size):
        raise DamagedFileError(
            f"the header should have {header_size} bytes, but {file_size - PRELUDE.size} follow and a header has at "
            f"most {MAX_HEADER}; the file is damaged, get a whole copy of it"
        )
    return int(header_size)


def decode_header(prelude: bytes, body: bytes, file_size: int) -> Header:
    """Check and parse the header, and check that the blocks fill the rest of the file exactly.

    Raises:
        DamagedFileError: anything in it is not as a writer would have it.
    """
    *_, crc = PRELUDE.unpack(prelude)
    if zlib.crc32(body, zlib.crc32(prelude[:-4])) != crc:
        raise DamagedFileError("the header's checksum is wrong: the file is damaged, get a whole copy of it")
    outer = Cursor(body, "the header")
    plain_size, packed_size = outer.varint(MAX_HEADER), outer.varint(MAX_HEADER)
    packed = bytes(outer.raw(packed_size or plain_size))
    cursor = Cursor(_inflate(packed, plain_size) if packed_size else packed, "the header")

    metadata: dict[str, str] = {}
    for _ in range(cursor.varint(MAX_ENTRIES)):
        key = cursor.text(cursor.varint(cursor.left))
        metadata[key] = cursor.text(cursor.varint(cursor.left))
    n_blocks = cursor.varint(cursor.left)
    n_groups = cursor.varint(n_blocks)
    offset = PRELUDE.size + len(body)
    blocks = []
    for _ in range(n_blocks):
        size = cursor.varint(min(MAX_BLOCK_BYTES, file_size - offset))
        blocks.append(Block(offset, size, int.from_bytes(outer.raw(4), "little")))
        offset += size
    outer.end()
    if offset != file_size:
        raise outer.damaged(f"the blocks end at byte {offset} and the file at byte {file_size}")

    tensors: list[TensorHeader] = []
    names: set[str] = set()
    next_block, name_lengths = n_groups, 0
    for _ in range(cursor.varint(MAX_ENTRIES)):
        tensor = _decode_tensor(cursor, tensors, n_groups, next_block, n_blocks)
        if tensor.name in names:
            raise cursor.damaged(f"two tensors are named {tensor.name!r}")
        names.add(tensor.name)
        name_lengths += len(tensor.name)
        if name_lengths > MAX_HEADER:
            raise cursor.damaged(f"the tensors' names are longer than {MAX_HEADER} bytes together")
        tensors.append(tensor)
        next_block = max(next_block, tensor.blocks.stop)
    cursor.end()
    if next_block != n_blocks:
        raise cursor.damaged(f"{n_blocks - next_block} blocks belong to no tensor")
    return Header(tuple(tensors), tuple(blocks), metadata)


def _decode_tensor(
    cursor: Cursor, earlier: Sequence[TensorHeader], n_groups: int, next_block: int, n_blocks: int
) -> TensorHeader:
    previous = earlier[-1].name.encode() if earlier else b""
    shared = cursor.varint(len(previous))
    try:
        name = str(previous[:shared] + bytes(cursor.raw(cursor.varint(cursor.left))), "utf-8")
    except UnicodeDecodeError as error:
        raise cursor.damaged("a tensor's name is not UTF-8") from error
    flags = cursor.byte()
    planned = None
    if flags & _PLANNED:
        planned = Planned(cursor.varint(_RATE_UNIT) / _RATE_UNIT, cursor.byte())
    how = flags & ~(_PLANNED | _SWAPPED)
    if how >= len(_KINDS) or (flags & _SWAPPED and _KINDS[how] != "codes"):
        raise cursor.damaged(f"{name!r} is stored in a way, {flags}, that this format has not")
    kind, swapped = _KINDS[how], bool(flags & _SWAPPED)
    if kind == "tied":
        target = cursor.varint()
        if target >= len(earlier) or earlier[target].kind == "tied":
            raise cursor.damaged(f"{name!r} is tied to no earlier tensor")
        to = earlier[target]
        return TensorHeader(name, to.dtype, to.shape, kind, tied_to=to.name, planned=planned)
    code = cursor.byte()
    if code not in dtypes.BY_CODE:
        raise cursor.damaged(f"{name!r} has element type {code}, which this format has not")
    shape = tuple(cursor.varint() for _ in range(cursor.varint(MAX_DIMENSIONS)))
    if math.prod(n for n in shape if n) > 2**48:
        raise cursor.damaged(f"{name!r} has the shape {shape}, too large for any machine")
    number = cursor.varint(n_blocks)
    if kind == "group" and number >= n_groups:
        raise cursor.damaged(f"{name!r} is in group {number} of {n_groups}")
    if kind != "group" and next_block + number > n_blocks:
        raise cursor.damaged(f"{name!r} has {number} blocks and {n_blocks - next_block} are left")
    used = range(number, number + 1) if kind == "group" else range(next_block, next_block + number)
    return TensorHeader(name, dtypes.BY_CODE[code][0], shape, kind, used, swapped, planned=planned)


def group_order(name: str) -> str:
    """The key by which the tensors of a group are sorted: those of one role (`weight`, `bias`) lie together."""
    return name.rpartition(".")[2]


def check_layout(tensors: Sequence[TensorHeader]) -> dict[int, list[TensorHeader]]:
    """Check that each tensor has the blocks that its shape needs; the members of each group, in their order.

    Raises:
        DamagedFileError: one has more or fewer, or a group mixes element types or is too large.
    """
    groups: dict[int, list[TensorHeader]] = {}
    for t in sorted(tensors, key=lambda t: group_order(t.name)):
        itemsize = dtypes.BY_NAME[t.dtype][1].itemsize
        if t.kind == "group":
            groups.setdefault(t.blocks[0], []).append(t)
        elif t.kind != "tied" and len(t.blocks) != _block_count(t, itemsize):
            raise DamagedFileError(f"{t.name}: {len(t.blocks)} blocks cannot hold its shape {t.shape}")
    for members in groups.values():
        if len({t.dtype for t in members}) > 1 or sum(t.nbytes for t in members) > MAX_GROUP_BYTES:
            raise DamagedFileError(f"{members[0].name}: the tensors stored with it differ in type, or are too large")
    return groups


def _block_count(tensor: TensorHeader, itemsize: int) -> int:
    if tensor.kind == "codes":
        fits = itemsize <= 8 and tensor.elements and (can_swap(tensor.shape) or not tensor.swapped)
        return tile_count(tensor.shape, tensor.swapped) if fits else -1
    return -(-tensor.nbytes // block_step(itemsize))


def _common_prefix(a: bytes, b: bytes) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def _deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return packer.compress(data) + packer.flush()


def _inflate(data: bytes, size: int) -> bytes:
    unpacker = zlib.decompressobj(-15)
    try:
        plain = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise DamagedFileError("the header cannot be unpacked: the file is damaged, get a whole copy of it") from error
    if len(plain) != size or not unpacker.eof or unpacker.unused_data:
        raise DamagedFileError(f"the header does not unpack to its {size} bytes: the file is damaged")
    return plain
