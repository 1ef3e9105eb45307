"""The format is what docs/format.md says: a second decoder, written from it, reads what the first one reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipq import archive
from clipq.archive import dtypes, tables
from clipq.archive.codes import decode_codebook
from clipq.archive.tiles import decode_scan
from clipq.archive.wire import Cursor
from tests import second_decoder
from tests.vectors import make

VECTORS = Path(__file__).parent.parent / "vectors"
EXPECTED = json.loads((VECTORS / "expected.json").read_text())


def test_each_vector_is_there() -> None:
    assert {path.stem for path in VECTORS.glob("*.clipq")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_both_decoders_read_the_vectors(name: str) -> None:
    path = VECTORS / f"{name}.clipq"
    with archive.Archive(path) as file:
        assert make.expected(file.read()) == EXPECTED[name]
        assert file.metadata == {"vector": name}
    second = {
        tensor: {"type": kind, "shape": list(shape), "sha256": hashlib.sha256(data).hexdigest()}
        for tensor, (kind, shape, data) in second_decoder.decode(path.read_bytes()).items()
    }
    assert second == EXPECTED[name]


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    levels=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    effort=st.sampled_from(["default", "max"]),
)
@settings(max_examples=40, deadline=None)
def test_both_decoders_agree(shape: list[int], levels: int, seed: int, effort: archive.Effort) -> None:
    rng = np.random.default_rng(seed)
    array = make.quantized(rng, tuple(shape), levels, rng.random())
    content = archive.encode_file({"w": np.tile(array, (7, *[1] * (array.ndim - 1)))}, effort=effort)
    with archive.Archive(content) as file:
        assert second_decoder.decode(content)["w"][2] == file["w"].tobytes()


def test_no_table_entry_is_near_a_rounding_boundary() -> None:
    i = np.arange(4096)
    exact = [
        256 * np.log((i + 0.5) / (4095.5 - i)),
        65536 / (1 + np.exp((2048 - i) / 256)),
        256 * np.log((np.arange(tables.LOG_ENTRIES) + 5) / 256),
    ]
    for values in exact:
        distance = np.abs(values - np.floor(values) - 0.5)
        assert distance[np.abs(values - 2048) > 1e-9].min() > 1e-6


def test_what_is_not_codes_takes_little_in_a_small_file() -> None:
    rng = np.random.default_rng(0)
    shapes = {"ip1": (300, 784), "ip2": (100, 300), "ip3": (10, 100)}
    net = {f"{name}.weight": make.quantized(rng, shape, 7, 0.025) for name, shape in shapes.items()}
    content = archive.encode_file(net)
    assert 10_000 < len(content) < 20_000
    with archive.Archive(content) as file:
        coded = 0
        for name, tensor in file.tensors.items():
            start = Cursor(file._payload(tensor, 0), name)
            decode_codebook(start, dtypes.BY_NAME[tensor.dtype][0])
            decode_scan(start, tensor.swapped)
            coded += start.left
    assert len(content) - coded <= 0.015 * len(content) + 40


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=6), kept=st.integers(0, 52), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_both_decoders_agree_on_floats(counts: list[int], kept: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = {}
    for i, (n, dtype) in enumerate((n, d) for n in counts for d in ("<f2", "<f4", "<f8")):
        bits = np.frombuffer(rng.bytes(n * np.dtype(dtype).itemsize), f"<u{dtype[-1]}")
        low = max(0, 8 * int(dtype[-1]) - 9 - kept)
        arrays[str(i)] = (bits >> low << low).view(dtype)
    content = archive.encode_file(arrays)
    second = second_decoder.decode(content)
    with archive.Archive(content) as file:
        for name, array in arrays.items():
            assert file[name].tobytes() == second[name][2] == array.tobytes()
