"""The baselines that the frontier bench brings along: their files give back what went in, and count all of it."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.frontier.__main__ import of_clipq, table
from benchmarks.frontier.bench import Bench
from benchmarks.frontier.characters import CHARACTERS, LENGTH, Transformer
from benchmarks.frontier.deep_compression import (
    decode_layer,
    encode_layer,
    huffman_decode,
    huffman_encode,
    k_means,
)
from benchmarks.frontier.others import FILTERS, Coded, LearnedStep, through_a_file
from benchmarks.frontier.variants import RULES, Frozen, equalize, split_by_error, unchanged
from benchmarks.frontier.variants import k_means as by_k_means
from clipq.models import build
from clipq.operator import QuantizerEntry, clip_quantize


class Small(Bench):
    """A network with what none of the codes covers: biases, a batch norm and its statistics."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network: Any = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(54, 10))
        self.network(torch.randn(8, 2, 5, 5))


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


def test_a_file_of_steps_holds_all_of_the_network(tmp_path: Path) -> None:
    bench = Small()
    layers = [bench.network[0], bench.network[3]]
    steps = {layer: LearnedStep(layer.weight, 3) for layer in layers}
    expected = {layer: step(layer.weight).detach() for layer, step in steps.items()}
    codes = {layer: Coded(step.codes(layer.weight) + 3, step.step.detach(), 3) for layer, step in steps.items()}
    rest = 4 * (6 + 4 * 6 + 10)
    path = through_a_file(bench, list(bench.float_state()), codes, 3, tmp_path)
    for layer in layers:
        assert torch.allclose(layer.weight, expected[layer], atol=1e-7)
    incompressible = sum(3 * layer.weight.numel() // 8 for layer in layers) // 2
    assert path.stat().st_size > rest + 2 * 4 + incompressible


def test_a_file_of_tables_holds_their_values(tmp_path: Path) -> None:
    bench = Small()
    layer = bench.network[3]
    table = torch.tensor([-0.5, 0.0, 0.25, 1.5])
    codes = torch.randint(4, layer.weight.shape, generator=torch.Generator().manual_seed(1))
    path = through_a_file(bench, list(bench.float_state()), {layer: Coded(codes, table, None)}, 2, tmp_path)
    assert torch.equal(layer.weight, table[codes])
    content = path.read_bytes()
    convolution = bench.network[0].weight.detach().numpy().tobytes()
    assert convolution in content
    at = content.index(table.numpy().tobytes()) + 16
    packed = np.frombuffer(lzma.decompress(content[at:], lzma.FORMAT_RAW, filters=FILTERS), np.uint8)
    first = [int(b) for b in np.unpackbits(packed)[:8]]
    assert [2 * first[k] + first[k + 1] for k in range(0, 8, 2)] == codes.flatten()[:4].tolist()


def test_the_transformer_sees_no_later_characters() -> None:
    torch.manual_seed(0)
    network = Transformer().eval()
    text = torch.randint(CHARACTERS, (2, LENGTH))
    changed = text.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % CHARACTERS
    before, after = network(text), network(changed)
    assert before.shape == (2, CHARACTERS, LENGTH)
    assert torch.allclose(before[..., :40], after[..., :40], atol=1e-5)
    assert not torch.allclose(before[..., 40:], after[..., 40:], atol=1e-2)


@st.composite
def trained(draw: st.DrawFn) -> tuple[Tensor, QuantizerEntry]:
    """Weights as of a layer, and what is planned for it."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    weight = torch.randn(draw(st.integers(2, 30)), draw(st.integers(2, 30)), generator=rng)
    return weight, QuantizerEntry("w", draw(st.floats(0, 0.99)), draw(st.integers(1, 4)))


@given(trained())
def test_variants_start_from_the_operator_as_it_is(of: tuple[Tensor, QuantizerEntry]) -> None:
    weight, entry = of
    expected = clip_quantize(weight, entry.pruning_rate, entry.bits).quantized
    assert torch.allclose(unchanged(weight, entry), expected, atol=1e-6)


@given(trained())
def test_variants_prune_as_planned_in_as_many_levels(of: tuple[Tensor, QuantizerEntry]) -> None:
    weight, entry = of
    plain = unchanged(weight, entry)
    for name, rule in RULES.items():
        made = rule(weight, entry)
        assert len(made.unique()) <= 2**entry.bits
        assert not made[plain == 0].any()
        assert name == "priced" or bool(((made != 0) == (plain != 0)).all())


@given(trained())
def test_variants_that_lessen_the_error_do(of: tuple[Tensor, QuantizerEntry]) -> None:
    weight, entry = of
    for rule in (split_by_error, by_k_means):
        less, plain = (float((weight - f(weight, entry)).double().square().sum()) for f in (rule, unchanged))
        assert less <= plain * (1 + 1e-6)


def test_frozen_codes_stay_while_their_levels_move() -> None:
    weight, entry = torch.randn(30, 30, generator=torch.Generator().manual_seed(0)), QuantizerEntry("w", 0.8, 2)
    rule = Frozen(1)
    before = [rule(weight, entry) for _ in range(2)][1]
    assert torch.allclose(before, unchanged(weight, entry), atol=1e-6)
    assert torch.allclose(rule(-2 * weight, entry), -2 * before)
    assert torch.allclose(rule(weight, QuantizerEntry("w", 0.5, 2)), before)


def test_equalized_channels_make_the_same_network() -> None:
    network = build("resnet-20").eval()
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 32, 32, generator=rng)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.dim() == 1:
                tensor.uniform_(0.1, 2, generator=rng)
            if tensor.dim() == 4:
                tensor *= torch.empty(len(tensor), 1, 1, 1).uniform_(0.5, 1.5, generator=rng)
        convolutions = [p for p in network.parameters() if p.dim() == 4]
        before, squares = network(images), [float(p.square().mean()) for p in convolutions]
        assert equalize(network) == len(convolutions) == 19
        assert torch.allclose(network(images), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
        for weight, square in zip(convolutions, squares, strict=True):
            of_channels = weight.square().mean((1, 2, 3))
            assert torch.allclose(of_channels, torch.full_like(of_channels, square), rtol=1e-3)


def test_bytes_at_an_error_lie_on_the_lines_between_the_best_points() -> None:
    curve = [(8000.0, 1.3), (1000.0, 2.0), (4000.0, 1.0), (2000.0, 2.5)]  # two are beaten in both
    assert of_clipq(curve, 8000, 1.5) == "2,000 (-75 %)"
    assert of_clipq(curve, 8000, 1.0) == "4,000 (-50 %)"
    assert of_clipq(curve, 8000, 9.0) == "≤ 1,000 (-88 %)"
    assert of_clipq(curve, 500, 2.0) == "1,000 (+100 %)"
    assert of_clipq(curve, 8000, 0.99) == "–"


def test_peers_are_shown_before_clipq_has_run() -> None:
    run = {"bytes": 100, "error": 1.0, "validation_error": 1.0}
    results = {"float": {"lenet-5": {"bytes": 400, "error": 1.0}}, "runs": {"lenet-5 qat 2 0": run}}
    assert "| quantization-aware training | 2 | 100 | 4× |" in table("lenet-5", ["clipq", "qat"], results)
    results["runs"] |= {"lenet-5 clipq 4000 0": run | {"bytes": 25}}
    assert "25 (-75 %)" in table("lenet-5", ["clipq", "qat"], results)
