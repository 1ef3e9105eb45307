"""Kept activations change no value, whatever the modules before the changed layer do besides giving an output."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipq.search.evaluator import Evaluator
from clipq.search.groups import Theta, groups_of

N = 12


class Net(nn.Module):
    """A body that gives what the head reads; the head is the last group."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(N, N)
        for name, part in parts.items():
            self.add_module(name, part)
        self.head = nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ReadsWhatAnInPlaceModuleWrote(Net):
    def body(self, x: Tensor) -> Tensor:
        return self.inner(self.act(x)) + x


class ReadsWhatAnInPlaceBlockWrote(Net):
    def body(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class ReadsAView(Net):
    def body(self, x: Tensor) -> Tensor:
        view = self.flatten(x.unsqueeze(1))
        view.mul_(2)
        return view + x


class UsesTheHeadBeforeItsCall(Net):
    def body(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.head.weight)


class UsesTheHeadTransposed(Net):
    def body(self, x: Tensor) -> Tensor:
        turned = self.head.weight.t()
        return self.inner(F.linear(x, turned))


class Pair(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x


class SharesAModuleWithOneThatGivesATuple(Net):
    def body(self, x: Tensor) -> Tensor:
        first, _ = self.pair(x)
        return torch.relu(self.pair.inner(torch.tanh(first)))


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.inner(x)
        return self.seen.relu()


class ReadsAnAttribute(Net):
    def body(self, x: Tensor) -> Tensor:
        return self.keeper(x) + self.keeper[0].seen


class CallsAModuleAgain(Net):
    def body(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.inner(x))
        return x


class TakesKeywords(Net):
    def body(self, x: Tensor) -> Tensor:
        return self.inner(input=torch.tanh(self.other(input=x)))


class Recurrent(Net):
    def body(self, x: Tensor) -> Tensor:
        out, (last, _) = self.lstm(x)
        return self.inner(out) + last[0]


class Attends(Net):
    def body(self, x: Tensor) -> Tensor:
        return self.norm(self.attention(x, x, x)[0] + x)


class Opaque(nn.Module):
    """Uses its input and weight without a function of torch that can be seen, as an extension does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, N))

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return x @ self.weight


class OpaquePair(Opaque):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class GivesAnExtensionWhatIsNotReadElsewhere(Net):
    def body(self, x: Tensor) -> Tensor:
        return self.opaque(self.inner(x))[0]


class ReadsThroughAnExtension(Net):
    def body(self, x: Tensor) -> Tensor:
        return self.opaque(self.inner(x))


class ReadsWhatWasThroughEarlier(Net):
    def body(self, x: Tensor) -> Tensor:
        first = self.inner(x)
        second = self.other(first)
        return self.last(second) * first.mean() + second


NETS: list[Callable[[], Net]] = [
    lambda: ReadsWhatAnInPlaceModuleWrote(act=nn.ReLU(inplace=True), inner=nn.Linear(N, N)),
    lambda: ReadsWhatAnInPlaceBlockWrote(block=nn.Sequential(nn.ReLU(inplace=True), nn.Linear(N, N))),
    lambda: ReadsAView(flatten=nn.Flatten()),
    lambda: UsesTheHeadBeforeItsCall(inner=nn.Linear(N, N)),
    lambda: UsesTheHeadTransposed(inner=nn.Linear(N, N)),
    lambda: SharesAModuleWithOneThatGivesATuple(pair=Pair(nn.Linear(N, N))),
    lambda: ReadsAnAttribute(keeper=nn.Sequential(Keeps())),
    lambda: CallsAModuleAgain(inner=nn.Linear(N, N)),
    lambda: TakesKeywords(inner=nn.Linear(N, N), other=nn.Linear(N, N)),
    lambda: ReadsThroughAnExtension(inner=nn.Linear(N, N), opaque=Opaque()),
    lambda: GivesAnExtensionWhatIsNotReadElsewhere(inner=nn.Linear(N, N), opaque=OpaquePair()),
    lambda: Recurrent(lstm=nn.LSTM(N, N), inner=nn.Linear(N, N)),
    lambda: ReadsWhatWasThroughEarlier(inner=nn.Linear(N, N), other=nn.Linear(N, N), last=nn.Linear(N, N)),
    lambda: Attends(attention=nn.MultiheadAttention(N, 2), norm=nn.LayerNorm(N)),
]


def check(model: nn.Module, cost: Callable[[nn.Module], float], memory: int) -> None:
    groups = groups_of(model, include=["*opaque.weight"] if hasattr(model, "opaque") else [])
    plain, kept = Evaluator(model, cost, 0), Evaluator(model, cost, memory)
    for i in range(len(groups)):
        for rate in (0.3, 0.6, 0.9):
            thetas: list[Theta | None] = [None] * len(groups)
            thetas[i] = Theta(rate, 3)
            expected = plain.at(groups, thetas)
            assert kept.at(groups, thetas, changing=i) == pytest.approx(expected, rel=1e-6), groups[i].name


@pytest.mark.parametrize("memory", [0, 1_500, 2**30])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("make", NETS, ids=lambda make: type(make()).__name__)
def test_values_are_those_without_it(make: Callable[[], Net], inference: bool, memory: int) -> None:
    torch.manual_seed(0)
    model, batches = make().eval(), [torch.randn(n, N) for n in (5, 5, 2)]

    def cost(m: nn.Module) -> float:
        with torch.inference_mode() if inference else nullcontext():
            return sum(float(m(batch).square().mean()) for batch in batches)

    check(model, cost, memory)


@pytest.mark.parametrize("memory", [0, 2**30])
def test_hooks_of_the_user_run(memory: int) -> None:
    """Features that hooks take from within, and outputs that they change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(N, N), nn.ReLU(), nn.Linear(N, N)), nn.ReLU(), nn.Linear(N, N))
    x = torch.randn(5, N)

    def cost(m: nn.Module) -> float:
        features: list[Tensor] = []
        handles = [
            m[0][0].register_forward_hook(lambda module, args, output: features.append(output)),
            m[1].register_forward_hook(lambda module, args, output: output * 2),
        ]
        try:
            return float(m(x).square().mean() + sum(f.mean() for f in features))
        finally:
            for handle in handles:
                handle.remove()

    check(model, cost, memory)


@pytest.mark.parametrize("memory", [0, 2**30])
def test_parts_can_run_alone(memory: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(N, N), nn.ReLU()), nn.Linear(N, N), nn.Linear(N, N))
    x = torch.randn(5, N)

    def cost(m: nn.Module) -> float:
        return float(m[1](m[0](-x)).mean() + m(x).mean() + m[0](2 * x).mean() + m(x[:2]).mean() + m[0][0](x).mean())

    check(model, cost, memory)


def test_a_model_is_left_without_hooks_and_with_its_own_forward() -> None:
    model = nn.Sequential(nn.Linear(N, N), nn.ReLU(), nn.Linear(N, N))
    before = [dict(vars(module)) for module in model.modules()]
    check(model, lambda m: float(m(torch.ones(2, N)).sum()), 2**30)
    assert [list(vars(module)) for module in model.modules()] == [list(b) for b in before]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_of_a_chain_the_last_output_alone_is_kept() -> None:
    layers = [nn.Sequential(nn.Linear(N, N), nn.ReLU()) for _ in range(5)]
    model, x = nn.Sequential(*layers, nn.Linear(N, N)), torch.ones(7, N)
    groups = groups_of(model)
    evaluator = Evaluator(model, lambda m: float(m(x).sum()), 2**30)
    for i in range(1, len(groups)):
        thetas: list[Theta | None] = [None] * len(groups)
        thetas[i] = Theta(0.5, 3)
        evaluator.at(groups, thetas, changing=i)
        assert evaluator.kept_bytes() == 2 * x.nbytes  # the input, and what goes into the changed layer
