"""Several processes train what one would: the samples of a step are theirs together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clipq.errors import RecipeError
from clipq.finetune.devices import make_fabric
from clipq.finetune.processes import Processes, process_environment
from clipq.finetune.rendezvous import agree_on_name
from clipq.recipe import Recipe
from tests.workers.engine import main

BASE: dict[str, Any] = {"batch_size": 100, "limit_steps": 6, "ema": 0.5, "clip_norm": 1.0}


def run(processes: int, path: Path, **fields: Any) -> dict[str, Any]:
    arguments = [str(path), json.dumps(BASE | fields)]
    if processes == 1:
        main(*arguments)
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, "-m", "tests.workers.engine", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_end_where_one_does(strategy: str, tmp_path: Path) -> None:
    one = run(1, tmp_path / "one.pt")
    two = run(2, tmp_path / "two.pt", strategy=strategy, accumulate=2)
    for name, tensor in one["state"].items():
        torch.testing.assert_close(two["state"][name], tensor, rtol=1e-3, atol=1e-4)
    assert two["records"][0]["validation_accuracy"] == one["records"][0]["validation_accuracy"]
    assert two["records"][0]["validation_loss"] == pytest.approx(one["records"][0]["validation_loss"], rel=1e-4)


def test_processes_agree_on_a_name_whatever_dead_ones_left_in_the_store() -> None:
    store = dist.HashStore()
    names: list[list[str]] = []
    for _ in range(2):  # the second time, the store has all of the first
        with ThreadPoolExecutor(4) as pool:
            names.append(list(pool.map(lambda rank: agree_on_name(store, rank, 4), range(4))))
    assert [len(set(found)) for found in names] == [1, 1]
    assert names[0][0] != names[1][0]


def test_samples_that_cannot_be_shared_are_refused() -> None:
    recipe = Recipe.make({"model": "lenet-5", "data": "digits", "float_epochs": 1})
    processes = Processes(make_fabric(recipe))
    processes.count = 3
    with pytest.raises(RecipeError, match=r"batch_size is 128.*cannot be shared equally among 3"):
        processes.share_of(128)


def test_fp16_and_fsdp_do_not_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    fields = {"model": "lenet-5", "data": "digits", "float_epochs": 1, "precision": "fp16", "strategy": "fsdp"}
    with pytest.raises(RecipeError, match=r"^strategy fsdp has no loss scaling, which precision fp16 needs"):
        make_fabric(Recipe.make(fields))


@pytest.mark.parametrize(
    ("precision", "capability"), [("bf16", "AVX2"), ("fp16", "AVX2"), ("bf16", "AVX512"), ("32", "AVX2")]
)
def test_16_bits_are_warned_of_where_the_processor_is_slow_in_them(
    precision: str, capability: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    fields = {"model": "lenet-5", "data": "digits", "float_epochs": 1, "device": "cpu", "precision": precision}
    make_fabric(Recipe.make(fields))
    said = [str(w.message) for w in recwarn if str(w.message).startswith(f"precision is {precision}")]
    slow = precision != "32" and capability == "AVX2"
    assert [s.endswith("give precision 32") for s in said] == [True] * slow


def test_a_process_by_itself_hears_nothing_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "2")
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(process_environment())
