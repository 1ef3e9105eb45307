"""Properties of clip, partition and quantize, as the paper defines them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

import clipq
from clipq.operator.reference import split_intervals

EXAMPLE = torch.tensor(
    [[0.1, -0.1, 0.7, -0.4], [0.7, -0.5, 0.9, -0.1], [-1.0, -0.6, -1.6, 0.8], [-0.5, 1.1, 0.2, 1.2]],
    dtype=torch.float64,
)

rates = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.999]), st.floats(0, 1, exclude_max=True))
widths = st.integers(1, 8)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=12)
# Spread-out values, and few distinct ones, which tie at thresholds and edges.
values = st.one_of(st.floats(-10, 10, width=32), st.integers(-4, 4).map(lambda i: i / 2))
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Tensor:
    array = draw(hnp.arrays("float32", draw(shapes), elements=values))
    return torch.from_numpy(array).to(dtype or draw(dtypes))


def test_the_papers_worked_example_to_the_digit() -> None:
    result = clipq.clip_quantize(EXAMPLE, 0.25, 2)
    expected = [[0, 0, 0.9, -0.5], [0.9, -0.5, 0.9, 0], [-1.3, -0.5, -1.3, 0.9], [-0.5, 0.9, 0, 0.9]]
    assert [[round(x, 12) for x in row] for row in result.quantized.tolist()] == expected
    assert [round(x, 12) for x in result.codebook.tolist()] == [-1.3, -0.5, 0.0, 0.9]
    assert result.thresholds == (-0.1, 0.2)
    assert result.codes.tolist() == [[2, 2, 3, 1], [3, 1, 3, 2], [0, 1, 0, 3], [1, 3, 2, 3]]


@given(tensors(), rates, widths)
def test_codes_codebook_and_quantized_agree(w: Tensor, p: float, b: int) -> None:
    result = clipq.clip_quantize(w, p, b)
    assert result.quantized.shape == result.codes.shape == w.shape
    assert result.quantized.dtype == result.codebook.dtype == w.dtype
    assert result.codes.dtype == torch.uint8
    assert torch.equal(result.codebook[result.codes.long()], result.quantized)
    assert (result.codebook == 0).sum() == 1
    assert (result.codebook != 0).sum() <= 2**b - 1
    assert (result.codebook.double().diff() > 0).all(), "levels ascend and are distinct"


@given(tensors(), rates, widths)
def test_each_level_is_the_mean_of_the_weights_that_take_it(w: Tensor, p: float, b: int) -> None:
    result = clipq.clip_quantize(w, p, b)
    tolerance = max(torch.finfo(w.dtype).eps, 2.0**-30)
    for code, level in enumerate(result.codebook.tolist()):
        members = w[result.codes == code].double()
        if level != 0:
            assert len(members), "an empty interval has no level"
            assert level == pytest.approx(members.mean().item(), rel=tolerance, abs=1e-6 * tolerance)


@given(tensors(), rates, widths)
def test_intervals_do_not_interleave(w: Tensor, p: float, b: int) -> None:
    result = clipq.clip_quantize(w, p, b)
    flat, codes = w.double().flatten(), result.codes.flatten().long()
    order = flat.argsort()
    kept = result.quantized.flatten()[order] != 0
    assert (codes[order][kept].diff() >= 0).all(), "a larger weight never takes a lower level"


@given(tensors(), rates)
def test_the_clipped_fraction_of_each_sign_is_the_pruning_rate_up_to_one_weight_and_ties(w: Tensor, p: float) -> None:
    result = clipq.clip_quantize(w, p, 8)
    for sign, threshold in ((1, result.thresholds.positive), (-1, result.thresholds.negative)):
        side = w[sign * w > 0].double().abs()
        clipped = (side <= abs(threshold)).sum().item()
        ties = (side == abs(threshold)).sum().item()
        assert clipped - max(ties - 1, 0) <= p * len(side) + 1
        assert clipped >= p * len(side) - 1
        inside = (sign * w > 0) & (w.double().abs() <= abs(threshold))
        assert (result.quantized[inside] == 0).all(), "every weight up to the threshold becomes zero"


@given(tensors(), st.integers(2, 8), rates)
def test_a_sign_flip_flips_the_result_up_to_the_odd_interval(w: Tensor, b: int, p: float) -> None:
    one, other = clipq.clip_quantize(w, p, b), clipq.clip_quantize(-w, p, b)
    assert other.thresholds == (-one.thresholds.positive, -one.thresholds.negative)
    assert torch.equal(one.quantized == 0, other.quantized == 0)
    ranges = [
        (side.max() - t) if len(side := (s * w[s * w > t]).float()) else torch.zeros(())
        for s, t in ((-1, -one.thresholds.negative), (1, one.thresholds.positive))
    ]
    if ranges[0] != ranges[1]:  # with equal ranges the odd interval stays with the positive side
        assert torch.equal(other.quantized, -one.quantized)


@given(tensors(), rates, widths, st.integers(0, 2**31))
def test_the_same_weights_give_the_same_bits_in_any_order_and_layout(w: Tensor, p: float, b: int, seed: int) -> None:
    result = clipq.clip_quantize(w, p, b)
    order = torch.randperm(w.numel(), generator=torch.Generator().manual_seed(seed))
    shuffled = clipq.clip_quantize(w.flatten()[order], p, b)
    assert torch.equal(shuffled.quantized, result.quantized.flatten()[order])
    if w.dim() >= 2:
        transposed = clipq.clip_quantize(w.transpose(0, 1), p, b)
        assert torch.equal(transposed.quantized, result.quantized.transpose(0, 1))


@given(tensors(torch.float32), rates, widths)
def test_the_weight_itself_is_left_alone(w: Tensor, p: float, b: int) -> None:
    before = w.clone()
    clipq.clip_quantize(w, p, b)
    assert torch.equal(w, before)


@settings(max_examples=20)
@given(st.integers(1, 8), rates)
def test_fewer_distinct_values_than_codes_are_kept_exactly_where_they_are_not_clipped(b: int, p: float) -> None:
    w = torch.tensor([-2.0, -2.0, 1.0, 1.0, 1.0, 3.0])
    result = clipq.clip_quantize(w, 0.0, b)
    if b >= 3:
        assert torch.equal(result.quantized, w)
    assert len(result.codebook) <= min(2**b, 4)


def test_ties_at_a_threshold_are_clipped_together() -> None:
    result = clipq.clip_quantize(torch.tensor([1.0, 1.0, 1.0, 2.0]), 0.25, 3)
    assert result.quantized.tolist() == [0, 0, 0, 2]


def test_without_pruning_only_zeros_become_zero() -> None:
    w = torch.tensor([0.0, 1e-8, -1e-8, 1.0, -1.0])
    result = clipq.clip_quantize(w, 0.0, 8)
    assert result.quantized.tolist() == pytest.approx(w.tolist())
    assert result.thresholds == (0.0, 0.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_one_sided_tensor_gives_all_intervals_to_its_side(sign: int) -> None:
    result = clipq.clip_quantize(sign * torch.arange(1.0, 101.0), 0.0, 3)
    assert (result.codebook != 0).sum() == 7


def test_a_constant_tensor_is_kept_or_clipped_whole() -> None:
    constant = torch.full((5,), 0.7)
    assert torch.equal(clipq.clip_quantize(constant, 0.0, 2).quantized, constant)
    assert torch.equal(clipq.clip_quantize(constant, 0.5, 2).quantized, torch.zeros(5))


def test_an_all_zero_and_an_empty_tensor_have_only_the_zero_level() -> None:
    for w in (torch.zeros(4, 3), torch.empty(0, 3)):
        result = clipq.clip_quantize(w, 0.5, 4)
        assert result.codebook.tolist() == [0.0]
        assert torch.equal(result.quantized, w)


def test_one_bit_keeps_the_side_that_loses_least() -> None:
    w = torch.tensor([0.1, 0.2, -1.0, -1.1, 3.0])
    squared_errors = {}
    for side in (1, -1):
        kept = torch.where(side * w > 0, (w[side * w > 0]).mean(), 0.0)
        squared_errors[side] = (w - kept).square().sum()
    result = clipq.clip_quantize(w, 0.0, 1)
    (level,) = result.codebook[result.codebook != 0].tolist()
    assert math.copysign(1, level) == min(squared_errors, key=squared_errors.__getitem__)


@given(widths, st.floats(0, 5), st.floats(0, 5), st.floats(0, 5), st.floats(0, 5))
def test_the_split_uses_every_interval_and_favours_the_longer_side(
    b: int, negative: float, positive: float, negative_gain: float, positive_gain: float
) -> None:
    n, m = split_intervals(b, negative, positive, negative_gain, positive_gain)
    assert n + m == (2**b - 1 if negative or positive else 0)
    assert n == 0 or negative > 0
    assert m == 0 or positive > 0
    if b > 1 and negative and positive:
        assert abs(n - m) == 1
        assert (n > m) == (negative > positive)


def test_tiny_weights_that_average_to_nothing_do_not_take_a_level() -> None:
    result = clipq.clip_quantize(torch.tensor([1e-42, 3e-42, 1.0]), 0.0, 3)
    assert result.quantized.tolist() == [0, 0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_an_error_that_names_tensor_and_place(bad: float) -> None:
    w = torch.zeros(3, 4)
    w[1, 2] = bad
    with pytest.raises(clipq.ClipqError, match=r"layer1\.weight: 1 of 12 .* \(1, 2\)"):
        clipq.clip_quantize(w, 0.5, 4, name="layer1.weight")


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan, "0.5", None, True])
def test_a_pruning_rate_out_of_range_is_an_error(p: object) -> None:
    with pytest.raises(clipq.ClipqError, match=r"w: pruning rate .* is out of range"):
        clipq.clip_quantize(torch.ones(3), p, 2, name="w")  # type: ignore[arg-type]


@pytest.mark.parametrize("b", [0, 9, 2.0, "2", None, True])
def test_a_bit_width_out_of_range_is_an_error(b: object) -> None:
    with pytest.raises(clipq.ClipqError, match=r"w: bit width .* is out of range"):
        clipq.clip_quantize(torch.ones(3), 0.5, b, name="w")  # type: ignore[arg-type]


@pytest.mark.parametrize("w", [torch.ones(3, dtype=torch.int32), torch.ones(3, 3).to_sparse()])
def test_a_tensor_of_another_kind_is_an_error(w: Tensor) -> None:
    with pytest.raises(clipq.ClipqError, match="cannot be quantized"):
        clipq.clip_quantize(w, 0.5, 2)
