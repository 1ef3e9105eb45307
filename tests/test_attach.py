"""In-parallel training: what a step does, with every optimizer and way of training, and what is refused."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipq
from tests.zoo import build, train_step


class Decaying(torch.optim.SGD):
    """Calls the step of its base class, whose hooks torch then calls as well, and goes on with the weights."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.99)
        return result


class Reassigning(torch.optim.Optimizer):
    """Gives its parameters new memory at every step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> Any:
        result = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data = parameter.data - 0.05 * parameter.grad
        return result


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "SGD, derived from": lambda p: Decaying(p, lr=0.05),
    "new memory": lambda p: Reassigning(p),
}
KIND = "conv, transposed conv, tied linear"


def plan_of(model: nn.Module) -> clipq.Plan:
    return clipq.Plan.uniform(model, pruning_rate=0.5, bits=2)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return (out - torch.linspace(-1, 1, out.numel()).view_as(out)).square().mean()


class ByHand:
    """The paper's loop written out: W, Q = quantize(W), gradient at Q, optimizer step on W."""

    def __init__(self, model: nn.Module, make_optimizer: Any) -> None:
        self.network = model  # holds Q
        self.full = copy.deepcopy(model)  # holds W
        self.optimizer = make_optimizer(self.full.parameters())
        self.plan = plan_of(model)
        self.quantize()

    def quantize(self) -> None:
        with torch.no_grad():
            for (name, q), w in zip(self.network.named_parameters(), self.full.parameters(), strict=True):
                t = self.plan.tensors.get(name)
                q.copy_(w if t is None else clipq.clip_quantize(w, t.pruning_rate, t.bits).quantized)

    def step(self, x: Tensor) -> None:
        self.network.zero_grad()
        loss_of(self.network, x).backward()
        for q, w in zip(self.network.parameters(), self.full.parameters(), strict=True):
            w.grad = None if q.grad is None else q.grad.clone()
        self.optimizer.step()
        self.quantize()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_papers_loop_bit_for_bit(name: str) -> None:
    by_hand = ByHand(build(KIND)[0], OPTIMIZERS[name])
    model, x = build(KIND)
    optimizer = OPTIMIZERS[name](model.parameters())
    attachment = clipq.attach(model, optimizer, plan_of(model))
    for _ in range(5):
        by_hand.step(x)
        train_step(model, optimizer, x)
    for (name, ours), theirs in zip(model.named_parameters(), by_hand.network.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    full = dict(by_hand.full.named_parameters())
    for name, weight in attachment.full_precision.items():
        assert torch.equal(weight, full[name]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_closure_is_run_at_the_quantized_weights(name: str) -> None:
    model, x = build(KIND)
    twin, _ = build(KIND)
    optimizer, twin_optimizer = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    clipq.attach(model, optimizer, plan_of(model))
    clipq.attach(twin, twin_optimizer, plan_of(twin))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    for step in range(4):
        loss = optimizer.step(closure) if step % 2 else optimizer.step(closure=closure)
        twin_optimizer.zero_grad()
        expected = loss_of(twin, x)
        expected.backward()
        twin_optimizer.step()
        assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_optimizer_that_calls_its_closure_many_times_sees_quantized_weights_each_time() -> None:
    model, x = build(KIND)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    attachment = clipq.attach(model, optimizer, plan_of(model))
    levels = []

    def closure() -> Tensor:
        levels.append(max(p.unique().numel() for n, p in model.named_parameters() if n in attachment.plan.tensors))
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(levels) > 1
    assert max(levels) <= 4


def test_a_closure_that_raises_leaves_the_model_quantized_and_training_can_go_on() -> None:
    model, x = build(KIND)
    twin, _ = build(KIND)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    clipq.attach(model, optimizer, plan_of(model))
    clipq.attach(twin, twin_optimizer, plan_of(twin))

    def closure() -> float:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step(closure)
    for _ in range(2):
        train_step(model, optimizer, x)
        train_step(twin, twin_optimizer, x)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_clipped_weight_comes_back() -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, 1, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipq.attach(model, optimizer, clipq.Plan.uniform(model, pruning_rate=0.5, bits=3))
    clipped = model.weight[0] == 0
    assert clipped.any()
    x = torch.eye(20)
    target = torch.where(clipped, 2.0, 0.1)[:, None]
    for _ in range(200):
        optimizer.zero_grad()
        (model(x) - target).square().sum().backward()
        optimizer.step()
    assert (model.weight[0][clipped] > 1).sum() >= 8, "of the ten, what the loss needs has come back"
    assert (model.weight[0][~clipped] == 0).any(), "and others were clipped in its place"


def test_parameter_groups_schedulers_and_accumulation() -> None:
    def run(accumulate: int) -> nn.Module:
        model, x = build(KIND)
        groups = [{"params": list(model.conv.parameters()), "lr": 0.2}, {"params": list(model.up.parameters())}]
        rest = [p for p in model.parameters() if not any(p is q for g in groups for q in g["params"])]
        optimizer = torch.optim.SGD([*groups, {"params": rest}], lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        clipq.attach(model, optimizer, plan_of(model))
        model.eval()  # fixed norm statistics: the same gradient whether in one batch or in two
        for _ in range(4):
            optimizer.zero_grad()
            for _ in range(accumulate):
                (loss_of(model, x) / accumulate).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.05
        return model

    once, twice = run(1), run(2)
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_parameter_group_added_later_is_trained_as_usual() -> None:
    model, x = build(KIND)
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if not n.startswith("norm")], lr=0.1)
    clipq.attach(model, optimizer, plan_of(model))
    before = model.norm.weight.clone()
    optimizer.add_param_group({"params": list(model.norm.parameters())})
    train_step(model, optimizer, x)
    assert not torch.equal(model.norm.weight, before)


def test_a_gradient_scaler_that_skips_a_step_changes_nothing() -> None:
    model, x = build(KIND)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = clipq.attach(model, optimizer, plan_of(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def step(poison: bool) -> None:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x)).backward()
        if poison:
            model.conv.weight.grad[0, 0, 0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()

    step(poison=False)
    weights = [p.clone() for p in model.parameters()]
    full = {n: w.clone() for n, w in attachment.full_precision.items()}
    step(poison=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert all(torch.equal(w, full[n]) for n, w in attachment.full_precision.items())
    step(poison=False)
    assert not torch.equal(model.conv.weight, weights[0])


def test_bf16_autocast_trains() -> None:
    model, x = build(KIND)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    clipq.attach(model, optimizer, plan_of(model))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_other_types_train(dtype: torch.dtype) -> None:
    model, x = build("Linear")
    model, x = model.to(dtype), x.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attachment = clipq.attach(model, optimizer, plan_of(model))
    train_step(model, optimizer, x)
    for name, weight in attachment.full_precision.items():
        parameter = model.get_parameter(name)
        assert weight.dtype == dtype
        assert torch.equal(parameter, clipq.clip_quantize(weight, 0.5, 2).quantized)


def test_channels_last_is_kept() -> None:
    model, x = build(KIND)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clipq.attach(model, optimizer, plan_of(model))
    train_step(model, optimizer, x.to(memory_format=torch.channels_last))
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_several_optimizers_share_one_plan() -> None:
    model, x = build(KIND)
    one = torch.optim.SGD([p for n, p in model.named_parameters() if n.startswith("conv")], lr=0.1)
    two = torch.optim.AdamW([p for n, p in model.named_parameters() if not n.startswith("conv")], lr=0.01)
    attachment = clipq.attach(model, [one, two], plan_of(model))
    for _ in range(3):
        for optimizer in (one, two):
            optimizer.zero_grad()
        loss_of(model, x).backward()
        one.step()
        two.step()
    for name, weight in attachment.full_precision.items():
        assert torch.equal(model.get_parameter(name), clipq.clip_quantize(weight, 0.5, 2).quantized)
    assert set(one.state_dict()["clipq"]["weights"]) == {"conv.weight"}


def test_frozen_layers_are_quantized_once_and_stay() -> None:
    model, x = build(KIND)
    model.conv.requires_grad_(False)
    model.up.requires_grad_(False)
    expected = clipq.clip_quantize(model.conv.weight, 0.5, 2).quantized
    in_it = [p for n, p in model.named_parameters() if not n.startswith("up")]  # conv is frozen and in the optimizer
    optimizer = torch.optim.SGD(in_it, lr=0.1)
    clipq.attach(model, optimizer, plan_of(model))
    for _ in range(2):
        train_step(model, optimizer, x)
    assert torch.equal(model.conv.weight, expected)
    assert model.up.weight.unique().numel() <= 4


def test_a_frozen_layer_in_no_optimizer_comes_back_with_its_full_precision_weights() -> None:
    model, _ = build(KIND)
    model.up.requires_grad_(False)
    full = model.up.weight.detach().clone()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if not n.startswith("up")], lr=0.1)
    clipq.attach(model, optimizer, plan_of(model))
    saved, state = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    assert torch.equal(saved["clipq"]["weights"]["up.weight"], full)

    again, _ = build(KIND, seed=1)
    again.up.requires_grad_(False)
    again.load_state_dict(state)
    optimizer = torch.optim.SGD([p for n, p in again.named_parameters() if not n.startswith("up")], lr=0.1)
    attachment = clipq.attach(again, optimizer, plan_of(again))
    optimizer.load_state_dict(saved)
    assert torch.equal(again.up.weight, state["up.weight"])
    attachment.replan(clipq.Plan.uniform(again, pruning_rate=0.2, bits=4))
    assert torch.equal(again.up.weight, clipq.clip_quantize(full, 0.2, 4).quantized)


def test_a_model_moved_to_another_type_is_refused() -> None:
    model, x = build("Linear")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipq.attach(model, optimizer, plan_of(model))
    model.double()
    with pytest.raises(clipq.ClipqError, match=r"was \(6, 8\) torch\.float32 when attached"):
        train_step(model, optimizer, x.double())


def test_a_nan_in_training_is_an_error_that_names_the_tensor() -> None:
    model, x = build("Linear")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipq.attach(model, optimizer, plan_of(model))
    loss_of(model, x).backward()
    model.head.weight.grad[0, 0] = torch.nan
    with pytest.raises(clipq.ClipqError, match=r"head\.weight: 1 of 18 weights are NaN or Inf"):
        optimizer.step()


def test_weights_that_are_not_finite_at_the_start_leave_everything_as_it_was() -> None:
    model, x = build(KIND)
    model.second.weight.data[0, 0] = torch.nan
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(clipq.ClipqError, match=r"first\.weight"):
        clipq.attach(model, optimizer, plan_of(model))
    for a, b in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)
    model.second.weight.data[0, 0] = 0
    clipq.attach(model, optimizer, plan_of(model))
    train_step(model, optimizer, x)


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_touched() -> None:
    model, _ = build("Linear")
    before = copy.deepcopy(model)
    other, _ = build("Conv1d")
    with pytest.raises(clipq.ClipqError, match="does not fit"):
        clipq.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), plan_of(other))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_two_attaches_on_one_tensor_are_refused_until_the_first_is_detached() -> None:
    model, _ = build("Linear")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = clipq.attach(model, optimizer, plan_of(model))
    with pytest.raises(clipq.ClipqError, match=r"module_under_test\.weight: is attached already, to a SGD"):
        clipq.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), plan_of(model))
    attachment.detach()
    clipq.attach(model, optimizer, plan_of(model))


def test_a_planned_tensor_in_no_optimizer_or_in_two_is_refused() -> None:
    model, _ = build("Linear")
    some = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with pytest.raises(clipq.ClipqError, match=r"module_under_test\.weight: is planned but in no optimizer"):
        clipq.attach(model, some, plan_of(model))
    both = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(clipq.ClipqError, match=r"head\.weight: is in 2 of the optimizers"):
        clipq.attach(model, [some, both], plan_of(model))
    with pytest.raises(clipq.ClipqError, match="is not a torch optimizer"):
        clipq.attach(model, ["SGD"], plan_of(model))  # type: ignore[list-item]


def test_another_optimizer_on_attached_weights_is_refused_at_its_first_step() -> None:
    model, x = build("Linear")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = clipq.attach(model, optimizer, plan_of(model))
    replacement = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(clipq.ClipqError, match="attached to another optimizer"):
        train_step(model, replacement, x)
    del optimizer, attachment
    gc.collect()
    with pytest.raises(clipq.ClipqError, match="attached to an optimizer that is gone"):
        train_step(model, replacement, x)
    clipq.attach(model, replacement, plan_of(model))
    train_step(model, replacement, x)


def test_parameters_taken_out_of_the_optimizer_are_noticed() -> None:
    model, x = build("Linear")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipq.attach(model, optimizer, plan_of(model))
    optimizer.param_groups[0]["params"] = list(model.head.parameters())
    with pytest.raises(clipq.ClipqError, match=r"module_under_test\.weight: is no longer in the SGD"):
        train_step(model, optimizer, x)


def test_a_frozen_layer_that_is_trained_after_all_is_noticed() -> None:
    model, x = build("Linear")
    model.head.requires_grad_(False)
    optimizer = torch.optim.SGD(model.module_under_test.parameters(), lr=0.1)
    clipq.attach(model, optimizer, plan_of(model))
    model.head.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.head.parameters())})
    with pytest.raises(clipq.ClipqError, match=r"head\.weight: was frozen when it was attached"):
        train_step(model, optimizer, x)


def test_state_of_another_plan_is_refused_with_the_differences() -> None:
    model, _ = build("Linear")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipq.attach(model, optimizer, plan_of(model))
    other, _ = build("Linear")
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    clipq.attach(other, other_optimizer, plan_of(other).override({"head.*": {"bits": 5}}))
    with pytest.raises(clipq.ClipqError, match=r"another plan:\n  head\.weight: .*'bits': 5.* here, .*'bits': 2"):
        other_optimizer.load_state_dict(optimizer.state_dict())


def test_a_state_without_clipq_and_a_state_with_it_both_load_into_a_plain_optimizer() -> None:
    model, x = build("Linear")
    plain = torch.optim.AdamW(model.parameters(), lr=0.1)
    train_step(model, plain, x)
    state = copy.deepcopy(plain.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    clipq.attach(model, optimizer, plan_of(model))
    optimizer.load_state_dict(state)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_step(model, optimizer, x)


def test_in_parallel_beats_two_stage_at_the_same_plan_and_the_same_number_of_steps() -> None:
    def trained(two_stage: bool, seed: int) -> float:
        torch.manual_seed(seed)
        teacher = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 4))
        x = torch.randn(512, 16)
        target = teacher(x).detach()
        model = copy.deepcopy(teacher)
        plan = clipq.Plan.uniform(model, pruning_rate=0.8, bits=2)

        def fit(plan: clipq.Plan | None, steps: int, masks: dict[str, Tensor]) -> None:
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            attachment = None if plan is None else clipq.attach(model, optimizer, plan)
            for _ in range(steps):
                optimizer.zero_grad()
                (model(x) - target).square().mean().backward()
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    for name, mask in masks.items():
                        model.get_parameter(name).mul_(mask)
            if attachment is not None:
                attachment.detach()

        if not two_stage:
            fit(plan, 400, {})
        else:  # prune once and fine-tune what is left; then quantize what is left and fine-tune
            with torch.no_grad():
                masks = {}
                for name, t in plan.tensors.items():
                    weight = model.get_parameter(name)
                    masks[name] = clipq.clip_quantize(weight, t.pruning_rate, 8).quantized != 0
                    weight.mul_(masks[name])
            fit(None, 200, masks)
            fit(plan.override({"*": {"pruning_rate": 0.0}}), 200, masks)
        return (model(x) - target).square().mean().item()

    wins = sum(trained(False, seed) < trained(True, seed) for seed in range(5))
    assert wins >= 4


def in_one_buffer(model: nn.Module) -> None:
    parameters = list(model.parameters())
    buffer = torch.cat([p.detach().flatten() for p in parameters])
    for parameter, piece in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
        parameter.data = piece.view_as(parameter)


def shared_between_processes(model: nn.Module) -> None:
    model.share_memory()


@pytest.mark.parametrize("prepare", [in_one_buffer, shared_between_processes])
def test_where_others_know_a_parameter_by_its_memory_the_optimizer_finds_full_precision_weights_there(
    prepare: Any,
) -> None:
    model, x = build(KIND)
    prepare(model)
    aliases = [p.detach() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    attachment = clipq.attach(model, optimizer, plan_of(model))
    plan = list(attachment.full_precision.items())
    seen: list[bool] = []

    def look(*_: Any) -> None:
        names = {name: alias for (name, _), alias in zip(model.named_parameters(), aliases, strict=True)}
        seen.append(all(torch.equal(names[name], full) for name, full in plan))

    optimizer.register_step_pre_hook(look)
    train_step(model, optimizer, x)
    assert seen == [True]
    assert all(torch.equal(alias, p) for alias, p in zip(aliases, model.parameters(), strict=True))


def test_between_steps_a_parameter_stays_where_it_is_in_memory() -> None:
    model, x = build(KIND)
    aliases = [p.detach() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    attachment = clipq.attach(model, optimizer, plan_of(model))
    for _ in range(2):
        train_step(model, optimizer, x)
        for alias, parameter in zip(aliases, model.parameters(), strict=True):
            assert alias.data_ptr() == parameter.data_ptr()
            assert torch.equal(alias, parameter)
    attachment.detach()
    assert all(a.data_ptr() == p.data_ptr() for a, p in zip(aliases, model.parameters(), strict=True))


class Failing(torch.optim.SGD):
    """Does its step, and raises at the end of the second one."""

    steps = 0

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("lost the device")


@pytest.mark.parametrize("what", ["step", "replan", "detach"])
def test_after_an_optimizer_that_raised_what_it_made_of_the_weights_counts(what: str) -> None:
    model, x = build(KIND)
    twin, _ = build(KIND)
    optimizer, twin_optimizer = Failing(model.parameters(), lr=0.05), torch.optim.SGD(twin.parameters(), lr=0.05)
    attachments = [clipq.attach(model, optimizer, plan_of(model)), clipq.attach(twin, twin_optimizer, plan_of(twin))]
    for step in range(2):
        if step == 1:
            with pytest.raises(RuntimeError, match="lost the device"):
                train_step(model, optimizer, x)
        else:
            train_step(model, optimizer, x)
        train_step(twin, twin_optimizer, x)
    for each, net, its in ((attachments[0], model, optimizer), (attachments[1], twin, twin_optimizer)):
        if what == "step":
            its.step()
        elif what == "replan":
            each.replan(clipq.Plan.uniform(net, pruning_rate=0.25, bits=3))
        else:
            each.detach()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
