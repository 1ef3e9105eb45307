"""`Quantizer` gives the reference's bits, whatever the tensors, the layout, the threads and the calls before."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipq.errors import WeightError
from clipq.operator import Quantizer, QuantizerEntry
from clipq.operator.reference import clip_quantize
from tests.operator.tensors import DTYPES, bit_widths, bits_of, dtypes, pruning_rates, weights


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def quantizer(*hyperparameters: tuple[float, int]) -> Quantizer:
    return Quantizer([QuantizerEntry(f"layer{i}", p, b) for i, (p, b) in enumerate(hyperparameters)])


def quantized(weight: Tensor, pruning_rate: float, bits: int) -> Tensor:
    out = torch.full_like(weight, 7)
    quantizer((pruning_rate, bits))([weight], [out])
    return out


def assert_same_bits(ours: Tensor, reference: Tensor) -> None:
    assert ours.dtype == reference.dtype
    assert torch.equal(bits_of(ours), bits_of(reference))


@settings(max_examples=300, deadline=None)
@given(st.data(), dtypes, pruning_rates, bit_widths)
def test_equals_the_reference_bit_for_bit(data: st.DataObject, dtype: torch.dtype, p: float, b: int) -> None:
    weight = data.draw(weights(dtype, st.integers(0, 3000)))
    assert_same_bits(quantized(weight, p, b), clip_quantize(weight, p, b).quantized)


@settings(max_examples=40, deadline=None)
@given(st.data(), dtypes, st.lists(st.tuples(pruning_rates, bit_widths), min_size=1, max_size=5))
def test_what_a_quantizer_remembers_never_shows(
    data: st.DataObject, dtype: torch.dtype, hyperparameters: list[tuple[float, int]]
) -> None:
    quantize = quantizer(*hyperparameters)
    for _ in range(4):
        step = [data.draw(weights(dtype, st.integers(0, 400))) for _ in hyperparameters]
        out = [torch.empty_like(w) for w in step]
        quantize(step, out)
        for w, q, (p, b) in zip(step, out, hyperparameters, strict=True):
            assert_same_bits(q, clip_quantize(w, p, b).quantized)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_large_tensors_on_several_threads(dtype: torch.dtype, n_threads: int, threads: Callable[[int], None]) -> None:
    threads(n_threads)
    generator = torch.Generator().manual_seed(n_threads)
    quantize = quantizer((0.9, 3), (0.0, 8), (0.3, 1), (0.5, 2))
    sizes = (300_001, 400_000, 270_000, 1000)
    weight = [torch.randn(n, generator=generator) * 0.02 for n in sizes]
    for drift in (0.0, 1e-5, 1e-3, 0.5):  # from a threshold that stays where it was to one that jumps
        step = [(w * (1 + drift)).to(dtype) for w in weight]
        out = [torch.empty_like(w) for w in step]
        quantize(step, out)
        for w, q, entry in zip(step, out, quantize.entries, strict=True):
            assert_same_bits(q, clip_quantize(w, entry.pruning_rate, entry.bits).quantized)


@pytest.mark.parametrize("values", ["few distinct", "one outlier", "sorted", "all but one equal"])
def test_large_tensors_with_odd_distributions(values: str) -> None:
    n = 400_000
    weight = {
        "few distinct": lambda: torch.arange(n).remainder(5).sub(2).float(),
        "one outlier": lambda: torch.cat([torch.randn(n) * 1e-6, torch.tensor([1e30])]),
        "sorted": lambda: torch.linspace(-1, 2, n),
        "all but one equal": lambda: torch.cat([torch.full((n,), 0.5), torch.tensor([0.75])]),
    }[values]()
    for p, b in ((0.5, 3), (0.9, 1), (0.99999, 8)):
        assert_same_bits(quantized(weight, p, b), clip_quantize(weight, p, b).quantized)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "channels_last": lambda: torch.empty(8, 6, 3, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.empty(9, 7).t(),
    "every other column": lambda: torch.empty(9, 14)[:, ::2],
    "scalar": lambda: torch.empty(()),
    "empty": lambda: torch.empty(0, 3),
    "size-1 dimension with an odd stride": lambda: torch.empty(40).as_strided((5, 1, 4), (4, 17, 1)),
    "not at the start of its storage": lambda: torch.empty(50)[3:43].view(5, 8),
}


@pytest.mark.parametrize("out_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_weight_and_out(layout: str, out_layout: str) -> None:
    weight = LAYOUTS[layout]().normal_(generator=torch.Generator().manual_seed(0))
    out = LAYOUTS[out_layout]()
    if out.numel() != weight.numel():
        out = torch.empty_like(weight)
    out = out.reshape(weight.shape) if out.is_contiguous() else out
    if out.shape != weight.shape:
        out = torch.empty(weight.shape)
    before = weight.clone()
    quantizer((0.4, 3))([weight], [out])
    assert_same_bits(out, clip_quantize(weight, 0.4, 3).quantized)
    assert torch.equal(weight, before)


def test_out_of_an_expanded_weight() -> None:
    weight = torch.randn(1, 5).expand(4, 5)
    assert_same_bits(quantized(weight, 0.5, 2), clip_quantize(weight, 0.5, 2).quantized)


def test_memory_around_out_is_left_alone() -> None:
    storage = torch.full((1200,), 9.0)
    quantizer((0.5, 3))([torch.randn(1000)], [storage[100:1100]])
    assert (storage[:100] == 9).all()
    assert (storage[1100:] == 9).all()


def test_in_place() -> None:
    weight = torch.randn(5000)
    expected = clip_quantize(weight, 0.5, 3).quantized
    quantizer((0.5, 3))([weight], [weight])
    assert_same_bits(weight, expected)


def test_dtypes_may_be_mixed() -> None:
    step = [torch.randn(500 + i).to(dtype) for i, dtype in enumerate(DTYPES * 2)]
    out = [torch.empty_like(w) for w in step]
    quantizer(*[(0.5, 4)] * len(step))(step, out)
    for w, q in zip(step, out, strict=True):
        assert_same_bits(q, clip_quantize(w, 0.5, 4).quantized)


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [10, 300_000])
def test_a_weight_that_is_not_finite_is_an_error_and_nothing_is_written(
    value: float, dtype: torch.dtype, size: int
) -> None:
    good, bad = torch.randn(50).to(dtype), torch.randn(size).to(dtype)
    bad[-3] = value
    out = [torch.full_like(w, 7) for w in (good, bad)]
    quantize = quantizer((0.5, 3), (0.5, 3))
    with pytest.raises(WeightError, match=rf"layer1: 1 of {size} weights are NaN or Inf, the first at \({size - 3},\)"):
        quantize([good, bad], out)
    assert all((o == 7).all() for o in out)
    bad[-3] = 0
    quantize([good, bad], out)
    assert_same_bits(out[1], clip_quantize(bad, 0.5, 3).quantized)


def test_out_must_be_like_the_weight() -> None:
    with pytest.raises(WeightError, match=r"layer0: out is \(3, 2\)"):
        quantizer((0.5, 3))([torch.randn(2, 3)], [torch.empty(3, 2)])


def test_autograd_sees_that_out_was_written() -> None:
    parameter = torch.nn.Parameter(torch.randn(10))
    loss = (parameter**2).sum()
    quantizer((0.5, 2))([parameter.detach().clone()], [parameter.detach()])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_pickles_and_copies() -> None:
    weight, out = torch.randn(100), torch.empty(100)
    quantize = quantizer((0.5, 2))
    quantize([weight], [out])
    pickle.loads(pickle.dumps(quantize))([weight], [out])
    assert_same_bits(out, clip_quantize(weight, 0.5, 2).quantized)


FORK = """
import os, sys, torch
from clipq.operator import Quantizer, QuantizerEntry
torch.set_num_threads(2)
weight = torch.linspace(-1, 1, 600_000)
quantize = Quantizer([QuantizerEntry("layer", 0.5, 3)])
mine, child = torch.empty_like(weight), torch.empty_like(weight).share_memory_()
quantize([weight], [mine])
pid = os.fork()
if pid == 0:
    quantize([weight], [child])
    os._exit(0)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert torch.equal(mine, child)
"""


def test_works_in_a_forked_child_after_use_in_the_parent() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120, env=os.environ)


def test_importing_clipq_does_not_import_numba() -> None:
    check = "import sys, clipq, clipq.operator; assert 'numba' not in sys.modules, 'numba was imported'"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120, env=os.environ)
