"""The size model, plans of a wanted size, and files held at a size while a network trains."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import clipq
from clipq import files
from clipq.archive import encoded_size
from clipq.errors import PlanError
from clipq.formats import read_state
from clipq.hold import SHORTFALL, file_bytes, thinned
from clipq.search.allocate import fitted, trade_off
from clipq.search.groups import Theta, groups_of, quantize_group
from clipq.search.sizes import measure_sizes, pruning_rate_of, sparsity
from clipq.search.target import parse_bytes
from tests.search.nets import digits, trained_classifier

FILES = [
    "mnist_lenet300100_dense",
    "mnist_lenet5_dense",
    "cifar10_resnet20_jpegft",
    "imagenet_mobilenet_v1_0.25_224",
    "imagenet_squeezenet_v1.0_deepcompression",
]


class Weights(nn.Module):
    """The large tensors of a file, as the weights of layers."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            layer = nn.Linear(1, 1, bias=False)
            layer.weight = nn.Parameter(tensor)
            self.add_module(name.replace(".", "_"), layer)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_the_size_model_is_right_to_two_per_cent(file: str, real_data: Path) -> None:
    """For every tensor above 10,000 weights, at random θ."""
    state = read_state(real_data / "weights" / f"{file}.safetensors")
    large = {n: t for n, t in state.items() if t.dim() > 1 and t.numel() > 10_000}
    groups = groups_of(Weights(dict(list(large.items())[:6])))
    weights = dict(Weights(large).named_parameters())
    generator = random.Random(0)
    for group, size in zip(groups, measure_sizes(groups, weights, range(2, 7), 0.99), strict=True):
        for _ in range(5):
            theta = Theta(pruning_rate_of(generator.uniform(0, sparsity(0.97))), generator.choice([2, 3, 4, 5, 6]))
            out = {name: torch.empty_like(weights[name]) for name in group.tensors}
            quantize_group(group, theta, weights, out)
            real = sum(encoded_size(array) for array in files.to_arrays(out).values())
            assert abs(size.bytes(theta) - real) <= 0.02 * real + 12, (group.name, theta, size.bytes(theta), real)


@pytest.fixture(scope="module")
def sizes():
    model = trained_classifier()
    groups = groups_of(model, include=["*.bias"])
    return measure_sizes(groups, {n: p.detach() for n, p in model.named_parameters()}, range(2, 9), 0.99)


@given(
    thetas=st.lists(st.tuples(st.floats(0, 0.99), st.integers(2, 8)), min_size=4, max_size=4),
    budget=st.floats(1_000, 12_000),
)
def test_a_plan_is_fitted_to_a_budget_by_its_survivors_alone(sizes, thetas, budget) -> None:
    start = [Theta(p, b) for p, b in thetas]
    made = fitted(sizes, start, budget)
    found = sum(size.bytes(theta) for size, theta in zip(sizes, made, strict=True))
    low = sum(size.bytes(Theta(pruning_rate_of(size.highest), t.bits)) for size, t in zip(sizes, start, strict=True))
    high = sum(size.bytes(Theta(0.0, 8)) for size in sizes)
    if low < 0.99 * budget < 0.9 * high:
        assert found == pytest.approx(budget, rel=0.01)
    assert all(t.bits >= s.bits for t, s in zip(made, start, strict=True))


def test_a_larger_plan_costs_less(sizes) -> None:
    curve = trade_off(sizes, [size.distortion_at for size in sizes])
    assert len(curve) > 20
    assert all(a.bytes < b.bytes and a.cost > b.cost for a, b in itertools.pairwise(curve))


@given(st.floats(0, 0.999))
def test_sparsity_and_back(rate: float) -> None:
    assert pruning_rate_of(sparsity(rate)) == pytest.approx(rate, abs=1e-12)


@given(n=st.integers(1, 10**6), unit=st.sampled_from([("", 1), (" kB", 1000), ("MiB", 2**20), ("b", 1)]))
def test_bytes_are_read_with_their_units(n: int, unit: tuple[str, int]) -> None:
    assert parse_bytes(f"{n}{unit[0]}") == n * unit[1]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x, y = digits()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("target", [4_000, 2_500, 1_500])
def test_a_file_is_held_at_its_size_while_the_network_trains(target: int, tmp_path: Path) -> None:
    model = trained_classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    plan = clipq.Plan.uniform(model, pruning_rate=0.5, bits=5, include=["*.bias"])
    attachment = clipq.attach(model, optimizer, plan)
    holder = clipq.SizeHolder(model, attachment, target)
    for _ in range(6):
        train(model, optimizer, 8)
        holder.adjust()
    train(model, optimizer, 8)
    assert holder.finish() == file_bytes(model, attachment.plan)
    attachment.detach()
    size = clipq.save(model, tmp_path / "model.clipq", plan=attachment.plan).bytes
    assert (1 - SHORTFALL) * target <= size <= target


def test_a_new_plan_is_as_if_it_had_been_attached_first() -> None:
    models = [trained_classifier(), trained_classifier()]
    optimizers = [torch.optim.Adam(m.parameters(), lr=3e-3) for m in models]
    loose = clipq.Plan.uniform(models[0], pruning_rate=0.2, bits=5)
    tight = clipq.Plan.uniform(models[0], pruning_rate=0.9, bits=2)
    changed = clipq.attach(models[0], optimizers[0], loose)
    changed.replan(tight)
    straight = clipq.attach(models[1], optimizers[1], tight)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 3)
    assert changed.plan == straight.plan == tight
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(a, b)


def test_a_new_plan_keeps_what_the_user_wrote() -> None:
    model = trained_classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = clipq.Plan.uniform(model, pruning_rate=0.5, bits=3)
    attachment = clipq.attach(model, optimizer, plan)
    written = torch.randn(96, 64)
    with torch.no_grad():
        model[0].weight.copy_(written)
    attachment.replan(thinned(plan, 0.5))
    assert torch.equal(attachment.full_precision["0.weight"], written)
    assert (model[0].weight == 0).float().mean() == pytest.approx(0.75, abs=0.01)


def test_a_new_plan_of_other_tensors_is_refused() -> None:
    model = trained_classifier()
    plan = clipq.Plan.uniform(model, pruning_rate=0.5, bits=3)
    attachment = clipq.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), plan)
    other = clipq.Plan({name: t for name, t in plan.tensors.items() if name != "2.weight"})
    with pytest.raises(PlanError, match=r"differs in 2\.weight"):
        attachment.replan(other)
    attachment.detach()
