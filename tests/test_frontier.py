"""The baseline that the frontier bench brings along: its file gives back what went in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.frontier.deep_compression import (
    decode_layer,
    encode_layer,
    huffman_decode,
    huffman_encode,
    k_means,
)


@st.composite
def layers(draw: st.DrawFn) -> npt.NDArray[np.float32]:
    """Sparse, of few values, with gaps of all lengths."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    values = rng.standard_normal(draw(st.integers(1, 15))).astype(np.float32)
    kept = rng.random(shape) < draw(st.floats(0, 1))
    return np.where(kept, rng.choice(values, shape), np.float32(0))


@given(layers(), layers())
def test_a_layer_comes_back_from_its_bytes(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> None:
    content, at = encode_layer(first) + encode_layer(second), 0
    for layer in (first, second):
        values, at = decode_layer(content, at, torch.Size(layer.shape))
        assert np.array_equal(values.reshape(layer.shape), layer)
    assert at == len(content)


@given(st.lists(st.integers(0, 9)))
def test_huffman_comes_close_to_the_entropy(symbols: list[int]) -> None:
    array = np.array(symbols, np.int64)
    content = huffman_encode(array, 10)
    decoded, _ = huffman_decode(content, 0, len(symbols), 10)
    assert decoded.tolist() == symbols
    counts = np.bincount(array, minlength=10)
    share = counts[counts > 0] / max(len(symbols), 1)
    entropy = -len(symbols) * float(share @ np.log2(share))
    bits = 8 * (len(content) - 10 - 4)
    assert entropy - 1e-6 <= bits < entropy + len(symbols) + 8


def test_k_means_gives_every_value_its_nearest_centroid() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    centroids, codes = k_means(values, 8)
    distances = (values[:, None] - centroids.detach()).abs()
    assert torch.equal(distances.argmin(1), codes)
    assert float(distances.min(1).values.square().mean()) < 0.05
