"""From a model and a target to a plan whose file meets it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clipq
from clipq import Target
from clipq.attach import attach
from clipq.errors import PlanError, SearchError
from clipq.hold import file_bytes
from clipq.search import Settings, run_search
from clipq.search.candidates import KINDS, STARTING_PLANS, kind_of
from clipq.search.predict import SCREENING
from tests.search.nets import (
    classification_loss,
    digits,
    small_regression,
    trained_classifier,
    trained_language_model,
    trained_regression,
)

QUICK = Settings(evaluations=4, refinements=3)


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    """Trained; a search leaves it as it was."""
    return trained_classifier(60)


def file_of(model: nn.Module, plan: clipq.Plan) -> int:
    """Quantize a model by a plan, without training; the bytes of its file."""
    attach(model, torch.optim.SGD(model.parameters(), lr=0.1), plan).detach()
    return file_bytes(model, plan)


@pytest.mark.parametrize("ratio", [6, 12, 25])
def test_the_file_of_the_plan_meets_a_ratio(ratio: float, classifier: nn.Module) -> None:
    model = copy.deepcopy(classifier)
    record = run_search(model, classification_loss, Target(ratio=ratio), settings=QUICK, include=["*.bias"])
    size = file_of(model, record.plan)
    assert size == record.bytes
    assert 0.98 * record.float32_bytes / ratio <= size <= record.float32_bytes / ratio


@pytest.mark.parametrize("make", [trained_regression, trained_language_model])
def test_any_cost_can_be_searched_with(make) -> None:
    model, cost = make()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = clipq.search(model, cost, Target(ratio=7), settings=QUICK)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    own = {t.data_ptr(): t.numel() for t in model.state_dict().values()}
    target = 4 * sum(own.values()) / 7
    assert 0.97 * target <= file_of(model, plan) <= target


def test_it_finds_what_matters() -> None:
    """Of two equal layers, one that the cost does not see is pruned more."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"seen": nn.Linear(100, 100), "unseen": nn.Linear(100, 100)})
    x = torch.randn(64, 100)
    with torch.no_grad():
        wanted = model["seen"](x)

    def cost(m: nn.Module) -> float:
        return float((m["seen"](x) - wanted).square().mean() + 1e-3 * m["unseen"](x).square().mean().clamp(max=1.0))

    plan = clipq.search(model, cost, Target(ratio=12), settings=QUICK)
    seen, unseen = plan.tensors["seen.weight"], plan.tensors["unseen.weight"]
    assert unseen.pruning_rate > seen.pruning_rate + 0.2


@pytest.mark.parametrize("validated", [False, True])
def test_a_drop_is_kept(validated: bool, classifier: nn.Module) -> None:
    x, y = digits()

    def validate(network: nn.Module) -> float:
        return float(F.cross_entropy(network(x[500:]), y[500:]))

    base = (validate if validated else classification_loss)(classifier)
    record = run_search(
        classifier,
        classification_loss,
        Target(max_drop=0.1),
        settings=QUICK,
        include=["*.bias"],
        validate=validate if validated else None,
    )
    assert record.drop <= 0.1
    file_of(model := copy.deepcopy(classifier), record.plan)
    found = (validate if validated else classification_loss)(model) - base
    assert record.drop == pytest.approx(found, abs=1e-6)
    assert record.bytes < record.float32_bytes / 5


def test_the_papers_search_follows_its_knob(classifier: nn.Module) -> None:
    settings = Settings(method="layerwise", evaluations=9)
    sizes = [
        run_search(classifier, classification_loss, Target(trade_off=trade_off), settings=settings).bytes
        for trade_off in (0.1, 10.0)
    ]
    assert sizes[1] < 0.8 * sizes[0]


def test_a_search_is_repeatable() -> None:
    model, cost = small_regression()
    settings = Settings(evaluations=3, refinements=9)
    plans = [clipq.search(model, cost, Target(ratio=5), settings=settings) for _ in range(2)]
    assert plans[0] == plans[1]


def test_recover_is_what_candidates_are_judged_by(classifier: nn.Module) -> None:
    model = classifier
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shares = []

    def recover(network: nn.Module, plan: clipq.Plan, file_bytes: int, share: float) -> clipq.Plan:
        attachment = clipq.attach(network, torch.optim.SGD(network.parameters(), lr=0.0), plan)
        assert clipq.SizeHolder(network, attachment, file_bytes).finish() <= file_bytes
        shares.append(share)
        attachment.detach()
        return attachment.plan

    settings = Settings(evaluations=3, refinements=3)
    record = run_search(model, classification_loss, Target(ratio=15), settings=settings, recover=recover)
    screened = [e.cost for e in record.evaluations if e.stage in ("candidates", "refine")]
    judged = [e.cost for e in record.evaluations if e.stage == "finalists"]
    assert shares == [SCREENING] * len(screened) + [1.0] * (len(judged) + 1)  # and once more for the plan's own file
    assert len(screened) == STARTING_PLANS + 3
    kinds = {kind_of(e.name) for e in record.evaluations if e.stage == "candidates"}
    assert len(kinds) == KINDS
    for kind in kinds:
        of_kind = [e.cost for e in record.evaluations if e.stage == "candidates" and kind_of(e.name) == kind]
        assert min(of_kind) == pytest.approx(min(judged, key=lambda cost: abs(cost - min(of_kind))))
    assert min(judged) <= min(screened)  # this recover only fits the size: its share makes no difference
    assert record.bytes <= record.float32_bytes / 15
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def nothing_to_compress() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(4))


def test_a_model_without_weights_to_compress() -> None:
    with pytest.raises(PlanError, match="no parameter to compress"):
        clipq.search(nothing_to_compress(), lambda m: 0.0, Target(ratio=5))


def test_a_number_is_no_target() -> None:
    with pytest.raises(SearchError, match=r"target is 15; give a clipq\.Target, such as"):
        clipq.search(*small_regression(), 15)  # type: ignore[arg-type]


def test_a_target_below_what_the_rest_takes(classifier: nn.Module) -> None:
    with pytest.raises(
        SearchError, match=r"the target of 200 bytes cannot be met: the smallest file .* has [\d,]+ bytes"
    ):
        clipq.search(classifier, classification_loss, Target(bytes=200))


def test_a_target_above_the_largest_plan_is_noted() -> None:
    record = run_search(*small_regression(), Target(bytes="1MB"), settings=QUICK)
    assert "that is the nearest" in record.notes[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "none is given"),
        ({"ratio": 5, "trade_off": 0.1}, "got ratio and trade_off: give one"),
        ({"ratio": 1}, "ratio is 1; it must be above 1"),
        ({"bytes": "12 parsecs"}, "'12 parsecs' is no number of bytes"),
        ({"max_drop": float("nan")}, "give a finite number"),
    ],
)
def test_a_target_that_is_none(values: dict[str, float], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        Target(**values)


@pytest.mark.parametrize(
    "values",
    [{"bits": (5, 3)}, {"bits": (1, 9)}, {"highest_pruning_rate": 1.0}, {"evaluations": 0}, {"refinements": -1}],
)
def test_settings_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(SearchError):
        Settings(**values)


def test_the_papers_search_takes_its_knob_alone() -> None:
    with pytest.raises(SearchError, match="has one knob, trade_off"):
        clipq.search(*small_regression(), Target(ratio=5), settings=Settings(method="layerwise"))
