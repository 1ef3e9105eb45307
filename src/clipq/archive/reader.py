"""Reading a file that may come from anyone: nothing in it is believed before it is checked."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import numpy as np
import numpy.typing as npt

from clipq.archive import dtypes
from clipq.archive.codes import decode_codebook
from clipq.archive.container import MAX_BLOCK_BYTES, PRELUDE, TensorHeader, check_layout, check_prelude, decode_header
from clipq.archive.raw import block_step, decode_group, decode_raw
from clipq.archive.sources import Source, open_source
from clipq.archive.tiles import decode_scan, decode_tile, row_length, tiles
from clipq.archive.wire import Cursor
from clipq.errors import DamagedFileError, TooLargeError

Array = npt.NDArray[np.generic]

LIMIT_FLOOR = 2**30
LIMIT_RATIO = 4096
MAX_WORKERS = 8
ROOM = 12 * 2**20  # bytes that the workers may hold together; with all else 16 MiB beside the decoded tensors
_ROW_BYTES = 56  # what the model of a tile holds for each column of a row


class Archive(Mapping[str, Array]):
    """A ``.clipq`` file, open for reading: a mapping from names to arrays, each decoded when it is asked for.

    Args:
        source: a path, the file's bytes, a memory map, an open binary file that can seek, or an fsspec URL
            such as ``s3://bucket/model.clipq``, of which only the ranges needed are requested.
        limit: the most bytes of decoded tensors that may be asked for at once; None for 1 GiB or 4096 times
            the file's size, whichever is more.

    Raises:
        DamagedFileError: the file is no ``.clipq`` file, or its header is damaged.
        ArchiveError: it cannot be opened or read.
    """

    def __init__(self, source: Source, *, limit: int | None = None) -> None:
        self._stack = ExitStack()
        self._place = f"{os.fspath(source)}: " if isinstance(source, str | os.PathLike) else ""
        with ExitStack() as on_error, self._naming_the_file():
            on_error.push(self._stack)
            self._input = open_source(source, self._stack)
            size = self._input.size
            prelude = bytes(self._input.read(0, min(PRELUDE.size, size)))
            body = bytes(self._input.read(PRELUDE.size, check_prelude(prelude, size)))
            self._header = decode_header(prelude, body, size)
            self._groups = {i: _Group.of(members) for i, members in check_layout(self._header.tensors).items()}
            on_error.pop_all()
        self.nbytes: int = size
        self.limit: int = max(LIMIT_FLOOR, LIMIT_RATIO * size) if limit is None else limit
        self.tensors: Mapping[str, TensorHeader] = MappingProxyType({t.name: t for t in self._header.tensors})
        self.metadata: Mapping[str, str] = MappingProxyType(dict(self._header.metadata))

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Put the path, if there is one, in front of what an error says."""
        try:
            yield
        except (DamagedFileError, TooLargeError) as error:
            error.args = (f"{self._place}{error}",)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what the archive opened; a file object that was passed in stays open."""
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, name: str) -> Array:
        """Decode one tensor.

        Raises:
            KeyError: no tensor has this name.
            DamagedFileError: the tensor is damaged.
            TooLargeError: it is larger than `limit`.
        """
        self.tensors[name]
        return self.read([name])[name]

    def read(self, names: Iterable[str] | None = None, *, threads: int | None = None) -> dict[str, Array]:
        """Decode some tensors, or all; tied ones are the same array.

        Args:
            names: which; None for all.
            threads: how many to decode with; None for one per core.

        Raises:
            DamagedFileError: one of them is damaged; the message names it.
            TooLargeError: together they are larger than `limit`.
        """
        arrays, damaged = self.salvage(names, threads=threads)
        for error in damaged.values():
            raise error
        return arrays

    def salvage(
        self, names: Iterable[str] | None = None, *, threads: int | None = None
    ) -> tuple[dict[str, Array], dict[str, DamagedFileError]]:
        """Like `read`, but of a damaged file give the whole tensors, and what is wrong with the others."""
        wanted = list(self.tensors if names is None else names)
        stored = {self.tensors[name].tied_to or name: None for name in wanted}
        with self._naming_the_file():
            self._check_size([self.tensors[name] for name in stored])
        arrays: dict[str, Array] = {}
        damaged: dict[str, DamagedFileError] = {}
        groups: dict[int, npt.NDArray[np.uint8] | str] = {}
        with ThreadPoolExecutor(self._workers(stored, threads)) as pool:
            for name in stored:
                try:
                    with self._naming_the_file():
                        arrays[name] = self._decode(self.tensors[name], pool, groups)
                except DamagedFileError as error:
                    damaged[name] = error
        sources = {name: self.tensors[name].tied_to or name for name in wanted}
        return (
            {name: arrays[source] for name, source in sources.items() if source in arrays},
            {name: damaged[source] for name, source in sources.items() if source in damaged},
        )

    def levels(self, name: str) -> int | None:
        """The number of distinct values of a tensor that is stored as codes; None of others."""
        tensor = self.tensors[self.tensors[name].tied_to or name]
        if tensor.kind != "codes":
            return None
        cursor = Cursor(self._payload(tensor, 0), tensor.name)
        return len(decode_codebook(cursor, dtypes.BY_NAME[tensor.dtype][0]).bits)

    def stored_bytes(self, name: str) -> int:
        """Payload bytes of a tensor: 0 if it is tied to another, its share by size of a block with others."""
        tensor = self.tensors[name]
        size = sum(self._header.blocks[i].size for i in tensor.blocks)
        if tensor.kind != "group":
            return size
        group = self._groups[tensor.blocks[0]]
        start, total = group.starts[name], max(group.nbytes, 1)
        return size * (start + tensor.nbytes) // total - size * start // total

    def _check_size(self, tensors: list[TensorHeader]) -> None:
        total = sum(t.nbytes for t in tensors)
        if total > self.limit:
            raise TooLargeError(
                f"the tensors asked for take {total} bytes once decoded, above the limit of {self.limit}; if you "
                f"trust the file, raise the limit (limit=..., or --limit), or read fewer tensors at a time"
            )

    def _workers(self, names: Iterable[str], threads: int | None) -> int:
        """How many threads decode these tensors: as many as asked for, or one per core, if `ROOM` allows it."""
        each = max((self._working_bytes(self.tensors[name]) for name in names), default=1)
        return max(1, min(threads or os.cpu_count() or 1, MAX_WORKERS, ROOM // each))

    def _working_bytes(self, tensor: TensorHeader) -> int:
        """About the most that decoding one block of a tensor takes, beside its elements."""
        payload = max((self._header.blocks[i].size for i in tensor.blocks), default=0)
        if tensor.kind != "codes":
            return payload + MAX_BLOCK_BYTES
        tile: int = tiles(tensor.shape, tensor.swapped)[0].stop
        return 4 * payload + 2 * tile + _ROW_BYTES * row_length(tensor.shape, tensor.swapped)

    def _decode(
        self, tensor: TensorHeader, pool: ThreadPoolExecutor, groups: dict[int, npt.NDArray[np.uint8] | str]
    ) -> Array:
        dtype = dtypes.BY_NAME[tensor.dtype][1]
        try:
            out = np.empty(tensor.nbytes, np.uint8)
        except MemoryError as error:
            raise TooLargeError(f"{tensor.name}: its {tensor.nbytes} bytes do not fit in memory") from error
        if tensor.kind == "codes":
            self._decode_codes(tensor, out, pool)
        elif tensor.kind == "raw":
            self._decode_raw(tensor, out, pool)
        else:
            out[:] = self._group_member(tensor, groups)
        if tensor.dtype == "bool" and out.size and out.max() > 1:
            raise DamagedFileError(f"{tensor.name}: a truth value is {out.max()}, neither 0 nor 1: the file is damaged")
        return out.view(dtype).reshape(tensor.shape)

    def _decode_codes(self, tensor: TensorHeader, out: npt.NDArray[np.uint8], pool: ThreadPoolExecutor) -> None:
        code, dtype = dtypes.BY_NAME[tensor.dtype]
        elements = out.view(dtypes.bits_dtype(dtype))
        first = self._payload(tensor, 0)
        cursor = Cursor(first, tensor.name)
        codebook = decode_codebook(cursor, code)
        scan = decode_scan(cursor, tensor.swapped)

        def decode(i: int, tile: slice) -> None:
            payload = first[cursor.position :] if i == 0 else self._payload(tensor, i)
            decode_tile(codebook, payload, tensor.shape, scan, tile, elements, tensor.name)

        at_once = pool.map if len(tensor.blocks) > 1 else map
        for _ in at_once(decode, range(len(tensor.blocks)), tiles(tensor.shape, tensor.swapped)):
            pass

    def _decode_raw(self, tensor: TensorHeader, out: npt.NDArray[np.uint8], pool: ThreadPoolExecutor) -> None:
        itemsize = dtypes.BY_NAME[tensor.dtype][1].itemsize
        step = block_step(itemsize)

        def decode(i: int) -> None:
            decode_raw(self._payload(tensor, i), out[i * step : (i + 1) * step], itemsize, tensor.name)

        for _ in pool.map(decode, range(len(tensor.blocks))):
            pass

    def _group_member(
        self, tensor: TensorHeader, groups: dict[int, npt.NDArray[np.uint8] | str]
    ) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor in a group, which is decoded once for all that are asked for at once."""
        number = tensor.blocks[0]
        group = self._groups[number]
        if number not in groups:
            block = np.empty(group.nbytes, np.uint8)
            try:
                decode_group(
                    self._payload(tensor, 0), block, group.counts, dtypes.BY_NAME[tensor.dtype][0], tensor.name
                )
            except DamagedFileError:
                groups[number] = tensor.name
                raise
            groups[number] = block
        decoded = groups[number]
        if isinstance(decoded, str):
            raise DamagedFileError(
                f"{tensor.name}: the block that it shares with {decoded} is damaged; get a whole copy, or take the "
                f"tensors that are whole (clipq unpack --salvage)"
            )
        start = group.starts[tensor.name]
        return decoded[start : start + tensor.nbytes]

    def _payload(self, tensor: TensorHeader, i: int) -> memoryview:
        block = self._header.blocks[tensor.blocks[i]]
        payload = self._input.read(block.offset, block.size)
        if zlib.crc32(payload) != block.crc:
            raise DamagedFileError(
                f"{tensor.name}: the checksum of bytes {block.offset} to {block.offset + block.size} is wrong: the "
                f"file is damaged; get a whole copy, or take the tensors that are whole (clipq unpack --salvage)"
            )
        return payload


@dataclass(frozen=True)
class _Group:
    """Small tensors in one block: its bytes once decoded, elements of each tensor, and where its bytes start."""

    nbytes: int
    counts: Sequence[int]
    starts: Mapping[str, int]

    @classmethod
    def of(cls, members: Sequence[TensorHeader]) -> _Group:
        ends = list(itertools.accumulate((m.nbytes for m in members), initial=0))
        counts = [m.elements for m in members]
        return cls(ends[-1], counts, {m.name: start for m, start in zip(members, ends, strict=False)})
