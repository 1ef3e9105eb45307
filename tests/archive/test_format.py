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
from clipq.archive import tables
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
