"""Whole runs of ``clipq compress`` on the digits, as a user runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import clipq
import clipq.cli
from clipq import demo

FAST = [
    *("--model", "clipq.demo:network", "--data", "digits", "--optimizer", "adam", "--learning-rate", "0.002"),
    *("--pruning-rate", "0.7", "--bits", "3", "--float-epochs", "4", "--epochs", "4"),
]
MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def raises(): raise OSError("no such camera")
def number(): return 3
def images(): return nn.Conv2d(1, 2, 3)
def wide(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
def narrow(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
def parts(n=60, classes=10):
    x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, torch.arange(n) % classes)
def data(): return parts(), parts(20)
def empty(): return parts(0), parts(20)
def labels(): return parts(60, 12), parts(20)
"""


def clipq_program(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clipq", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    result = clipq_program("compress", *FAST, "--out", "run", "--json", folder=folder)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == json.loads((folder / "run" / "report.json").read_text())
    return folder / "run"


def report_of(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "report.json").read_text())
    return value


def test_a_run_leaves_everything_in_its_folder(finished: Path) -> None:
    names = {"recipe.yaml", "plan.json", "metrics.jsonl", "model.clipq", "report.json", "report.md"}
    names |= {"checkpoints", "weights.safetensors"}
    assert {p.name for p in finished.iterdir()} == names
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(m["phase"], m["epoch"]) for m in metrics] == [(p, e) for p in ("float", "compress") for e in range(1, 5)]
    kept = sorted((finished / "checkpoints").iterdir())
    assert [p.name for p in kept] == ["compress-00000033.pt", "compress-00000044.pt"]
    assert set(torch.load(kept[-1], weights_only=True)) >= {"model", "optimizer", "schedule", "random_states"}
    assert clipq.Plan.load(finished / "plan.json").tensors["0.weight"].pruning_rate == 0.7


def test_the_numbers_reported_are_those_of_the_file(finished: Path) -> None:
    report = report_of(finished)
    assert report["bytes"]["file"] == (finished / "model.clipq").stat().st_size
    assert report["bytes"]["float32"] == sum(4 * p.numel() for p in demo.network().parameters())
    assert report["scores"]["after"] == report["scores"]["reloaded"]
    assert report["accuracy"]["before"] > 80
    assert report["accuracy"]["after"] > 80
    assert report["bytes"]["ratio"] > 8
    state = clipq.load(finished / "model.clipq")
    assert all(state[name].unique().numel() <= 8 for name in clipq.Plan.load(finished / "plan.json").tensors)


def test_every_tensor_is_in_the_report_compressed_or_with_the_reason(finished: Path) -> None:
    tensors = {t["name"]: t for t in report_of(finished)["tensors"]}
    assert list(tensors) == list(demo.network().state_dict())
    for name, t in tensors.items():
        assert (t["pruning_rate"] is None) == (t["left_out"] is not None), name
    page = (finished / "report.md").read_text()
    assert all(name in page for name in tensors)


def test_the_resolved_recipe_gives_the_same_file_again(finished: Path, tmp_path: Path) -> None:
    result = clipq_program("compress", str(finished / "recipe.yaml"), "--out", "again", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again" / "model.clipq").read_bytes() == (finished / "model.clipq").read_bytes()
    assert "the file, reloaded" in result.stdout


def test_a_run_is_not_overwritten_unless_forced(finished: Path) -> None:
    before = (finished / "model.clipq").read_bytes()
    result = clipq_program("compress", *FAST, "--out", str(finished), folder=finished.parent)
    assert result.returncode == 1
    assert "holds a run already" in result.stderr
    assert (finished / "model.clipq").read_bytes() == before


def test_weights_of_every_format_start_from_the_same_network(finished: Path, tmp_path: Path) -> None:
    state = clipq.load(finished / "model.clipq")
    torch.save(state, tmp_path / "w.pt")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    clipq.save(state, tmp_path / "w.clipq")
    scores = []
    for ending in ("pt", "safetensors", "clipq"):
        arguments = ("evaluate", str(finished / "recipe.yaml"), "--weights", f"w.{ending}", "--json")
        result = clipq_program(*arguments, folder=tmp_path)
        assert result.returncode == 0, result.stderr
        scores.append(json.loads(result.stdout))
    assert scores[0] == scores[1] == scores[2]
    assert scores[0]["accuracy"] == report_of(finished)["accuracy"]["reloaded"]


def test_a_loss_that_turns_nan_stops_with_the_step_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    explode = ("--learning-rate", "1e20", "--float-learning-rate", "0.002")
    result = clipq_program("compress", *FAST, *explode, "--out", "run", folder=tmp_path)
    assert result.returncode == 1
    assert "at step " in result.stderr
    assert "checkpoints/float-00000044.pt" in result.stderr
    assert "Traceback" not in result.stderr
    kept = torch.load(tmp_path / "run" / "checkpoints" / "float-00000044.pt", weights_only=True)
    assert all(t.isfinite().all() for t in kept["model"].values())


def test_an_interrupt_leaves_whole_files_and_says_so_by_its_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clipq", "compress", *FAST, "--epochs", "5000", "--out", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "model.clipq").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        torch.load(checkpoint, weights_only=True)
    clipq.load(tmp_path / "run" / "model.clipq")
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")]


def test_training_goes_on_while_checkpoints_cannot_be_written_and_says_so(tmp_path: Path) -> None:
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000)); "
        "import clipq.cli; sys.argv = ['clipq', *sys.argv[1:]]; clipq.cli.main()"
    )
    net = "nn.Sequential(nn.Flatten(), nn.Linear(64, 4096), nn.Linear(4096, 10))"
    (tmp_path / "net.py").write_text(f"from torch import nn\ndef net(): return {net}")
    arguments = ["--model", "net.py:net", "--limit-steps", "1", "--optimizer", "adamw"]
    command = [sys.executable, "-c", program, "compress", *FAST, *arguments, "--out", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    told = "".join(result.stderr.split())  # lines break anywhere
    assert "wasnotwritten;thereisnoneyet.Traininggoeson." in told
    assert "compress-00000001.ptcannotbewritten:Filetoolarge" in told
    assert "Traceback" not in result.stderr
    assert result.returncode == 0
    assert not any((tmp_path / "run" / "checkpoints").iterdir())
    clipq.load(tmp_path / "run" / "model.clipq")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lenet-6", "--data", "digits"], "did you mean 'lenet-5'"),
        (["--model", "m.py:raises", "--data", "digits"], "the function raised OSError: no such camera"),
        (["--model", "m.py:number", "--data", "digits"], "returned a int; it must return a torch.nn.Module"),
        (["--model", "m.py:missing", "--data", "digits"], "has no 'missing'"),
        (["--model", "m.py:images", "--data", "digits"], r"returns \(2, 2, 6, 6\) for 2 samples"),
        (["--model", "lenet-5", "--data", "digits"], "does not run on the data 'digits', whose inputs are"),
        (["--model", "m.py:wide", "--data", "digitz"], "did you mean 'digits'"),
        (["--model", "m.py:wide", "--data", "m.py:empty"], "training set: it is empty"),
        (["--model", "m.py:wide", "--data", "m.py:labels"], "label"),
        (["--model", "m.py:narrow", "--data", "digits"], "10 classes .* the network has 5 outputs"),
        (["--model", "m.py:wide", "--data", "digits", "--weights", "none.pt"], "there is no file none.pt"),
        (["--model", "m.py:wide", "--data", "digits", "--weights", "m.py"], "has the ending '.py'"),
        (
            ["--model", "m.py:wide", "--data", "digits", "--weights", "cut.safetensors"],
            "cut.safetensors cannot be read",
        ),
        (["--model", "m.py:wide", "--data", "digits", "--weights", "code.pt"], "code.pt holds more than tensors"),
        (
            ["--model", "m.py:wide", "--data", "digits", "--weights", "cut.clipq"],
            "cut.clipq: the header: .*the file is damaged",
        ),
        (["--model", "m.py:narrow", "--data", "digits", "--weights", "wide.pt"], r"do not fit .*\n  1.weight: shape"),
        (["--model", "m.py:wide", "--data", "digits", "--plan", "m.py"], "m.py cannot be used:"),
        (["--model", "m.py:wide", "--data", "digits", "--include", "norm"], "include 'norm' matches no parameter"),
        (["--model", "m.py:wide", "--data", "digits", "--device", "tpu9"], "device 'tpu9' cannot be used here"),
        (["--model", "m.py:wide", "--data", "digits", "--out", "m.py/run"], "cannot be used as run folder"),
    ],
)
def test_bad_input_is_one_clear_message_and_nothing_half_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "m.py").write_text(MODULE)
    wide = {"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)}
    torch.save(wide, tmp_path / "wide.pt")
    torch.save(wide | {"code": Path}, tmp_path / "code.pt")
    safetensors.torch.save_file(wide, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:200])
    clipq.save(wide, tmp_path / "whole.clipq")
    (tmp_path / "cut.clipq").write_bytes((tmp_path / "whole.clipq").read_bytes()[:-3])
    before = {p.name for p in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["clipq", "compress", *arguments, "--float-epochs", "1", "--epochs", "1"])
    with pytest.raises(SystemExit) as stopped:
        clipq.cli.main()
    stderr = capsys.readouterr().err
    assert stopped.value.code == 1
    assert "Traceback" not in stderr
    assert re.search(message, stderr), stderr
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__", "runs"} == before


def resume(folder: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(sys, "argv", ["clipq", "compress", "--resume", folder.name, *arguments])
    clipq.cli.main()


def test_a_finished_run_that_is_resumed_shows_its_report(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["--json"]):
        with pytest.raises(SystemExit) as stopped:
            resume(finished, arguments, monkeypatch)
        assert stopped.value.code == 0
    assert capsys.readouterr().out == (finished / "report.md").read_text() + (finished / "report.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "9"], "--epochs cannot be given with it"),
        (["--force", "--out", "there"], "--out, --force cannot be given with it"),
        (["recipe.yaml"], "RECIPE cannot be given with it"),
    ],
)
def test_a_resumed_run_keeps_its_recipe(
    arguments: list[str],
    message: str,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        resume(finished, arguments, monkeypatch)
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


def test_a_folder_without_a_run_cannot_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        resume(tmp_path / "none", [], monkeypatch)
    assert "holds no run to resume" in capsys.readouterr().err


def test_data_of_ones_own_without_a_test_set_is_reported_on_validation(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(MODULE)
    arguments = ("--model", "m.py:wide", "--data", "m.py:data", "--float-epochs", "1", "--epochs", "1", "--json")
    result = clipq_program("compress", *arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["part"] == "validation"
    assert (tmp_path / "runs" / "wide" / "model.clipq").exists()


def test_the_terminal_names_few_of_many_tensors_left_out_and_the_page_all(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def deep(): return nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64) for _ in range(9)), nn.Linear(64, 10))\n"
    )
    options = ["--model", "mine.py:deep", "--data", "digits", "--pruning-rate", "0.5", "--bits", "3"]
    done = clipq_program(
        "compress",
        *options,
        "--float-epochs",
        "1",
        "--epochs",
        "1",
        "--limit-steps",
        "2",
        "--out",
        "run",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    biases = [f"{i}.bias" for i in range(1, 11)]
    printed = " ".join(done.stdout.split())
    reason = "Not compressed (bias of Linear, not compressed by default): "
    assert f"{reason}{', '.join(biases[:6])}, and 4 more, which report.md names" in printed
    page = (tmp_path / "run" / "report.md").read_text()
    assert reason + ", ".join(biases) in page
