"""The pieces of the engine, as a loop of one's own uses them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipq
from clipq import Plan, demo
from clipq.data import load_data
from clipq.errors import RecipeError
from clipq.finetune.average import WeightAverage, reestimate_batch_norm
from clipq.finetune.devices import make_fabric
from clipq.finetune.loggers import MetricsLog, make_loggers
from clipq.finetune.loop import fit
from clipq.finetune.losses import Distillation, cross_entropy, distillation_loss
from clipq.finetune.optimization import learning_rate_factor, parameter_groups
from clipq.finetune.ramp import STAGES, PruningRamp
from clipq.finetune.run import RunFolder
from clipq.finetune.step import gradients, update
from clipq.finetune.watch import EpochRecord, Silent
from clipq.recipe import Recipe

BASE: dict[str, Any] = {"model": "clipq.demo:network", "data": "digits", "float_epochs": 1}


def recipe(**fields: Any) -> Recipe:
    return Recipe.make(BASE | fields)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def batch(n: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 4


@pytest.mark.parametrize("passes", [2, 5, 40])
def test_passes_give_the_gradients_of_the_whole_minibatch(passes: int) -> None:
    fabric = make_fabric(recipe())
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    wrapped, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    whole = gradients(fabric, wrapped, optimizer, batch(), cross_entropy())
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    assert gradients(fabric, wrapped, optimizer, batch(), cross_entropy(), passes) == pytest.approx(whole, rel=1e-6)
    for p, grad in zip(net.parameters(), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, grad)


def test_gradients_longer_than_the_norm_are_scaled_down_to_it() -> None:
    fabric = make_fabric(recipe())
    net = network()
    before = copy.deepcopy(net)
    wrapped, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=1.0))
    gradients(fabric, wrapped, optimizer, batch(), cross_entropy())
    assert update(fabric, wrapped, optimizer, clip_norm=0.01)
    moved = [(a - b).flatten() for a, b in zip(net.parameters(), before.parameters(), strict=True)]
    assert torch.cat(moved).norm().item() == pytest.approx(0.01, rel=1e-2)


def test_weight_decay_skips_biases_and_norms_and_frozen_parameters_are_in_no_group() -> None:
    net = network()
    net[0].weight.requires_grad_(False)
    decayed, plain = parameter_groups(net, 0.1)
    assert [p.shape for p in decayed["params"]] == [net[3].weight.shape]
    assert decayed["weight_decay"] == 0.1
    assert all(p.dim() == 1 for p in plain["params"])
    assert plain["weight_decay"] == 0


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_a_schedule_rises_in_its_warmup_and_never_after(schedule: str) -> None:
    factor = learning_rate_factor(recipe(schedule=schedule, warmup_epochs=2), steps=100, steps_per_epoch=10)
    values = [factor(step) for step in range(101)]
    assert values[:20] == sorted(values[:20])
    assert values[20] == max(values) == 1
    assert values[20:] == sorted(values[20:], reverse=True)


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_pruning_rates_rise_to_the_plans_and_bits_stay(steps: int) -> None:
    plan = Plan.uniform(network(), pruning_rate=0.95, bits=3).override({"0.weight": {"pruning_rate": 0.5, "bits": 2}})
    ramp = PruningRamp(plan, steps)
    taken = [ramp.at(0), *filter(None, map(ramp.after, range(1, steps + 1)))]
    assert len(taken) <= STAGES + 1
    assert taken[-1] == plan
    assert ramp.after(steps + 1) is None
    for name, tensor in plan.tensors.items():
        rates = [p.tensors[name].pruning_rate for p in taken]
        assert rates[0] == 0
        assert rates == sorted(rates)
        assert {p.tensors[name].bits for p in taken} == {tensor.bits}


def test_a_run_with_a_ramp_ends_at_its_plan_and_begins_unpruned() -> None:
    settings = recipe(pruning_ramp=0.5, epochs=2, batch_size=300)
    net = demo.network()
    plan = Plan.uniform(net, pruning_rate=0.9, bits=3)
    survivors = []

    class Watching(Silent):
        def step(self, loss: float) -> None:
            survivors.append(sum(int(net.get_parameter(name).count_nonzero()) for name in plan.tensors))

    ended = fit(
        make_fabric(settings),
        net,
        load_data("digits"),
        settings,
        plan,
        epochs=2,
        learning_rate=0.01,
        watcher=Watching(),
    )
    assert ended == plan
    weights = sum(net.get_parameter(name).numel() for name in plan.tensors)
    assert survivors[0] > 0.3 * weights > 0.11 * weights > survivors[len(survivors) // 2 + 1]
    assert survivors[-1] <= 0.11 * weights


def test_distillation_is_zero_at_the_teacher_and_follows_its_temperature() -> None:
    logits, other = torch.randn(6, 4), torch.randn(6, 4)
    assert distillation_loss(logits, logits, 3.0).item() == pytest.approx(0, abs=1e-6)
    assert distillation_loss(logits, other, 1.0) > 0
    ours, theirs = (F.softmax(x / 2.0, dim=1) for x in (logits, other))
    by_hand = 4 * (theirs * (theirs.log() - ours.log())).sum(1).mean()
    torch.testing.assert_close(distillation_loss(logits, other, 2.0), by_hand)


def test_distillation_mixes_labels_and_a_teacher_that_stays_as_it_is() -> None:
    net, teacher = network(), network()
    objective = Distillation(teacher, weight=0.25, temperature=2.0)
    with torch.no_grad():
        for p in teacher.parameters():
            p.zero_()  # the copy was made before
    inputs, targets = batch()
    expected = 0.75 * F.cross_entropy(net(inputs), targets)
    fixed = network().eval()
    expected = expected + 0.25 * distillation_loss(net(inputs), fixed(inputs), 2.0)
    torch.testing.assert_close(objective(net, inputs, targets), expected)


def test_an_average_is_of_the_full_precision_weights() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    attachment = clipq.attach(net, optimizer, clipq.Plan.uniform(net, pruning_rate=0.5, bits=2))
    average = WeightAverage(net, 0.5, attachment)
    expected = {name: weight.clone() for name, weight in attachment.full_precision.items()}
    for step in range(1, 5):
        optimizer.zero_grad()
        F.cross_entropy(net(batch()[0]), batch()[1]).backward()
        optimizer.step()
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, weight in attachment.full_precision.items():
            expected[name] = decay * expected[name] + (1 - decay) * weight
    average.give()
    for name, weight in attachment.full_precision.items():
        torch.testing.assert_close(weight, expected[name])
        assert torch.equal(net.get_parameter(name), clipq.clip_quantize(weight, 0.5, 2).quantized)


def test_reestimated_statistics_are_the_mean_over_the_minibatches() -> None:
    net = network()
    net[1].running_mean.fill_(100.0)
    parts = [batch(12), (batch(12)[0] + 1, batch(12)[1]), (batch(12)[0] * 1e6, batch(12)[1])]
    reestimate_batch_norm(net, iter(parts), 2)
    means = [net[0](inputs).mean(0) for inputs, _ in parts[:2]]
    torch.testing.assert_close(net[1].running_mean, (means[0] + means[1]) / 2)


@pytest.mark.slow
def test_a_compiled_training_is_that_of_the_network() -> None:
    losses = []
    for compiled in (False, True):
        made = recipe(compile=compiled, limit_steps=3, batch_size=64)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        plan = clipq.Plan.uniform(net, pruning_rate=0.5, bits=2)
        records: list[EpochRecord] = []

        class Keeping(Silent):
            def epoch(self, record: EpochRecord) -> None:
                records.append(record)  # noqa: B023

        fit(make_fabric(made), net, load_data("digits"), made, plan, epochs=1, learning_rate=0.1, watcher=Keeping())
        losses.append(records[0].validation_loss)
        assert list(net.state_dict()) == ["1.weight", "1.bias"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def epochs_record() -> EpochRecord:
    return EpochRecord("compress", 1, 100, 1.0, 2.0, 50.0, 0.1, 1000, 3.0)


def test_metrics_are_means_between_and_a_server_that_is_away_stops_nothing() -> None:
    seen: list[tuple[dict[str, float], int]] = []
    notes: list[str] = []

    def write(metrics: Mapping[str, float], step: int) -> None:
        seen.append((dict(metrics), step))
        if step == 100:
            raise ConnectionError("no route")

    log = MetricsLog(write, notes.append)
    log.phase("compress", 100)
    for step in range(100):
        log.step(float(step))
    log.epoch(epochs_record())
    assert seen[0] == ({"compress/loss": 24.5}, 50)
    assert seen[-1][0]["compress/validation_accuracy"] == 50.0
    assert "metrics of step 100 were not logged; training goes on. ConnectionError: no route" in notes[0]


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_logger_writes_what_it_is_told_or_asks_for_its_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    notes: list[str] = []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    try:
        __import__(name)
        loggers = make_loggers(recipe(loggers=[name]), run, notes.append)
    except ImportError:
        loggers = []
    for log in loggers:
        log.phase("compress", 100)
        log.epoch(epochs_record())
        assert not notes
        assert run.tensorboard.exists() or run.mlflow.exists()
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    with pytest.raises(RecipeError, match=f"loggers names {name}, which is not installed: pip install {name}"):
        make_loggers(recipe(loggers=[name]), run, notes.append)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ema": 1.0}, "ema"),
        ({"distillation": 1.5}, "distillation"),
        ({"strategy": "zero"}, "strategy"),
        ({"accumulate": 0}, "accumulate"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
        ({"loggers": ["wandb"]}, "loggers"),
        ({"clip_nrom": 1.0}, "did you mean 'clip_norm'"),
    ],
)
def test_fields_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(**fields)
