"""Deep Compression (Han, Mao, Dally, ICLR 2016), written for the bench: prune, share weights, Huffman.

Half of the epochs: magnitude pruning in three rounds, each layer by the same rate, what is pruned stays so. The other
half: k-means of each layer's survivors, from levels evenly spread, and training of the shared values, whose gradients
are the sums over their weights. The file has, for each layer, gaps between survivors and indices of values, both
Huffman coded, and the values in float32; biases and norms are float32.
"""

from __future__ import annotations

import heapq
import itertools
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.frontier.bench import Bench

ROUNDS = 3
GAP_BITS = 5
"""A gap of all ones means: go on by so many, no survivor here."""

Symbols = npt.NDArray[np.int64]


def deep_compression(bench: Bench, setting: str, folder: Path) -> Path:
    """One point of the curve.

    Args:
        setting: "p,b": the share of weights pruned, bits of an index.
    """
    pruned, bits = float(setting.split(",")[0]), int(setting.split(",")[1])
    epochs, weights = bench.net.epochs, bench.weights()
    half = epochs // 2
    bounds = [half * k // ROUNDS for k in range(ROUNDS + 1)]
    masks: dict[str, Tensor] = {}

    @torch.no_grad()
    def keep_pruned() -> None:
        for name, mask in masks.items():
            weights[name].mul_(mask)

    for k, (first, last) in enumerate(itertools.pairwise(bounds), start=1):
        share = 1 - (1 - pruned) ** (k / ROUNDS)
        for name, weight in weights.items():
            n = max(round(share * weight.numel()), 1)
            masks[name] = weight.detach().abs() > weight.detach().abs().flatten().kthvalue(n).values
        keep_pruned()
        bench.train(bench.network.parameters(), range(first, last), after_step=keep_pruned)

    centroids, codes = {}, {}
    for name, weight in weights.items():
        centroids[name], codes[name] = k_means(weight.detach()[masks[name]], 2**bits)

    @torch.no_grad()
    def share_weights() -> None:
        for name, weight in weights.items():
            weight.zero_()
            weight[masks[name]] = centroids[name].detach()[codes[name]]

    def sum_gradients() -> None:
        for name, weight in weights.items():
            assert weight.grad is not None
            sums = torch.zeros_like(centroids[name])
            centroids[name].grad = sums.index_add_(0, codes[name], weight.grad[masks[name]])

    share_weights()
    rest = [p for name, p in bench.network.named_parameters() if name not in weights]
    bench.train(
        [*centroids.values(), *rest], range(half, epochs), after_backward=sum_gradients, after_step=share_weights
    )
    path = folder / "model.bin"
    path.write_bytes(
        b"".join(
            encode_layer(t.numpy()) if name in weights else t.numpy().tobytes()
            for name, t in bench.float_state().items()
        )
    )
    content, at = path.read_bytes(), 0
    for name, tensor in bench.float_state().items():
        if name in weights:
            values, at = decode_layer(content, at, tensor.shape)
        else:
            values, at = np.frombuffer(content, "<f4", tensor.numel(), at), at + 4 * tensor.numel()
        tensor.copy_(torch.from_numpy(values.reshape(tensor.shape).copy()))
    return path


def k_means(values: Tensor, k: int) -> tuple[nn.Parameter, Tensor]:
    """Centroids and the index of each value; from levels evenly spread between the extremes, 50 rounds."""
    centroids = torch.linspace(float(values.min()), float(values.max()), k)
    for _ in range(50):
        codes = (values[:, None] - centroids).abs().argmin(1)
        counts = torch.bincount(codes, minlength=k)
        sums = torch.zeros(k).index_add_(0, codes, values)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return nn.Parameter(centroids), (values[:, None] - centroids).abs().argmin(1)


def encode_layer(weight: npt.NDArray[np.float32]) -> bytes:
    """One layer: its values, gaps and indices."""
    flat = weight.reshape(-1)
    places = np.flatnonzero(flat)
    values, codes = np.unique(flat[places], return_inverse=True)
    most = 2**GAP_BITS - 1
    gaps, symbols = [], []
    for gap, code in zip(np.diff(places, prepend=-1) - 1, codes, strict=True):
        gaps += [most] * (gap // most) + [gap % most]
        symbols.append(int(code))
    head = struct.pack("<HII", len(values), len(gaps), len(symbols))
    return (
        head
        + values.astype("<f4").tobytes()
        + huffman_encode(np.array(gaps, np.int64), most + 1)
        + huffman_encode(np.array(symbols, np.int64), len(values))
    )


def decode_layer(content: bytes, at: int, shape: torch.Size) -> tuple[npt.NDArray[np.float32], int]:
    """The layer that begins there, and where the next one does."""
    n_values, n_gaps, n_symbols = struct.unpack_from("<HII", content, at)
    at += 10
    values, at = np.frombuffer(content, "<f4", n_values, at), at + 4 * n_values
    most = 2**GAP_BITS - 1
    gaps, at = huffman_decode(content, at, n_gaps, most + 1)
    symbols, at = huffman_decode(content, at, n_symbols, n_values)
    steps = gaps + (gaps < most)
    places = (np.cumsum(steps) - 1)[gaps < most]
    flat = np.zeros(shape.numel(), np.float32)
    flat[places] = values[symbols]
    return flat, at


def huffman_encode(symbols: Symbols, alphabet: int) -> bytes:
    """The lengths of a canonical code, a byte each; the number of bytes that follow; the bits."""
    lengths = _lengths(np.bincount(symbols, minlength=alphabet))
    words = {symbol: f"{word:0{lengths[symbol]}b}" for symbol, word in _canonical(lengths)}
    text = "".join(words[int(s)] for s in symbols)
    bits = np.packbits(np.frombuffer(text.encode(), np.uint8) - ord("0")).tobytes()
    return bytes(lengths) + struct.pack("<I", len(bits)) + bits


def huffman_decode(content: bytes, at: int, count: int, alphabet: int) -> tuple[Symbols, int]:
    """So many symbols, and where they end."""
    lengths = list(content[at : at + alphabet])
    (n_bytes,) = struct.unpack_from("<I", content, at + alphabet)
    at += alphabet + 4
    of = {(lengths[symbol], word): symbol for symbol, word in _canonical(lengths)}
    symbols, word, length = [], 0, 0
    bits = iter(np.unpackbits(np.frombuffer(content, np.uint8, n_bytes, at)).tolist())
    while len(symbols) < count:
        word, length = word << 1 | next(bits), length + 1
        if (length, word) in of:
            symbols.append(of[length, word])
            word = length = 0
    return np.array(symbols, np.int64), at + n_bytes


def _lengths(counts: Symbols) -> list[int]:
    """Bits of each symbol's word, 0 for those that do not occur."""
    lengths = [0] * len(counts)
    heap = [(int(n), i, [i]) for i, n in enumerate(counts) if n]
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        (n, i, ours), (m, _, theirs) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in ours + theirs:
            lengths[symbol] += 1
        heapq.heappush(heap, (n + m, i, ours + theirs))
    return lengths


def _canonical(lengths: list[int]) -> list[tuple[int, int]]:
    """Symbols and words, by length and symbol."""
    word, last, found = 0, 0, []
    for length, symbol in sorted((n, s) for s, n in enumerate(lengths) if n):
        word <<= length - last
        found.append((symbol, word))
        word, last = word + 1, length
    return found
