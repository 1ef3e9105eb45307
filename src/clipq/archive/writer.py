"""Writing a file: each tensor the way that takes least, then all of it at once or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from clipq.archive import dtypes, tiles
from clipq.archive.codes import encode_codebook, find_codes
from clipq.archive.container import (
    MAX_BLOCK_BYTES,
    MAX_GROUP_BYTES,
    Kind,
    Planned,
    TensorHeader,
    encode_header,
    group_order,
)
from clipq.archive.raw import block_step, encode_group, encode_raw
from clipq.archive.wire import Sink
from clipq.errors import ArchiveError

Array = npt.NDArray[np.generic]
Effort = Literal["default", "max"]
GROUPED_BYTES = 2**16  # smaller tensors share a block
_BLOCK_OVERHEAD = 6  # a block's size and checksum in the header


@dataclass(frozen=True)
class Tied:
    """In place of an array: the same tensor as the one of this name, which comes earlier."""

    name: str


@dataclass(frozen=True)
class _Stored:
    kind: Kind
    payloads: list[bytes]
    swapped: bool = False


class EncodedTensors:
    """Tensors as they were encoded, by their content, for files that differ in some tensors alone.

    Args:
        most_bytes: what is kept at most; those not used for longest go first.
    """

    def __init__(self, most_bytes: int = 2**26) -> None:
        self._most_bytes = most_bytes
        self._stored: OrderedDict[tuple[object, ...], _Stored] = OrderedDict()
        self._bytes = 0

    def find(self, array: Array, effort: Effort, encode: Callable[[], _Stored]) -> _Stored:
        """The array encoded, by ``encode`` if it is not known."""
        key = (effort, array.dtype.str, array.shape, hashlib.sha256(_bytes(array).data).digest())
        if key not in self._stored:
            self._stored[key] = encode()
            self._bytes += _kept(self._stored[key])
        self._stored.move_to_end(key)
        found = self._stored[key]
        while self._bytes > self._most_bytes:
            self._bytes -= _kept(self._stored.popitem(last=False)[1])
        return found


def _kept(stored: _Stored) -> int:
    return sum(map(len, stored.payloads)) + 256


def encode_file(
    tensors: Mapping[str, Array | Tied],
    *,
    planned: Mapping[str, Planned] | None = None,
    metadata: Mapping[str, str] | None = None,
    effort: Effort = "default",
    threads: int | None = None,
    known: EncodedTensors | None = None,
) -> bytes:
    """A whole file in memory.

    Args:
        tensors: name to array, of any shape and of the types in `dtypes`, or `Tied`; the order is kept.
        planned: p and b of some of them.
        metadata: free text.
        effort: "default", or "max" for the smallest file.
        threads: how many to encode with; None for one per core.
        known: tensors encoded for other files; those of this file are added. The bytes are the same with and without.

    Raises:
        ArchiveError: a tensor that cannot be stored, or an unknown effort.
    """
    arrays = {name: array for name, array in tensors.items() if not isinstance(array, Tied)}
    for name, array in arrays.items():
        dtypes.code_of(array, name)
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:

        def encoded(name: str, array: Array) -> _Stored:
            if known is None:
                return _encode_tensor(array, name, effort, pool)
            return known.find(array, effort, lambda: _encode_tensor(array, name, effort, pool))

        stored = {name: encoded(name, array) for name, array in arrays.items()}
    groups = _groups({name: array for name, array in arrays.items() if stored[name].kind == "group"})
    payloads = [_encode_group([arrays[name] for name in group], effort) for group in groups]
    group_of = {name: i for i, group in enumerate(groups) for name in group}

    headers: dict[str, TensorHeader] = {}
    for name, value in tensors.items():
        if isinstance(value, Tied):
            to = headers[value.name]
            header = TensorHeader(name, to.dtype, to.shape, "tied", tied_to=to.name)
        else:
            array = arrays[name]
            dtype = dtypes.BY_CODE[dtypes.code_of(array, name)][0]
            first, n = group_of.get(name, len(payloads)), max(len(stored[name].payloads), name in group_of)
            header = TensorHeader(
                name, dtype, array.shape, stored[name].kind, range(first, first + n), stored[name].swapped
            )
            payloads += stored[name].payloads
        headers[name] = replace(header, planned=(planned or {}).get(name))
    return encode_header(list(headers.values()), payloads, metadata or {}) + b"".join(payloads)


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Put the content at the path, whole or not at all: a temporary file in the same folder, then a rename.

    Raises:
        ArchiveError: it cannot be written; what was at the path before is still there.
    """
    target = Path(path)
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(target))
        os.replace(temporary, target)
        temporary = None
        _sync_folder(target.parent)
    except OSError as error:
        raise ArchiveError(
            f"{target} cannot be written: {error.strerror or error}; nothing there was changed. "
            f"Choose a folder that exists, may be written to and has {len(content)} bytes free"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def encoded_size(array: Array, effort: Effort = "default", scan: tiles.Scan | None = None) -> int:
    """The payload bytes of one tensor as `encode_file` would store it, alone, with one thread.

    Args:
        scan: of a tensor much like this one (see `scan_of`), which spares the choice; None chooses.
    """
    dtypes.code_of(array, "the array")
    with ThreadPoolExecutor(1) as pool:
        stored = _encode_tensor(array, "the array", effort, pool, scan)
    return len(_encode_group([array], effort)) if stored.kind == "group" else sum(map(len, stored.payloads))


def scan_of(array: Array, effort: Effort = "default") -> tiles.Scan | None:
    """The scan that the encoder chooses for a tensor; None if it has too many distinct values to be coded."""
    dtype_code = dtypes.code_of(array, "the array")
    with ThreadPoolExecutor(1) as pool:
        found = find_codes(_bytes(array).view(dtypes.bits_dtype(array.dtype)), dtype_code, pool)
        return None if found is None else tiles.choose_scan(*found, array.shape, effort, pool)[0]


def _encode_tensor(
    array: Array, name: str, effort: Effort, pool: ThreadPoolExecutor, scan: tiles.Scan | None = None
) -> _Stored:
    """Codes if it has few distinct values and they take less, else raw: alone, or with others if it is small."""
    if array.size == 0:
        return _Stored("raw", [])
    small = array.nbytes < GROUPED_BYTES
    coded = _encode_codes(array, name, effort, pool, scan)
    if coded and small and sum(map(len, coded.payloads)) + _BLOCK_OVERHEAD > len(_encode_group([array], effort)):
        coded = None
    if coded:
        return coded
    if small:
        return _Stored("group", [])
    data, step = _bytes(array), block_step(array.itemsize)
    parts = [data[start : start + step] for start in range(0, data.size, step)]
    return _Stored("raw", list(pool.map(lambda part: encode_raw(part, array.itemsize, effort), parts)))


def _encode_codes(
    array: Array, name: str, effort: Effort, pool: ThreadPoolExecutor, scan: tiles.Scan | None
) -> _Stored | None:
    if array.itemsize > 8:
        return None
    dtype_code = dtypes.code_of(array, name)
    found = find_codes(_bytes(array).view(dtypes.bits_dtype(array.dtype)), dtype_code, pool)
    if found is None:
        return None
    codebook, codes = found
    if scan is not None:
        tried: dict[tiles.Scan, bytes | None] = {tiles.adapted(scan, codebook, codes, array.shape): None}
    else:  # what is best for as many rows as a tile has need not be for all: the largest effort includes the smaller
        efforts = ("max", "default") if effort == "max" else (effort,)
        tried = dict(tiles.choose_scan(codebook, codes, array.shape, each, pool) for each in efforts)

    def encoded(scan: tiles.Scan, only_tile: bytes | None) -> _Stored:
        start = Sink()
        encode_codebook(start, codebook, dtype_code)
        tiles.encode_scan(start, scan)
        if only_tile is not None:
            return _Stored("codes", [bytes(start.data) + only_tile], scan.swapped)
        ordered = tiles.in_scan_order(codes, array.shape, scan.swapped)
        parts = tiles.tiles(array.shape, scan.swapped)
        payloads = list(pool.map(lambda tile: tiles.encode_tile(codebook, ordered[tile], array.shape, scan), parts))
        return _Stored("codes", [bytes(start.data) + payloads[0], *payloads[1:]], scan.swapped)

    best = min((encoded(*each) for each in tried.items()), key=lambda stored: sum(map(len, stored.payloads)))
    # Only what is made to mislead the model is so large.
    return best if max(map(len, best.payloads)) <= MAX_BLOCK_BYTES else None


def _encode_group(arrays: Sequence[Array], effort: Effort) -> bytes:
    data = np.concatenate([_bytes(array) for array in arrays])
    return encode_group(data, [array.size for array in arrays], dtypes.code_of(arrays[0], "the array"), effort)


def _groups(arrays: Mapping[str, Array]) -> list[list[str]]:
    """Small tensors that share a block: of one type, in `group_order`."""
    by_type: dict[int, list[str]] = {}
    for name in sorted(arrays, key=group_order):
        by_type.setdefault(dtypes.code_of(arrays[name], name), []).append(name)
    groups: list[list[str]] = []
    for names in by_type.values():
        size = MAX_GROUP_BYTES
        for name in names:
            if size + arrays[name].nbytes > MAX_GROUP_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += arrays[name].nbytes
    return groups


def _bytes(array: Array) -> npt.NDArray[np.uint8]:
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).reshape(-1).view(np.uint8)


def _mode(target: Path) -> int:
    """The permissions that a new file at the path gets, or that the old one has."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last, where folders can be synced."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
