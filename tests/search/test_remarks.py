"""Groups are named where a byte has another price than elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clipq.search.allocate import CostAt, trade_off
from clipq.search.groups import groups_of
from clipq.search.remarks import HIGH, LOW, remarks
from clipq.search.sizes import SizeModel, measure_sizes


@pytest.fixture(scope="module")
def sizes() -> list[SizeModel]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(3)), nn.Linear(40, 4, bias=False))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return measure_sizes(groups_of(model), weights, range(2, 6), 0.99)


def costs(sizes: list[SizeModel], *weights: float) -> list[CostAt]:
    def weighted(size: SizeModel, weight: float) -> CostAt:
        return lambda sparsities, bits: weight * size.distortion_at(sparsities, bits)

    return [weighted(size, weight) for size, weight in zip(sizes, weights, strict=True)]


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 10, 100, 1)])
def test_plans_that_are_best_by_the_costs_have_no_remark(sizes: list[SizeModel], weights: tuple[float, ...]) -> None:
    of = costs(sizes, *weights)
    curve = [point for point in trade_off(sizes, of) if 800 < point.bytes < 2_500]
    assert len(curve) > 5
    assert [remarks(sizes, of, point.thetas) for point in curve] == [(None,) * 4] * len(curve)


def test_groups_whose_bytes_have_another_price_are_named(sizes: list[SizeModel]) -> None:
    """The plan is for equal costs, and the third group is another."""
    curve = trade_off(sizes, costs(sizes, 1, 1, 1, 1))
    thetas = min(curve, key=lambda point: abs(point.bytes - 1_500)).thetas
    assert remarks(sizes, costs(sizes, 1, 1, 1e-3, 1), thetas) == (None, None, LOW, None)
    assert remarks(sizes, costs(sizes, 1, 1, 0, 1), thetas) == (None, None, LOW, None)
    assert remarks(sizes, costs(sizes, 1, 1, 1e3, 1), thetas)[2] == HIGH
