"""An evaluation leaves the model as it was, whatever evaluate does; and nothing is computed twice without need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipq
from clipq import Target
from clipq.errors import ClipqError, SearchError
from clipq.search.evaluator import Evaluator
from clipq.search.groups import Theta, groups_of


def model_with_norm() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    model.register_buffer("scale", torch.tensor(float("nan")), persistent=False)
    model[1].weight.requires_grad_(False)
    return model


def everything_of(model: nn.Module) -> list[object]:
    """All that an evaluation must leave as it was."""
    modules = [(name, module.training) for name, module in model.named_modules()]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert model(torch.ones(2, 6)).shape == (2, 3)
    values = [(n, id(t), t.dtype, t.requires_grad, t.grad, t.tolist().__repr__()) for n, t in tensors.items()]
    return [modules, values, list(model.state_dict())]


def gives_nan(model: nn.Module) -> float:
    return float("nan")


def gives_infinity(model: nn.Module) -> float:
    return float("-inf")


def yields_infinity(model: nn.Module) -> Iterator[float]:
    yield 1.0
    yield float("inf")


def gives_text(model: nn.Module) -> Any:
    return "good"


def gives_nothing(model: nn.Module) -> Any:
    return None


def raises(model: nn.Module) -> float:
    model.train()
    model[0].weight.requires_grad_(False)
    model.extra = nn.Linear(2, 2)
    raise RuntimeError("no data")


def changes_a_weight(model: nn.Module) -> float:
    with torch.no_grad():
        model[0].weight.mul_(2)
    return 0.0


def changes_a_weight_in_secret(model: nn.Module) -> float:
    model[0].weight.data.mul_(2)
    return 0.0


def gives_a_weight_other_storage(model: nn.Module) -> float:
    model[3].weight.data = torch.zeros(3, 8)
    return 0.0


def changes_a_buffer(model: nn.Module) -> float:
    model.train()
    model(torch.randn(5, 6))
    return 0.0


def replaces_a_weight(model: nn.Module) -> float:
    model[0].weight = nn.Parameter(torch.zeros(8, 6))
    return 0.0


def replaces_a_module(model: nn.Module) -> float:
    model[3] = nn.Linear(8, 3)
    return 0.0


def adds_a_buffer(model: nn.Module) -> float:
    model[3].register_buffer("seen", torch.zeros(2))
    return 0.0


def removes_a_buffer(model: nn.Module) -> float:
    del model.scale
    return 0.0


def casts(model: nn.Module) -> float:
    model.half()
    return 0.0


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (gives_nan, "evaluate gave nan for the model as it is; it must give a finite number"),
        (gives_infinity, "evaluate gave -inf for the model as it is; it must give a finite number"),
        (yields_infinity, "evaluate gave inf for the model as it is"),
        (gives_text, "evaluate gave 'good'"),
        (gives_nothing, "evaluate gave None"),
        (raises, "evaluate raised RuntimeError for the model as it is: no data"),
        (changes_a_weight, r"evaluate changed the model: 0\.weight\."),
        (changes_a_weight_in_secret, r"evaluate changed the model: 0\.weight\."),
        (gives_a_weight_other_storage, r"evaluate changed the model: 3\.weight\."),
        (changes_a_buffer, r"evaluate changed the model: 1\.running_mean, 1\.running_var"),
        (replaces_a_weight, r"evaluate changed the model: 0\.weight\."),
        (replaces_a_module, r"evaluate changed the model: 3\.weight, 3\.bias\."),
        (adds_a_buffer, r"evaluate changed the model: 3\.seen\."),
        (removes_a_buffer, r"evaluate changed the model: scale\."),
        (casts, r"evaluate changed the model: 0\.weight, .* and others\."),
    ],
)
def test_an_evaluate_that_misbehaves_is_named(evaluate: Callable[[nn.Module], float], message: str) -> None:
    model = model_with_norm()
    before = everything_of(model)
    with pytest.raises(SearchError, match=message):
        clipq.search(model, evaluate, Target(bytes=400))
    assert everything_of(model) == before


def test_an_evaluate_may_put_back_what_it_changed() -> None:
    """Such as one that evaluates averaged weights."""
    model = model_with_norm()
    before = everything_of(model)

    def evaluate(m: nn.Module) -> float:
        kept = {name: tensor.clone() for name, tensor in m.state_dict().items()}
        m.train().requires_grad_(False)
        m(torch.ones(4, 6))
        m.load_state_dict(kept)
        m[0].weight = nn.Parameter(m[0].weight.clone())
        return float(m[0].weight.square().sum())

    groups = groups_of(model)
    assert Evaluator(model, evaluate, 0).at(groups, [None, None]) == float(model[0].weight.detach().square().sum())
    assert everything_of(model) == before


def gives_a_number(model: nn.Module, plan: clipq.Plan, file_bytes: int, share: float) -> Any:
    return 0.5


def gives_a_plan_of_fewer(model: nn.Module, plan: clipq.Plan, file_bytes: int, share: float) -> clipq.Plan:
    return clipq.Plan({"0.weight": plan.tensors["0.weight"]})


def gives_other_shapes(model: nn.Module, plan: clipq.Plan, file_bytes: int, share: float) -> clipq.Plan:
    return clipq.Plan({name: replace(tensor, shape=(1, *tensor.shape)) for name, tensor in plan.tensors.items()})


def gives_no_rate(model: nn.Module, plan: clipq.Plan, file_bytes: int, share: float) -> clipq.Plan:
    return clipq.Plan({name: replace(tensor, pruning_rate=1.5) for name, tensor in plan.tensors.items()})


def fails(model: nn.Module, plan: clipq.Plan, file_bytes: int, share: float) -> None:
    model.train()
    model[0].weight.data.zero_()
    raise RuntimeError("no optimizer")


def puts_something_on(model: nn.Module, plan: clipq.Plan, file_bytes: int, share: float) -> None:
    nn.utils.parametrizations.weight_norm(model[0])


@pytest.mark.parametrize(
    ("recover", "message"),
    [
        (gives_a_number, r"recover gave 0\.5; it must give the clipq\.Plan that it ended with"),
        (gives_a_plan_of_fewer, r"recover gave a plan that differs in 3\.weight; it may change pruning rates"),
        (gives_other_shapes, r"recover gave a plan that differs in 0\.weight, 3\.weight;"),
        (gives_no_rate, "0.weight.*1.5"),
        (fails, "recover raised RuntimeError: no optimizer"),
        (puts_something_on, r"recover added, removed or replaced 0\.weight, 0\.parametrizations"),
    ],
)
def test_a_recover_that_misbehaves_is_named(recover: Any, message: str) -> None:
    model = model_with_norm()
    before = everything_of(model)
    plan = clipq.Plan.uniform(model, pruning_rate=0.5, bits=3)
    with pytest.raises(ClipqError, match=message):
        Evaluator(model, lambda m: 0.0, 0).of_plan(plan, recover, 400)
    assert everything_of(model) == before


def test_what_recover_leaves_behind_is_taken_back() -> None:
    model = model_with_norm()
    before = everything_of(model)

    def recover(m: nn.Module, plan: clipq.Plan, file_bytes: int, share: float) -> None:
        m.train()
        m(torch.randn(5, 6)).sum().backward()
        m[3].weight.data.add_(1)

    plan = clipq.Plan.uniform(model, pruning_rate=0.5, bits=3)
    cost, _, ended = Evaluator(model, lambda m: float(m[3].weight.sum()), 0).of_plan(plan, recover, 400)
    assert cost == pytest.approx(float(model[3].weight.detach().sum()) + 24)
    assert ended == plan
    assert everything_of(model) == before


def test_the_place_of_a_bad_value_is_named() -> None:
    model = model_with_norm()
    groups = groups_of(model)
    evaluator = Evaluator(model, gives_nan, 0)
    with pytest.raises(SearchError, match=r"0\.weight at p=0\.5, b=3"):
        evaluator.at(groups, [Theta(0.5, 3), None])


class Block(nn.Module):
    """A residual block that writes into its activations and uses one module twice."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(n, n, 3, padding=1), nn.Conv2d(n, n, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.act(self.first(x)))
        out += x
        return self.act(out)


class Tied(nn.Module):
    """Tied weights, a module that gives a tuple, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 20)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(x))
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        return self.head(hidden)


def convolutional() -> tuple[nn.Module, list[Tensor]]:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    model = nn.Sequential(stem, Block(8), nn.Sequential(Block(8), nn.MaxPool2d(2)), nn.Flatten(), nn.Linear(128, 5))
    return model.eval(), [torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.randn(2, 3, 8, 8)]


def recurrent() -> tuple[nn.Module, list[Tensor]]:
    return Tied().eval(), [torch.randint(0, 20, (3, 7)) for _ in range(2)]


@pytest.mark.parametrize("memory", [0, 20_000, 2**30])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("make", [convolutional, recurrent])
def test_kept_activations_change_no_value(
    make: Callable[[], tuple[nn.Module, list[Tensor]]], inference: bool, memory: int
) -> None:
    torch.manual_seed(0)
    model, batches = make()

    def cost(m: nn.Module) -> float:
        with torch.inference_mode(inference):
            return sum(float(m(batch).square().mean()) for batch in batches)

    groups = groups_of(model)
    plain, kept = Evaluator(model, cost, 0), Evaluator(model, cost, memory)
    for i in range(len(groups)):
        for rate in (0.3, 0.6, 0.9):
            thetas: list[Theta | None] = [None] * len(groups)
            thetas[i] = Theta(rate, 3)
            assert kept.at(groups, thetas, changing=i) == plain.at(groups, thetas)


def test_what_comes_before_a_changed_layer_is_computed_once() -> None:
    torch.manual_seed(0)
    model, batches = convolutional()
    runs = {"stem": 0, "head": 0}
    for name, module in (("stem", model[0][0]), ("head", model[4])):
        original = module._conv_forward if name == "stem" else None
        if original is not None:

            def counted(*args: Any, original: Any = original) -> Tensor:
                runs["stem"] += 1
                return original(*args)

            module._conv_forward = counted
        else:
            module.register_forward_hook(lambda *_: runs.update(head=runs["head"] + 1))
    evaluator = Evaluator(model, lambda m: sum(float(m(b).mean()) for b in batches), 2**30)
    groups = groups_of(model)
    last = len(groups) - 1
    for rate in (0.1, 0.3, 0.5, 0.7):
        evaluator.at(groups, [*[None] * last, Theta(rate, 3)], changing=last)
    assert runs == {"stem": len(batches), "head": 4 * len(batches)}


def test_other_inputs_are_not_taken_from_the_record() -> None:
    model, _ = convolutional()
    inputs = iter(torch.randn(6, 2, 3, 8, 8))
    evaluator = Evaluator(model, lambda m: float(m(next(inputs)).sum()), 2**30)
    groups = groups_of(model)
    thetas = [*[None] * (len(groups) - 1), Theta(0.2, 4)]
    values = {evaluator.at(groups, thetas, changing=len(groups) - 1) for _ in range(3)}
    assert len(values) == 3


def test_an_evaluation_that_can_only_lose_is_stopped() -> None:
    model, _ = convolutional()
    seen = 0

    def cost(m: nn.Module) -> Iterator[float]:
        nonlocal seen
        total = 0.0
        for _ in range(10):
            seen += 1
            total += 1.0
            yield total

    evaluator = Evaluator(model, cost, 0)
    groups = groups_of(model)
    assert evaluator.at(groups, [None] * len(groups), ceiling=3.5) == 4.0
    assert seen == 4
    assert evaluator.at(groups, [None] * len(groups)) == 10.0


def test_cross_entropy_of_a_batch_is_a_cost() -> None:
    model = model_with_norm()
    x, y = torch.randn(30, 6), torch.randint(0, 3, (30,))
    evaluator = Evaluator(model, lambda m: F.cross_entropy(m(x), y), 0)
    assert evaluator.at(groups_of(model), [None, None]) == pytest.approx(float(F.cross_entropy(model(x), y)))
