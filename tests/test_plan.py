"""Which parameters a plan names, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clipq import ClipqError, Plan
from clipq.plan import TensorPlan
from tests.zoo import KINDS, build


def named(model: nn.Module) -> set[str]:
    return set(Plan.uniform(model, pruning_rate=0.5, bits=2).tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_all_matrices_and_kernels_and_nothing_else(kind: str) -> None:
    model, _ = build(kind)
    assert named(model) == {name for name, p in model.named_parameters() if p.dim() >= 2}


def test_norms_biases_and_parameters_of_unknown_modules_are_left_alone() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(3, 3))

    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm((3, 3)), nn.BatchNorm1d(3), Own())
    assert named(model) == {"0.weight"}


def test_a_tied_weight_is_one_tensor() -> None:
    model, _ = build("tied")
    assert named(model) == {"embed.weight", "body.weight"}


def test_globs_add_and_remove() -> None:
    model, _ = build("bare Sequential")
    plan = Plan.uniform(model, pruning_rate=0.5, bits=2, include=["*.bias"], exclude=["0.*"])
    assert list(plan.tensors) == ["2.weight", "2.bias"]


def test_overrides_apply_by_glob_and_later_ones_win() -> None:
    model, _ = build("bare Sequential")
    plan = Plan.uniform(model, pruning_rate=0.5, bits=2)
    plan = plan.override({"*": {"bits": 3}, "2.*": {"bits": 4, "pruning_rate": 0.1}})
    assert [(t.pruning_rate, t.bits) for t in plan.tensors.values()] == [(0.5, 3), (0.1, 4)]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_matches_nothing_suggests_the_nearest_names(option: str) -> None:
    model, _ = build("tied")
    with pytest.raises(ClipqError, match=r"'embed\.wieght' matches no .*embed\.weight"):
        Plan.uniform(model, pruning_rate=0.5, bits=2, **{option: ["embed.wieght"]})
    plan = Plan.uniform(model, pruning_rate=0.5, bits=2)
    with pytest.raises(ClipqError, match=r"'embed\.wieght' matches no .*embed\.weight"):
        plan.override({"embed.wieght": {"bits": 3}})


def test_an_override_of_something_else_is_refused() -> None:
    model, _ = build("tied")
    with pytest.raises(ClipqError, match="sets density"):
        Plan.uniform(model, pruning_rate=0.5, bits=2).override({"*": {"density": 0.5}})


def test_a_model_without_anything_to_compress_is_refused() -> None:
    with pytest.raises(ClipqError, match="no parameter to compress"):
        Plan.uniform(nn.BatchNorm1d(3), pruning_rate=0.5, bits=2)
    with pytest.raises(ClipqError, match="lazy"):
        Plan.uniform(nn.LazyLinear(3), pruning_rate=0.5, bits=2)


@given(
    st.dictionaries(
        st.text(min_size=1),
        st.builds(
            TensorPlan,
            shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
            pruning_rate=st.floats(0, 1, exclude_max=True),
            bits=st.integers(1, 8),
        ),
        min_size=1,
    )
)
def test_json_round_trips(tensors: dict[str, TensorPlan]) -> None:
    plan = Plan(tensors)
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_file_round_trips(tmp_path: Path) -> None:
    model, _ = build("tied")
    plan = Plan.uniform(model, pruning_rate=0.5, bits=2)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (('"bits": 2', '"bit": 2'), r"unknown field \(did you mean 'bits'\?\)"),
        (('"bits": 2', '"bits": 12'), "bit width 12 is out of range"),
        (('"bits": 2', '"bits": "2"'), "bits: .*integer"),
        (('"pruning_rate": 0.5', '"pruning_rate": 1.0'), "pruning rate 1.0 is out of range"),
        (('"version": 1', '"version": 2'), "version"),
        (('"clipq-plan"', '"other"'), "format"),
        (("{", "["), "invalid JSON"),
    ],
)
def test_a_damaged_plan_is_refused_with_the_place(damage: tuple[str, str], message: str) -> None:
    model, _ = build("tied")
    text = Plan.uniform(model, pruning_rate=0.5, bits=2).to_json().replace(*damage, 1)
    with pytest.raises(ClipqError, match=message):
        Plan.from_json(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClipqError, match=r"none\.json: cannot be read"):
        Plan.load(tmp_path / "none.json")


def test_a_plan_for_another_model_lists_every_difference() -> None:
    plan = Plan.uniform(build("tied")[0], pruning_rate=0.5, bits=2)
    other = nn.Module()
    other.embed = nn.Embedding(12, 9)
    with pytest.raises(ClipqError) as caught:
        plan.check(other)
    assert "embed.weight: shape (12, 8) in the plan, (12, 9) in the model" in str(caught.value)
    assert "body.weight: not a parameter of the model" in str(caught.value)


def test_both_names_of_a_tied_weight_are_refused() -> None:
    model, _ = build("tied")
    plan = Plan.uniform(model, pruning_rate=0.5, bits=2)
    both = Plan({**plan.tensors, "head.weight": plan.tensors["embed.weight"]})
    with pytest.raises(ClipqError, match=r"head\.weight: is tied to embed\.weight"):
        both.check(model)
