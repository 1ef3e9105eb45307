"""A training that is cut off at any step, and gone on with, ends as one without a break, bit for bit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipq
from clipq import Plan
from clipq.data import Data, load_data
from clipq.errors import CheckpointError, TrainingError
from clipq.finetune.checkpoint import Checkpoints, damage, unpack
from clipq.finetune.devices import make_fabric
from clipq.finetune.loop import fit
from clipq.finetune.watch import EpochRecord, Silent
from clipq.recipe import Recipe

RECIPE: dict[str, Any] = {
    "model": "clipq.demo:network",
    "data": "digits",
    "float_epochs": 1,
    "epochs": 2,
    "batch_size": 300,
    "learning_rate": 0.02,
    "checkpoint_steps": 3,
}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "adam, accumulation, clipping": {"optimizer": "adam", "accumulate": 3, "clip_norm": 0.5},
    "average, re-estimation": {"ema": 0.9, "batch_norm_batches": 2},
    "distillation, label smoothing, bf16": {"distillation": 0.5, "label_smoothing": 0.1, "precision": "bf16"},
    "loss scaling": {"precision": "fp16", "schedule": "step", "warmup_epochs": 0.5},
    "the file held at a size, an average": {"bytes": 2600, "ema": 0.9},
    "pruning little by little, the file held at a size": {"pruning_ramp": 0.5, "bytes": 2600},
}


class Net(nn.Module):
    """Small, with all that makes a resume hard: batch norm, dropout, a frozen layer that is planned."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.frozen = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.norm(self.first(x)))
        x = nn.functional.max_pool2d(nn.functional.relu(self.frozen(x)), 2).flatten(1)
        return self.head(nn.functional.dropout(x, 0.2, self.training))


class Dying(Silent):
    """Keeps the records, and dies after some steps."""

    def __init__(self, steps: int | None = None) -> None:
        self.left = steps
        self.records: list[EpochRecord] = []

    def step(self, loss: float) -> None:
        if self.left is not None:
            self.left -= 1
            if not self.left:
                raise MemoryError("killed")

    def epoch(self, record: EpochRecord) -> None:
        self.records.append(dataclasses.replace(record, seconds=0.0))


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits")


def train(
    data: Data, folder: Path, features: dict[str, Any], watcher: Dying, state: Any = None
) -> tuple[dict[str, Tensor], Plan | None]:
    recipe = Recipe.make(RECIPE | {k: v for k, v in features.items() if k != "bytes"})
    torch.manual_seed(0)
    network = Net()
    plan = fit(
        make_fabric(recipe),
        network,
        data,
        recipe,
        Plan.uniform(network, pruning_rate=0.6, bits=3),
        epochs=2,
        learning_rate=0.02,
        watcher=watcher,
        checkpoints=Checkpoints(str(folder), 2, pytest.fail),
        state=state,
        hold_bytes=features.get("bytes"),
    )
    return network.state_dict(), plan


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_a_resumed_training_ends_in_the_same_bits(features: dict[str, Any], digits: Data, tmp_path: Path) -> None:
    watcher = Dying()
    expected, expected_plan = train(digits, tmp_path / "whole", features, watcher)
    for step in (4, 7):  # in the first epoch, and in the second
        folder = tmp_path / str(step)
        cut = Dying(step)
        with pytest.raises(MemoryError, match="killed"):
            train(digits, folder, features, cut)
        content = Checkpoints(str(folder), 2, pytest.fail).latest()
        assert content is not None
        again = Dying()
        state, plan = train(digits, folder, features, again, unpack(content))
        assert plan == expected_plan
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor), name
        assert [*cut.records, *again.records] == watcher.records


def test_every_planned_tensor_of_an_average_has_few_levels(digits: Data, tmp_path: Path) -> None:
    state, plan = train(digits, tmp_path, FEATURES["average, re-estimation"], Dying())
    assert plan is not None
    assert all(state[name].unique().numel() <= 8 for name in plan.tensors)


def test_a_held_file_ends_below_its_size(digits: Data, tmp_path: Path) -> None:
    state, plan = train(digits, tmp_path, {"bytes": 2600, "batch_norm_batches": 2}, Dying())
    assert clipq.save(state, tmp_path / "m.clipq", plan=plan).bytes <= 2600


def checkpoints(place: Path | str, notes: list[str], keep: int = 2) -> Checkpoints:
    return Checkpoints(str(place), keep, notes.append)


def state_of(value: int) -> dict[str, Any]:
    return {"value": value, "tensor": torch.full((1000,), float(value))}


def test_the_last_few_checkpoints_are_kept_at_any_place(tmp_path: Path) -> None:
    for place in (tmp_path / "kept", "memory://run/checkpoints"):
        kept = checkpoints(place, [])
        assert kept.latest() is None
        for phase, step in (("float", 90), ("compress", 5), ("compress", 40), ("compress", 100)):
            assert kept.save(phase, step, state_of(step))
        content = checkpoints(place, []).latest()
        assert content is not None
        found = unpack(content)
        assert (found["phase"], found["step"], found["value"]) == ("compress", 100, 100)
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["compress-00000040.pt", "compress-00000100.pt"]


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(harm: str, tmp_path: Path) -> None:
    kept = checkpoints(tmp_path, [])
    for step in (1, 2):
        kept.save("compress", step, state_of(step))
    newest = tmp_path / "compress-00000002.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"cut": content[:-100], "flipped": content, "empty": b""}[harm])
    notes: list[str] = []
    found = checkpoints(tmp_path, notes).latest()
    assert found is not None
    assert unpack(found)["value"] == 1
    assert "compress-00000002.pt is damaged" in notes[0]
    assert "passed over for the one before" in notes[0]
    assert (tmp_path / "compress-00000002.pt.damaged").exists()


def test_if_all_are_damaged_nothing_starts_anew_by_itself(tmp_path: Path) -> None:
    checkpoints(tmp_path, []).save("compress", 1, state_of(1))
    (tmp_path / "compress-00000001.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged .*compress-00000001\.pt"):
        checkpoints(tmp_path, []).latest()


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("clipq.finetune.checkpoint.VERSION", 2)
        checkpoints(tmp_path, []).save("compress", 1, {})
    content = (tmp_path / "compress-00000001.pt").read_bytes()
    assert damage(content) is None
    with pytest.raises(CheckpointError, match="version 2; this clipq reads version 1"):
        unpack(content)


@pytest.mark.parametrize("fails", [1, 9])
def test_a_write_that_fails_is_tried_again_then_noted_and_training_goes_on(
    fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipq.finetune.checkpoint.WAITS", (0.0, 0.0))
    notes: list[str] = []
    kept = checkpoints(tmp_path, notes)
    kept.save("compress", 1, state_of(1))
    write, left = kept._write, [fails]

    def failing(name: str, content: bytes) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(28, "No space left on device")
        write(name, content)

    monkeypatch.setattr(kept, "_write", failing)
    assert kept.save("compress", 2, state_of(2)) == (fails == 1)
    if fails == 1:
        assert not notes
    else:
        assert "compress-00000002.pt was not written; the last one is " in notes[0]
        assert "compress-00000001.pt. Training goes on" in notes[0]
    monkeypatch.undo()
    assert kept.save("compress", 3, state_of(3))


def test_storage_that_cannot_be_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = checkpoints(tmp_path, [])
    kept.save("compress", 1, state_of(1))

    def unreachable(name: str) -> bytes:
        raise TimeoutError("no answer")

    monkeypatch.setattr(kept, "_read", unreachable)
    with pytest.raises(CheckpointError, match="cannot be read: TimeoutError: no answer"):
        kept.latest()
    assert (tmp_path / "compress-00000001.pt").exists()


def test_a_new_run_takes_no_place_that_has_checkpoints(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path, [])
    kept.save("float", 1, state_of(1))
    with pytest.raises(CheckpointError, match=r"has checkpoints already \(float-00000001.pt\)"):
        checkpoints(tmp_path, []).clear(force=False)
    checkpoints(tmp_path, []).clear(force=True)
    assert kept.latest() is None


def poisoned(network: Net) -> Net:
    """Its third output in training is NaN."""
    seen = 0

    def poison(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        nonlocal seen
        seen += module.training
        return output * float("nan") if seen == 3 and module.training else output

    network.head.register_forward_hook(poison)
    return network


def test_a_loss_that_is_no_number_names_the_minibatch(digits: Data, tmp_path: Path) -> None:
    recipe = Recipe.make(RECIPE | {"checkpoint_steps": 1})
    network = poisoned(Net())
    with pytest.raises(TrainingError) as stopped:
        fit(
            make_fabric(recipe),
            network,
            digits,
            recipe,
            None,
            epochs=1,
            learning_rate=0.01,
            watcher=Silent(),
            checkpoints=checkpoints(tmp_path, []),
        )
    message = str(stopped.value)
    assert "the loss is nan at step 3, minibatch 2 of epoch 1: batches('train', 300, 0, 0, start=2)" in message
    assert f"the last good state is in {tmp_path}/float-00000002.pt" in message


def test_a_loss_scaler_skips_steps_without_numbers_and_goes_on(digits: Data) -> None:
    recipe = Recipe.make(RECIPE | {"precision": "fp16"})
    network = poisoned(Net())
    watcher = Dying()
    fit(make_fabric(recipe), network, digits, recipe, None, epochs=1, learning_rate=0.01, watcher=watcher)
    assert all(p.isfinite().all() for p in network.parameters())
    assert watcher.records[0].step == 5
    assert math.isfinite(watcher.records[0].train_loss)


def test_limit_steps_ends_a_training_within_an_epoch(digits: Data) -> None:
    recipe = Recipe.make(RECIPE | {"limit_steps": 7})
    watcher = Dying()
    fit(make_fabric(recipe), Net(), digits, recipe, None, epochs=3, learning_rate=0.01, watcher=watcher)
    assert [(r.epoch, r.step) for r in watcher.records] == [(1, 5), (2, 7)]
    assert watcher.records[-1].learning_rate == 0
