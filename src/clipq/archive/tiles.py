"""Tiles: the parts of a code tensor that are coded each alone, in parallel, under a checksum of their own.

Source: docs/format.md, "Code tensors". This module decides how a tensor is laid out for the model: which
dimension makes the rows, and at which distances within a row neighbours are looked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from clipq.archive.coder import code_tile
from clipq.archive.codes import Codebook
from clipq.archive.tables import OUT_OF_SPACE, RECIPROCAL
from clipq.archive.wire import Cursor, Sink

TILE_ELEMENTS = 2**20
MAX_ROW = 2**16
_LOOKUP = 2**14  # elements at a time: NumPy widens the indices to 64 bits
_WORTH_THREADS, _WORTH_A_GLANCE = 2**14, 2**16
"""From as many elements on, scans are tried on all cores, and a quarter of the rows tells which to try on all."""
_RATES = (100, 0, 30, 60, 160, 250)

U8 = npt.NDArray[np.uint8]
Bits = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Scan:
    """How the codes of a tensor are presented to the model.

    Attributes:
        swapped: the first two dimensions change places, so that rows are inputs and not outputs.
        lag1, lag2: distances of neighbours within a row; lag2 elements share a group.
        mean: mean activity of an element in rows that have any, in units of 1/256.
        rate: how fast the weights of the zero flag are learned, in units of 2**-16.
        limit: after how many bits an adaptive probability forgets.
    """

    swapped: bool
    lag1: int
    lag2: int
    mean: int
    rate: int = 100
    limit: int = 250


def row_length(shape: tuple[int, ...], swapped: bool) -> int:
    """Elements in a row, 1 to `MAX_ROW`: what belongs to one output (one input, if swapped)."""
    n = math.prod(shape)
    if swapped:
        return n // shape[1]
    return min(max(n // shape[0] if len(shape) > 1 and shape[0] else n, 1), MAX_ROW)


def can_swap(shape: tuple[int, ...]) -> bool:
    """Whether a tensor may be stored with its first two dimensions swapped."""
    return len(shape) >= 2 and math.prod(shape) > 0 and math.prod(shape) // shape[1] <= MAX_ROW


def tile_count(shape: tuple[int, ...], swapped: bool) -> int:
    """How many tiles a tensor has."""
    return -(-math.prod(shape) // _tile_step(shape, swapped))


def tiles(shape: tuple[int, ...], swapped: bool) -> list[slice]:
    """Which elements, in the order of the scan, are in each tile: whole rows, up to `TILE_ELEMENTS`."""
    n, step = math.prod(shape), _tile_step(shape, swapped)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _tile_step(shape: tuple[int, ...], swapped: bool) -> int:
    row = row_length(shape, swapped)
    return TILE_ELEMENTS // row * row


def in_scan_order(codes: U8, shape: tuple[int, ...], swapped: bool) -> U8:
    """Codes, 1-D and row-major, in the order in which they are coded."""
    return codes.reshape(shape).swapaxes(0, 1).reshape(-1) if swapped else codes


def choose_scan(
    codebook: Codebook, codes: U8, shape: tuple[int, ...], effort: str, pool: Executor
) -> tuple[Scan, bytes | None]:
    """Try scans on the tensor, or on as many of its rows as a tile has, and give the one that takes least.

    Args:
        pool: tries several at once.

    Returns:
        The scan, and what `encode_tile` gives for the tensor if one tile holds all of it and was tried.
    """
    if len(codebook.bits) == 1:
        return Scan(False, *_lags(shape, False)[0], 1), None
    every = -(-codes.size // TILE_ELEMENTS)
    tried: dict[tuple[Scan, int], bytes] = {}
    sampled = functools.cache(functools.partial(_sampled, codes, shape))

    def taken(scan: Scan, every: int) -> float:
        """Bytes; of samples, which differ in what they hold, per byte of their entropy."""
        return len(tried[scan, every]) / sampled(scan.swapped, every)[1]

    def best(scans: Sequence[Scan], every: int = every) -> list[Scan]:
        new = [scan for scan in scans if (scan, every) not in tried]
        parts = [sampled(scan.swapped, every)[0] for scan in new]
        at_once = pool.map if codes.size >= _WORTH_THREADS else map
        coded = at_once(lambda scan, part: _encode(codebook, part, row_length(shape, scan.swapped), scan), new, parts)
        tried.update(zip([(scan, every) for scan in new], coded, strict=True))
        return sorted(scans, key=lambda scan: taken(scan, every))

    activity = _activity(codebook, codes)
    scans = [
        Scan(swapped, lag1, lag2, mean)
        for swapped in ((False, True) if can_swap(shape) else (False,))
        for mean in (_mean_activity(activity, codebook.pivot, codes, shape, swapped),)
        for lag1, lag2 in _lags(shape, swapped)
    ]
    if effort == "default" and every == 1 and codes.size >= _WORTH_A_GLANCE and len(scans) > 2:
        scans = best(scans, 4)[:3]
        scans = [scan for scan in scans if taken(scan, 4) <= 1.02 * taken(scans[0], 4)]
    scan = best(scans)[0]
    scan = best([replace(scan, rate=rate) for rate in ((100, 30) if effort == "default" else _RATES)])[0]
    if effort == "max":
        scan = best([replace(scan, limit=limit) for limit in (250, 30, 60, 120)])[0]
    return scan, tried.get((scan, 1)) if tile_count(shape, scan.swapped) == 1 else None


def adapted(scan: Scan, codebook: Codebook, codes: U8, shape: tuple[int, ...]) -> Scan:
    """The scan of a tensor much like this one, with what is this one's own."""
    mean = _mean_activity(_activity(codebook, codes), codebook.pivot, codes, shape, scan.swapped)
    return replace(scan, mean=mean)


def _lags(shape: tuple[int, ...], swapped: bool) -> list[tuple[int, int]]:
    """Pairs of lags worth trying: the kernel's width and size, or for matrices those of any square that fits."""
    row = row_length(shape, swapped)
    kernel = math.prod(shape[2:])
    if kernel > 1:
        return [(max(shape[-1], 1), min(kernel, row))]
    sides = [side for side in (4, 5, 7, 8) if row % side**2 == 0]
    if math.isqrt(row) ** 2 == row and row > 64:
        sides.append(math.isqrt(row))
    return [(2, 3)] + [(side, side**2) for side in sides]


def _sampled(codes: U8, shape: tuple[int, ...], swapped: bool, every: int) -> tuple[U8, float]:
    """The rows, or every few of them, and then their order-0 entropy in bytes."""
    if every == 1:
        return in_scan_order(codes, shape, swapped), 1.0
    row = row_length(shape, swapped)
    if swapped:
        part = codes.reshape(shape[0], shape[1], row // shape[0])[:, ::every].swapaxes(0, 1)
    elif codes.size % row:
        part = codes[: -(-codes.size // (row * every)) * row]
    else:
        part = codes.reshape(-1, row)[::every]
    part = np.ascontiguousarray(part).reshape(-1)
    counts = np.bincount(part)
    counts = counts[counts > 0]
    return part, max(1.0, float(counts @ np.log2(part.size / counts)) / 8)


def _activity(codebook: Codebook, codes: U8) -> int:
    """The activity of all elements together, in the model's units."""
    levels = np.abs(np.arange(len(codebook.bits)) - codebook.pivot)
    shift = max(0, int(max(levels.max() - 1, 0)).bit_length() - 3)
    activity = np.where(levels > 0, 1 + (levels - 1 >> shift), 0)
    return int(activity @ np.bincount(codes, minlength=len(levels)))


def _mean_activity(total: int, pivot: int, codes: U8, shape: tuple[int, ...], swapped: bool) -> int:
    """Mean activity of the rows that have any, of this in total."""
    row = row_length(shape, swapped)
    if can_swap(shape):
        away = codes.reshape(*shape[:2], -1) != pivot
        alive = away.any(axis=0) if swapped else away.reshape(shape[0], -1)
        live = int(alive.any(axis=1).sum()) * row
    else:
        live = codes.size
    return min(max(256 * total // max(live, 1), 1), 2048)


def encode_scan(sink: Sink, scan: Scan) -> None:
    """Write a scan, but for ``swapped``, which is in the header."""
    for value in (scan.lag1, scan.lag2, scan.mean):
        sink.varint(value)
    sink.byte(scan.rate)
    sink.byte(scan.limit)


def decode_scan(cursor: Cursor, swapped: bool) -> Scan:
    """Read a scan.

    Raises:
        DamagedFileError: a value in it is out of range.
    """
    lag1, lag2, mean = cursor.varint(MAX_ROW), cursor.varint(MAX_ROW), cursor.varint(2048)
    scan = Scan(swapped, lag1, lag2, mean, cursor.byte(), cursor.byte())
    if min(lag1, lag2, mean, scan.limit) < 1 or scan.limit >= len(RECIPROCAL):
        raise cursor.damaged(f"the model's settings are out of range: {scan}")
    return scan


def encode_tile(codebook: Codebook, codes: U8, shape: tuple[int, ...], scan: Scan) -> bytes:
    """The coded codes of one tile, given in scan order; nothing if there is only one level."""
    return _encode(codebook, codes, row_length(shape, scan.swapped), scan) if len(codebook.bits) > 1 else b""


def _encode(codebook: Codebook, codes: U8, row: int, scan: Scan) -> bytes:
    settings = (scan.lag1, scan.lag2, codebook.pivot, len(codebook.bits), scan.mean, scan.rate, scan.limit)
    size = codes.size // 4 + 7 * row + 64
    while True:
        words = np.zeros(size, np.int32)
        n = code_tile(False, codes, words, row, *settings)
        if n != OUT_OF_SPACE:
            return words[:n].astype(">u2").tobytes().rstrip(b"\0")
        size *= 3


def decode_tile(
    codebook: Codebook, data: memoryview, shape: tuple[int, ...], scan: Scan, tile: slice, out: Bits, what: str
) -> None:
    """Decode one tile and put its elements, as bit patterns, at their places in the whole tensor ``out``, 1-D."""
    n = tile.stop - tile.start
    if len(codebook.bits) == 1:
        Cursor(data, what).end()
        out[tile] = codebook.bits[0]
        return
    row = row_length(shape, scan.swapped)
    words = np.zeros(len(data) // 2 + 4, np.int32)
    words[: -(-len(data) // 2)] = np.frombuffer(bytes(data) + b"\0" * (len(data) % 2), ">u2")
    codes = np.empty(n, np.uint8)
    settings = (scan.lag1, scan.lag2, codebook.pivot, len(codebook.bits), scan.mean, scan.rate, scan.limit)
    code_tile(True, codes, words, row, *settings)
    if scan.swapped:
        place = out.reshape(shape[0], shape[1], row // shape[0])[:, tile.start // row : tile.stop // row]
        place[:] = codebook.bits[codes.reshape(-1, shape[0], row // shape[0])].swapaxes(0, 1)
        return
    for part in _parts(tile):
        np.take(codebook.bits, codes[part.start - tile.start : part.stop - tile.start], out=out[part], mode="clip")


def _parts(tile: slice) -> Iterator[slice]:
    for start in range(tile.start, tile.stop, _LOOKUP):
        yield slice(start, min(start + _LOOKUP, tile.stop))
