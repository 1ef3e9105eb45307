"""Batch norms folded: the same network in evaluation, in a smaller file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import clipq
from clipq.errors import PlanError
from clipq.hold import file_bytes
from clipq.norms import folded_norms


class Net(nn.Module):
    """A norm of every kind: plain, used twice, without weights, without statistics, sharing its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3)
        self.plain = nn.BatchNorm2d(8, eps=1e-3)
        self.second = nn.Linear(8, 8)
        self.twice = self.again = nn.BatchNorm1d(8)
        self.bare = nn.BatchNorm1d(8, affine=False)
        self.stateless = nn.BatchNorm1d(8, track_running_stats=False)
        self.sharing, self.shared = nn.BatchNorm1d(8), nn.LayerNorm(8)
        self.sharing.weight = self.shared.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.second(torch.relu(self.plain(self.first(x))).mean((2, 3))))
        x = self.stateless(self.bare(self.again(torch.relu(x))))
        return self.sharing(x) + self.shared(x)


def trained(seed: int, spread: float = 1.0) -> Net:
    """With statistics, factors and summands of any size."""
    torch.manual_seed(seed)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, spread)
            module.running_var.normal_(0, 2 * spread).exp_()
            if module.affine:
                nn.init.normal_(module.weight, 1, spread)
                nn.init.normal_(module.bias, 0, spread)
    return net.eval()


@given(st.integers(0, 2**32 - 1), st.floats(0, 2))
def test_a_folded_network_computes_the_same(seed: int, spread: float) -> None:
    net = trained(seed, spread).double()
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    expected = net(x)
    assert clipq.fold_norms(net) == ["plain", "twice", "again"]
    for norm in (net.plain, net.twice):
        assert not norm.running_mean.any()
        assert bool((norm.running_var == 1).all())
    assert torch.allclose(net(x), expected, rtol=1e-8, atol=1e-8)


def test_what_cannot_be_folded_stays_as_it_was() -> None:
    net = trained(0)
    before = copy.deepcopy(net.state_dict())
    clipq.fold_norms(net)
    for name, tensor in net.state_dict().items():
        if not name.startswith(("plain", "twice", "again")):
            assert torch.equal(tensor, before[name]), name
    assert net.again is net.twice


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_norms_that_the_plan_quantizes_are_left_to_it(part: str) -> None:
    net = trained(0)
    plan = clipq.Plan.uniform(net, pruning_rate=0, bits=3, include=[f"plain.{part}"])
    assert clipq.fold_norms(net, plan) == ["twice", "again"]


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_norm_without_a_variance_is_left_alone(value: float) -> None:
    net = trained(0)
    net.plain.running_var[3] = value
    assert clipq.fold_norms(net) == ["twice", "again"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_keep_their_dtype(dtype: torch.dtype) -> None:
    net = trained(0).to(dtype)
    expected = net.double()(torch.ones(2, 2, 6, 6).double())
    net = trained(0).to(dtype)
    clipq.fold_norms(net)
    assert net.plain.weight.dtype == net.plain.running_var.dtype == dtype
    assert torch.allclose(net.double()(torch.ones(2, 2, 6, 6).double()), expected, rtol=0, atol=0.5)


def test_folding_twice_changes_nothing_more() -> None:
    net = trained(0)
    clipq.fold_norms(net)
    before = copy.deepcopy(net.state_dict())
    clipq.fold_norms(net)
    for name, tensor in net.state_dict().items():
        assert torch.allclose(tensor, before[name], rtol=1e-6, atol=0), name


def test_a_state_from_elsewhere_is_folded_without_touching_the_network() -> None:
    net, other = trained(0), trained(1)
    before = copy.deepcopy(net.state_dict())
    new = folded_norms(net, other.state_dict())
    assert new["twice.weight"] is new["again.weight"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    clipq.fold_norms(other)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in new.items())


def test_a_network_that_is_one_norm() -> None:
    norm = nn.BatchNorm1d(4)
    norm.running_var.fill_(4.0)
    assert clipq.fold_norms(norm) == [""]
    assert torch.allclose(norm.weight, torch.full((4,), 0.5))


def test_something_else_than_a_network_is_refused() -> None:
    state: Any = {"weight": torch.ones(3)}
    with pytest.raises(PlanError, match="give the trained network"):
        clipq.fold_norms(state)


def wide() -> tuple[nn.Module, clipq.Plan]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 256, 3), nn.BatchNorm2d(256), nn.Flatten(), nn.Linear(256, 10))
    for _ in range(3):
        net(torch.randn(8, 1, 3, 3))
    nn.init.normal_(net[1].weight)
    nn.init.normal_(net[1].bias)
    return net, clipq.Plan.uniform(net, pruning_rate=0.5, bits=2)


def test_half_of_a_norms_bytes_go(tmp_path: Path) -> None:
    net, plan = wide()
    whole = clipq.save(net, tmp_path / "whole.clipq").bytes
    clipq.fold_norms(net, plan)
    folded = clipq.save(net, tmp_path / "folded.clipq").bytes
    assert whole - folded > 2 * 2 * 256  # two bytes a number at least


def test_a_file_is_held_at_the_size_that_it_ends_with() -> None:
    net, plan = wide()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    attachment = clipq.attach(net, optimizer, plan)

    def finish(state: dict[str, Tensor], plan: clipq.Plan) -> dict[str, Tensor]:
        return {**state, **folded_norms(net, state, plan)}

    wanted = round(0.95 * file_bytes(net, plan, finish=finish))
    assert clipq.SizeHolder(net, attachment, wanted, finish).finish() <= wanted
    attachment.detach()
    assert file_bytes(net, attachment.plan) > wanted + 500
    clipq.fold_norms(net, attachment.plan)
    assert 0.97 * wanted <= file_bytes(net, attachment.plan) <= wanted
