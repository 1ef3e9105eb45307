"""The file of a fitted plan is never above the target, however small the net."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import clipq
from clipq import Target
from clipq.errors import SearchError
from clipq.hold import SHORTFALL, SizeHolder, file_bytes, thinned
from clipq.search import Settings, run_search
from clipq.search.allocate import largest
from clipq.search.fit import fit, larger_plans, smallest_file
from clipq.search.groups import Theta, groups_of, plan_of, quantize_group
from clipq.search.sizes import measure_sizes

SHAPES = st.lists(st.integers(1, 9), min_size=2, max_size=4)


def net(widths: list[int], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(widths)))


class Sized:
    """A small net with its size model, and the bytes of its file at any θ."""

    def __init__(self, widths: list[int], seed: int, biases: bool) -> None:
        self.model = net(widths, seed)
        self.groups = groups_of(self.model, include=["*.bias"] if biases else [])
        self._weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.sizes = measure_sizes(self.groups, self._weights, range(2, 9), 0.998)

    def bytes(self, thetas: tuple[Theta, ...]) -> int:
        with torch.no_grad():
            for group, theta in zip(self.groups, thetas, strict=True):
                quantize_group(group, theta, self._weights, dict(self.model.named_parameters()))
        return file_bytes(self.model, plan_of(self.groups, thetas))

    def extremes(self) -> tuple[int, int]:
        low = smallest_file(self.sizes, self.bytes)[1]
        return low, max(low, self.bytes(largest(self.sizes)))


@settings(max_examples=20, deadline=None)
@given(widths=SHAPES, seed=st.integers(0, 5), biases=st.booleans(), where=st.floats(0, 1.1), data=st.data())
def test_the_file_meets_the_target(
    widths: list[int], seed: int, biases: bool, where: float, data: st.DataObject
) -> None:
    sized = Sized(widths, seed, biases)
    theta = st.builds(Theta, st.floats(0, 0.99), st.integers(2, 8))
    start = data.draw(st.lists(theta, min_size=len(sized.groups), max_size=len(sized.groups)))
    low, high = sized.extremes()
    target = low + round(where * (high - low))
    thetas, found = fit(sized.sizes, start, target, sized.bytes)
    assert found == sized.bytes(thetas) <= target
    if found < (1 - SHORTFALL) * target:
        assert not any(found < sized.bytes(larger) <= target for larger in larger_plans(sized.sizes, thetas))


@settings(max_examples=3, deadline=None)
@given(widths=SHAPES, where=st.floats(-0.05, 1))
def test_a_search_on_a_few_weights_meets_the_target_or_names_the_nearest(widths: list[int], where: float) -> None:
    sized = Sized(widths, 0, biases=True)
    low, high = sized.extremes()
    target = Target(bytes=low + round(where * (high - low)))
    model, x = net(widths, 0), torch.randn(16, widths[0])
    wanted = model(x).detach()

    def search() -> int:
        quick = Settings(evaluations=2, refinements=1)
        return run_search(
            model, lambda m: float((m(x) - wanted).square().mean()), target, settings=quick, include=["*.bias"]
        ).bytes

    assert isinstance(target.bytes, int)
    if target.bytes < low:
        with pytest.raises(SearchError, match=f"the smallest file the search can reach has {low} bytes"):
            search()
    else:
        assert search() <= target.bytes


@settings(max_examples=15, deadline=None)
@given(widths=SHAPES, seed=st.integers(0, 3), bits=st.integers(1, 8), where=st.floats(0, 1))
def test_the_holder_ends_below_whatever_can_be_met(widths: list[int], seed: int, bits: int, where: float) -> None:
    model = net(widths, seed)
    plan = clipq.Plan.uniform(model, pruning_rate=0.5, bits=bits)
    attachment = clipq.attach(model, torch.optim.SGD(model.parameters(), lr=0.0), plan)
    ends = []
    for factor in (0.0, 1e9):  # one survivor a tensor; all of them
        attachment.replan(thinned(plan, factor))
        ends.append(file_bytes(model, attachment.plan))
    attachment.replan(plan)
    target = round(ends[0] + where * max(ends[1] - ends[0], 0))
    assert SizeHolder(model, attachment, target).finish() == file_bytes(model, attachment.plan) <= target
