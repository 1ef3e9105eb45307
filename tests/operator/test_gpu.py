"""The Triton kernels give the reference's bits, wait for nothing and can be captured.

Most of this runs on a GPU, and also without one, by Triton's interpreter in a process of its own; there are as many
examples as the interpreter has patience for. What is about the device itself runs on a GPU alone.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import clipq
from clipq.errors import WeightError
from clipq.operator import Quantizer, QuantizerEntry
from clipq.operator.reference import clip_quantize
from clipq.operator.split import part_of
from tests.operator.tensors import bit_widths, bits_of, pruning_rates, weights

pytest.importorskip("triton", reason="needs Triton")

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
EXAMPLES = 300 if ON_GPU else 25
PHASES = (Phase.explicit, Phase.generate)  # to shrink a failing example takes the interpreter minutes
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

if ON_GPU or INTERPRETED:
    from clipq.operator.gpu import GpuQuantizer


def kernels_run(test: Any) -> Any:
    """Marks a test of the kernels, on a GPU or by the interpreter."""
    skip = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="on a GPU, or by the interpreter in another process")
    return pytest.mark.gpu(skip(test))


def only_on_gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not ON_GPU, reason="needs a GPU")(test))


def quantizer(*hyperparameters: tuple[float, int]) -> GpuQuantizer:
    return GpuQuantizer([QuantizerEntry(f"layer{i}", p, b) for i, (p, b) in enumerate(hyperparameters)], DEVICE)


def quantized(quantize: GpuQuantizer, step: list[Tensor]) -> list[Tensor]:
    step = [w.to(DEVICE) for w in step]
    before = [w.clone() for w in step]
    out = [torch.full_like(w, 7) for w in step]
    quantize(range(len(step)), [part_of(w, "layer") for w in step], out)
    quantize.check()
    assert all(torch.equal(bits_of(w), bits_of(b)) for w, b in zip(step, before, strict=True)), "the weight was changed"
    return [o.cpu() for o in out]


def assert_same_bits(ours: Tensor, reference: Tensor) -> None:
    assert ours.dtype == reference.dtype
    assert torch.equal(bits_of(ours), bits_of(reference))


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="this is the other process, or there is a GPU")
def test_the_kernels_by_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", str(Path(__file__))]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"[1-9]\d* passed", run.stdout)


@kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=EXAMPLES, deadline=None, phases=PHASES)
@given(st.data(), pruning_rates, bit_widths)
def test_equals_the_reference_bit_for_bit(dtype: torch.dtype, data: st.DataObject, p: float, b: int) -> None:
    weight = data.draw(weights(dtype, st.integers(0, 3000)))
    assert_same_bits(quantized(quantizer((p, b)), [weight])[0], clip_quantize(weight, p, b).quantized)


@kernels_run
@settings(max_examples=EXAMPLES // 4, deadline=None, phases=PHASES)
@given(st.data(), st.lists(st.tuples(pruning_rates, bit_widths, st.sampled_from(DTYPES)), min_size=1, max_size=4))
def test_what_is_kept_from_call_to_call_never_shows(
    data: st.DataObject, layers: list[tuple[float, int, torch.dtype]]
) -> None:
    quantize = quantizer(*((p, b) for p, b, _ in layers))
    for _ in range(3):
        step = [data.draw(weights(dtype, st.integers(0, 400))) for _, _, dtype in layers]
        for w, q, (p, b, _) in zip(step, quantized(quantize, step), layers, strict=True):
            assert_same_bits(q, clip_quantize(w, p, b).quantized)


@kernels_run
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_programs_a_tensor_and_thresholds_that_stay_or_jump(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    hyperparameters = ((0.9, 3), (0.0, 8), (0.3, 1), (0.5, 2))
    quantize = quantizer(*hyperparameters)
    start = [torch.randn(n, generator=generator) * 0.02 for n in (40_001, 16_384, 1000, 300)]
    for drift in (0.0, 1e-5, 1e-3, 0.5):
        step = [(w * (1 + drift)).to(dtype) for w in start]
        for w, q, (p, b) in zip(step, quantized(quantize, step), hyperparameters, strict=True):
            assert_same_bits(q, clip_quantize(w, p, b).quantized)


@kernels_run
@pytest.mark.parametrize("values", ["few distinct", "one outlier", "sorted", "all but one equal"])
def test_odd_distributions(values: str) -> None:
    n = 20_000
    weight = {
        "few distinct": lambda: torch.arange(n).remainder(5).sub(2).float(),
        "one outlier": lambda: torch.cat([torch.randn(n) * 1e-6, torch.tensor([1e30])]),
        "sorted": lambda: torch.linspace(-1, 2, n),
        "all but one equal": lambda: torch.cat([torch.full((n,), 0.5), torch.tensor([0.75])]),
    }[values]()
    for p, b in ((0.5, 3), (0.9, 1), (0.99999, 8)):
        assert_same_bits(quantized(quantizer((p, b)), [weight])[0], clip_quantize(weight, p, b).quantized)


@kernels_run
def test_in_place_at_any_address_and_nothing_beside_it_is_written() -> None:
    for offset in (0, 1, 3, 8):
        storage = torch.full((3000,), 9.0, device=DEVICE)
        weight = storage[offset : offset + 2500]
        weight.copy_(torch.randn(2500))
        expected = clip_quantize(weight.cpu(), 0.5, 3).quantized
        quantize = quantizer((0.5, 3))
        quantize([0], [part_of(weight, "layer")], [weight])
        assert_same_bits(weight.cpu(), expected)
        assert (storage[:offset] == 9).all()
        assert (storage[offset + 2500 :] == 9).all()


@kernels_run
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_not_finite_is_told_later_and_nothing_is_written_until_then(
    value: float, dtype: torch.dtype
) -> None:
    good, bad = torch.randn(50).to(DEVICE), torch.randn(3000).to(dtype).to(DEVICE)
    out = [torch.full_like(w, 7) for w in (good, bad)]
    quantize = quantizer((0.5, 3), (0.5, 3))
    bad[-3] = value
    quantize([0, 1], [part_of(good, "good"), part_of(bad, "bad")], out)  # says nothing: that would be to wait
    if ON_GPU:
        torch.cuda.synchronize()
    assert all((o == 7).all() for o in out)
    bad[-3] = 0
    with pytest.raises(WeightError, match=r"^layer1: had NaN or Inf in an earlier step"):
        quantize([0, 1], [part_of(good, "good"), part_of(bad, "bad")], out)
    assert all((o == 7).all() for o in out)
    quantize([0, 1], [part_of(good, "good"), part_of(bad, "bad")], out)
    quantize.check()
    for o, w in zip(out, (good, bad), strict=True):
        assert_same_bits(o.cpu(), clip_quantize(w.cpu(), 0.5, 3).quantized)


@kernels_run
def test_check_waits_for_the_news() -> None:
    weight = torch.tensor([1.0, float("nan")], device=DEVICE)
    quantize = quantizer((0.5, 3))
    quantize.check()
    quantize([0], [part_of(weight, "layer")], [weight])
    with pytest.raises(WeightError, match=r"^layer0: had NaN or Inf"):
        quantize.check()
    quantize.check()


@kernels_run
def test_pickles_and_copies() -> None:
    weight = torch.randn(100)
    expected = clip_quantize(weight, 0.5, 2).quantized
    quantize = quantizer((0.5, 2))
    assert_same_bits(quantized(quantize, [weight])[0], expected)
    for again in (pickle.loads(pickle.dumps(quantize)), copy.deepcopy(quantize)):
        assert_same_bits(quantized(again, [weight])[0], expected)


SIGNATURES = {
    "count": ("jobs:i64 work:i32 sides:i32 bins:i32", "DTYPE KEY_SHIFT CHUNK TILE", 4),
    "settle": ("jobs:i64 sides:i32 bins:i32 flags:i32", "KEY_SHIFT LEAST_REACH MOST_REACH", 16),
    "add_up": ("jobs:i64 work:i32 sides:i32 counts:i32 sums:i64", "DTYPE SLOTS COLUMNS CHUNK TILE", 4),
    "round_levels": ("jobs:i64 sides:i32 counts:i32 sums:i64 levels:i32", "DTYPE SLOTS COLUMNS", 8),
    "assign": ("jobs:i64 work:i32 sides:i32 levels:i32 flags:i32", "DTYPE ALIGNED SLOTS CHUNK TILE", 4),
}


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("kernel", SIGNATURES)
def test_compiled_kernels_round_as_the_reference_and_add_no_floats_atomically(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from clipq.operator import gpu, gpu_clip, gpu_quantize

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers, constants, warps = SIGNATURES[kernel]
    types = {name: f"*{kind}" for name, kind in (p.split(":") for p in pointers.split())}
    function = getattr(gpu_clip if kernel in ("count", "settle") else gpu_quantize, kernel)
    for dtype, (code, key_shift) in gpu._STORAGE.items():
        values = {"DTYPE": code, "KEY_SHIFT": key_shift, "CHUNK": gpu.CHUNK, "TILE": gpu.TILE, "ALIGNED": True}
        values |= {"SLOTS": 8, "COLUMNS": 256, "LEAST_REACH": 2047, "MOST_REACH": 1 << 21}
        source = ASTSource(
            fn=function,
            signature={name: types.get(name, "constexpr") for name in function.arg_names},
            constexprs={name: values[name] for name in constants.split()},
            attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name in types},
        )
        options = {"num_warps": warps, "enable_fp_fusion": False}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.asm["cubin"]
        ptx = compiled.asm["ptx"]
        assert not re.search(r"\bfma\.|\.ftz|div\.full|div\.approx|rcp\.", ptx), "rounds as the reference"
        assert not re.search(r"(atom|red)\.\S*\.b?f(16|32|64)", ptx), "no order of float sums can show"
        if kernel == "assign":
            wide = "v4.b32" if dtype == torch.float32 else r"v[24].b(16|32)"
            assert re.search(rf"st\.global\.\S*{wide}", ptx), "stores are wide"


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Within this, whatever makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@only_on_gpu
def test_no_call_waits_for_the_device_not_even_the_first(no_waiting: None) -> None:
    quantize = Quantizer([QuantizerEntry("a", 0.9, 3), QuantizerEntry("b", 0.5, 6)])
    step = [torch.randn(100_000, device=DEVICE), torch.randn(3, 700, device=DEVICE, dtype=torch.bfloat16)]
    for _ in range(5):
        quantize(step, [torch.empty_like(w) for w in step])


@only_on_gpu
def test_no_training_step_waits_for_the_device(request: pytest.FixtureRequest) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attachment = clipq.attach(model, optimizer, clipq.Plan.uniform(model, pruning_rate=0.5, bits=3))
    images = torch.randn(32, 64, device=DEVICE)
    request.getfixturevalue("no_waiting")
    for _ in range(4):
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # weights swapped for others and back: what a weight average does
            before = model[0].weight.clone()
            model[0].weight.zero_()
            model[0].weight.copy_(before)
    torch.cuda.set_sync_debug_mode("default")
    for name, full in attachment.full_precision.items():
        assert_same_bits(model.get_parameter(name).detach().cpu(), clip_quantize(full.cpu(), 0.5, 3).quantized)


@only_on_gpu
def test_a_captured_graph_quantizes_what_the_weights_are_when_it_is_replayed() -> None:
    hyperparameters = ((0.9, 3), (0.3, 1), (0.0, 8))
    quantize = Quantizer([QuantizerEntry(f"layer{i}", p, b) for i, (p, b) in enumerate(hyperparameters)])
    step = [torch.randn(n, device=DEVICE) for n in (300_000, 1000, 17)]
    out = [torch.empty_like(w) for w in step]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        quantize(step, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        quantize(step, out)
    for _ in range(3):
        for w in step:
            w.normal_()
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        for w, q, (p, b) in zip(step, out, hyperparameters, strict=True):
            assert_same_bits(q.cpu(), clip_quantize(w.cpu(), p, b).quantized)
    step[1][5] = float("nan")
    graph.replay()
    with pytest.raises(WeightError, match=r"^layer1: had NaN or Inf"):
        quantize.check()


@only_on_gpu
def test_a_captured_training_step_trains() -> None:
    model = nn.Linear(64, 64).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = clipq.attach(model, optimizer, clipq.Plan.uniform(model, pruning_rate=0.5, bits=3))
    images = torch.randn(32, 64, device=DEVICE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(images).square().mean().backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    before = attachment.full_precision["weight"].clone()
    graph.replay()
    torch.cuda.synchronize()
    full = attachment.full_precision["weight"]
    assert not torch.equal(full, before)
    assert_same_bits(model.weight.detach().cpu(), clip_quantize(full.cpu(), 0.5, 3).quantized)


@only_on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_tensors_have_the_processors_bits_every_time(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(37_748_736, generator=generator) * 0.01).to(dtype)
    for p, b in ((0.9, 3), (0.0, 8), (0.5, 1)):
        expected = torch.empty_like(weight)
        Quantizer([QuantizerEntry("fc6", p, b)])([weight], [expected])
        quantize = quantizer((p, b))
        for _ in range(3):
            assert_same_bits(quantized(quantize, [weight])[0], expected)


@only_on_gpu
def test_float64_is_quantized_by_the_reference() -> None:
    weight = torch.randn(1000, dtype=torch.float64, device=DEVICE)
    out = torch.empty_like(weight)
    Quantizer([QuantizerEntry("layer", 0.5, 3)])([weight], [out])
    assert_same_bits(out.cpu(), clip_quantize(weight.cpu(), 0.5, 3).quantized)


@only_on_gpu
def test_any_layout_of_weight_and_out() -> None:
    weight = torch.randn(8, 6, 3, 3, device=DEVICE)
    expected = clip_quantize(weight.cpu(), 0.4, 3).quantized
    for source in (weight, weight.to(memory_format=torch.channels_last)):
        for target in (torch.empty_like(weight), torch.empty(8, 6, 3, 6, device=DEVICE)[..., ::2]):
            quantize = Quantizer([QuantizerEntry("layer", 0.4, 3)])
            quantize([source], [target])
            quantize.check()
            assert_same_bits(target.cpu(), expected)
