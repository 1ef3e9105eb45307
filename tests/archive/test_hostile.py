"""Files from anyone: damage is found and named, lies are refused, and nothing else ever happens."""

from __future__ import annotations

import random
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from clipq import archive
from clipq.archive.container import MAX_BLOCK_BYTES, MAX_HEADER, PRELUDE
from clipq.archive.wire import Sink
from clipq.errors import DamagedFileError, TooLargeError
from tests.archive import mutations

SEEDS = mutations.seeds()
CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus"


@given(seed=st.integers(0, 2**63), which=st.sampled_from(SEEDS), times=st.integers(1, 4))
@settings(max_examples=1500, deadline=None)
def test_a_mutated_file_is_read_or_refused(seed: int, which: bytes, times: int) -> None:
    rng = random.Random(seed)
    content = which
    for _ in range(times):
        content = mutations.mutate(content, rng)
    mutations.read_all(content)


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name[:8])
def test_what_fuzzing_found_is_read_or_refused(path: Path) -> None:
    start = time.process_time()
    mutations.read_all(path.read_bytes())
    assert time.process_time() - start < 1


@pytest.mark.parametrize("content", SEEDS, ids=range(len(SEEDS)))
def test_every_bit_flip_is_found_and_named(content: bytes) -> None:
    with archive.Archive(content) as file:
        header_end = len(content) - sum(file.stored_bytes(name) for name in file)
        names = set(file)
    step = max(1, len(content) * 8 // 1500)
    for bit in range(0, len(content) * 8, step):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        if bit // 8 < header_end:
            with pytest.raises(DamagedFileError):
                archive.Archive(bytes(flipped))
        else:
            with archive.Archive(bytes(flipped)) as file:
                with pytest.raises(DamagedFileError) as damage:
                    file.read()
                assert any(f"{name}:" in str(damage.value) for name in names)


def test_salvage_gives_the_whole_tensors_and_names_the_others() -> None:
    content = bytearray(SEEDS[1])
    with archive.Archive(bytes(content)) as file:
        before = file.read()
    content[-3] ^= 1  # the last block is that of a.weight, to which b.weight is tied
    with archive.Archive(bytes(content)) as file:
        whole, damaged = file.salvage()
    assert set(damaged) == {"a.weight", "b.weight"}
    assert set(whole) == set(before) - set(damaged)
    assert all(np.array_equal(whole[name], before[name]) for name in whole)


def test_every_truncation_is_refused() -> None:
    for n in range(len(SEEDS[1])):
        with pytest.raises(DamagedFileError):
            archive.Archive(SEEDS[1][:n])


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    content = archive.encode_file({"zeros": np.zeros((2**13, 2**13), np.uint8)})
    assert len(content) < 10_000
    tracemalloc.start()
    with archive.Archive(content, limit=2**24) as file, pytest.raises(TooLargeError, match="limit of 16777216"):
        file.read()
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def _file(table: Sink, blocks: list[bytes]) -> bytes:
    return mutations._close(bytes(table.data), blocks, packed=True)


def test_names_that_share_a_long_start_cannot_fill_the_memory() -> None:
    table = Sink()
    for value in (0, 0, 0, 60_000):
        table.varint(value)
    for i in range(60_000):
        table.varint(0 if i == 0 else 2**16)
        name = b"x" * 2**16 if i == 0 else str(i).encode()
        table.varint(len(name))
        table.raw(name)
        for value in (1, 11, 1, 0, 0):
            table.varint(value)
    tracemalloc.start()
    with pytest.raises(DamagedFileError, match="names are longer"):
        archive.Archive(_file(table, []))
    assert tracemalloc.get_traced_memory()[1] < 5 * MAX_HEADER
    tracemalloc.stop()


def test_a_plane_that_claims_a_huge_size_is_refused() -> None:
    frame = zstandard.ZstdCompressor().compress(bytes(2**26))  # says in its header how large it is
    table, block = Sink(), Sink()
    block.varint(len(frame))
    block.raw(frame)
    for value in (0, 1, 0, len(block.data), 1, 0, 1, ord("w"), 1, 1, 1, 1000, 1):
        table.varint(value)
    content = _file(table, [bytes(block.data)])
    tracemalloc.start()
    with archive.Archive(content) as file, pytest.raises(DamagedFileError, match="own size"):
        file.read()
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_memory_beside_the_decoded_tensors_is_bounded() -> None:
    rng = np.random.default_rng(0)
    few = rng.integers(-8, 8, (3000, 2000)).astype(np.float32)
    raw = rng.normal(size=3_000_000).astype(np.float32)
    content = archive.encode_file({"few": few, "raw": raw})
    with archive.Archive(content) as file:
        file["few"]
        tracemalloc.start()
        arrays = file.read(threads=8)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert np.array_equal(arrays["few"], few)
    assert peak <= few.nbytes + raw.nbytes + 16 * 2**20


def test_a_header_of_many_empty_tensors_takes_its_time_but_no_more() -> None:
    table = Sink()
    for value in (0, 0, 0, 2**16):
        table.varint(value)
    for i in range(2**16):
        name = f"{i}".encode()
        table.varint(0)
        table.varint(len(name))
        table.raw(name)
        for value in (1, 11, 1, 0, 0):
            table.varint(value)
    start = time.process_time()
    with archive.Archive(_file(table, [])) as file:
        assert len(file) == 2**16
    assert time.process_time() - start < 10


def test_a_group_of_many_tensors_is_decoded_once() -> None:
    table, block = Sink(), Sink()
    block.varint(0)
    block.raw(bytes(2**16))
    for value in (0, 1, 1, len(block.data), 2**16):
        table.varint(value)
    for i in range(2**16):
        name = f"{i}".encode()
        table.varint(0)
        table.varint(len(name))
        table.raw(name)
        for value in (2, 1, 1, 1, 0):
            table.varint(value)
    whole = _file(table, [bytes(block.data)])
    for content in (whole, whole[:-1] + b"\1"):
        start = time.process_time()
        with archive.Archive(content) as file:
            arrays, damaged = file.salvage()
        assert len(arrays) == (0 if damaged else 2**16)
        assert time.process_time() - start < 10


def test_a_block_larger_than_any_writer_makes_is_refused_unread() -> None:
    table = Sink()
    block = bytes(MAX_BLOCK_BYTES + 1)
    for value in (0, 1, 0, len(block), 1, 0, 1, ord("w"), 0, 1, 1, 1000, 1):
        table.varint(value)
    with pytest.raises(DamagedFileError, match="larger than 2097152"):
        archive.Archive(_file(table, [block]))


def test_the_prelude_is_what_the_specification_says() -> None:
    assert PRELUDE.size == 17
    assert zlib.crc32(SEEDS[0][:13] + SEEDS[0][17 : 17 + int.from_bytes(SEEDS[0][9:13], "little")]) == int.from_bytes(
        SEEDS[0][13:17], "little"
    )
