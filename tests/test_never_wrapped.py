"""What keeps working on a model while it is attached, for every kind of module."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipq
from tests.zoo import KINDS, build, train_step

every_kind = pytest.mark.parametrize("kind", KINDS)


def attached(kind: str, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, clipq.Attachment, Tensor]:
    model, x = build(kind, seed)
    plan = clipq.Plan.uniform(model, pruning_rate=0.5, bits=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, clipq.attach(model, optimizer, plan), x


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@every_kind
def test_between_steps_every_planned_tensor_is_quantized(kind: str) -> None:
    model, optimizer, attachment, x = attached(kind)
    for _ in range(3):
        train_step(model, optimizer, x)
        parameters = dict(model.named_parameters())
        for name in attachment.plan.tensors:
            assert parameters[name].unique().numel() <= 2**2
            expected = clipq.clip_quantize(attachment.full_precision[name], 0.5, 2).quantized
            assert torch.equal(parameters[name], expected)


@every_kind
def test_the_keys_of_the_state_dict_stay_the_users(kind: str) -> None:
    plain, _ = build(kind)
    model, optimizer, _, x = attached(kind)
    train_step(model, optimizer, x)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert type(model) is type(plain)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@every_kind
def test_a_plain_checkpoint_becomes_the_full_precision_weights(kind: str) -> None:
    model, optimizer, attachment, x = attached(kind)
    train_step(model, optimizer, x)
    other, _ = build(kind, seed=1)
    model.load_state_dict(through_a_file(other.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train_step(model, optimizer, x)
    for name, weight in other.named_parameters():
        if name in attachment.plan.tensors:
            assert torch.equal(attachment.full_precision[name], weight)


@every_kind
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_resume_is_exact(kind: str, optimizer_first: bool) -> None:
    model, optimizer, _, x = attached(kind)
    for _ in range(2):
        train_step(model, optimizer, x)
    model_state, optimizer_state = through_a_file([model.state_dict(), optimizer.state_dict()])
    for _ in range(2):
        train_step(model, optimizer, x)

    resumed, resumed_optimizer, _, _ = attached(kind, seed=1)
    loads = [lambda: resumed_optimizer.load_state_dict(optimizer_state), lambda: resumed.load_state_dict(model_state)]
    for load in loads if optimizer_first else reversed(loads):
        load()
    for _ in range(2):
        train_step(resumed, resumed_optimizer, x)
    assert states_equal(resumed, model)


@every_kind
def test_deepcopy_gives_an_independent_model(kind: str) -> None:
    model, optimizer, _, x = attached(kind)
    train_step(model, optimizer, x)
    twin = copy.deepcopy(model)
    assert states_equal(twin, model)
    train_step(model, optimizer, x)
    assert not states_equal(twin, model)


@every_kind
def test_an_average_of_the_weights_can_be_swapped_in_and_out(kind: str) -> None:
    model, optimizer, _, x = attached(kind)
    reference, reference_optimizer, _, _ = attached(kind)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        train_step(model, optimizer, x)
        train_step(reference, reference_optimizer, x)
        average.update_parameters(model)
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict(average.module.state_dict())
        model(x)
        model.load_state_dict(kept)
    train_step(model, optimizer, x)
    train_step(reference, reference_optimizer, x)
    assert states_equal(model, reference), "looking at the average changes nothing"


@every_kind
def test_the_model_pickles(kind: str) -> None:
    model, optimizer, _, x = attached(kind)
    train_step(model, optimizer, x)
    twin = pickle.loads(pickle.dumps(model))
    assert states_equal(twin, model)


@every_kind
def test_export_gives_the_same_outputs(kind: str) -> None:
    model, optimizer, _, x = attached(kind)
    train_step(model, optimizer, x)
    model.eval()
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@every_kind
def test_compiled_whole_it_trains_as_it_does_uncompiled(kind: str) -> None:
    model, optimizer, _, x = attached(kind)
    reference, reference_optimizer, _, _ = attached(kind)
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())  # torch itself breaks the graph there
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not recurrent)
    for _ in range(2):
        train_step(compiled, optimizer, x)
        train_step(reference, reference_optimizer, x)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@every_kind
def test_attaching_to_a_compiled_model_finds_its_parameters(kind: str) -> None:
    model, _ = build(kind)
    plan = clipq.Plan.uniform(model, pruning_rate=0.5, bits=2)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.01)
    assert set(clipq.attach(compiled, optimizer, plan).full_precision) == set(plan.tensors)


@every_kind
def test_detaching_leaves_a_plain_optimizer_and_a_quantized_model(kind: str) -> None:
    model, optimizer, attachment, x = attached(kind)
    train_step(model, optimizer, x)
    quantized = copy.deepcopy(model)
    attachment.detach()
    attachment.detach()
    assert states_equal(model, quantized)
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    twin_optimizer = torch.optim.AdamW(quantized.parameters(), lr=0.01)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_step(model, optimizer, x)
    train_step(quantized, twin_optimizer, x)
    assert states_equal(model, quantized)
