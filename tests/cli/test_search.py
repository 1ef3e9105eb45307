"""Whole runs of ``clipq search`` on the digits, as a user runs them."""

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

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

import clipq
import clipq.cli
from clipq.search import SearchRecord

MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def network(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
def other(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
def one_class():
    x = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, torch.zeros(60, dtype=torch.int64)), TensorDataset(x, torch.arange(60) % 10)
"""
NETWORK = ("--model", "m.py:network", "--data", "digits", "--weights", "w.pt")
FAST = (
    "--optimizer",
    "adam",
    "--learning-rate",
    "0.002",
    "--search-evaluations",
    "3",
    "--search-steps",
    "2",
    "--search-refinements",
    "2",
)
SEARCH = (*NETWORK, *FAST, "--ratio", "12")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m.py").write_text(MODULE)
    torch.manual_seed(0)
    first, second = torch.nn.Linear(64, 40), torch.nn.Linear(40, 10)
    state = {"1.weight": first.weight, "1.bias": first.bias, "3.weight": second.weight, "3.bias": second.bias}
    torch.save({name: tensor.detach() for name, tensor in state.items()}, tmp_path / "w.pt")
    return tmp_path


def start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "clipq", "search", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    """What it printed."""
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    return stdout


def evaluations(journal: Path) -> dict[tuple[str, int], tuple[float, Any]]:
    """Of every slot that was evaluated, the value and when it was done; each exactly once."""
    storage = JournalStorage(JournalFileBackend(str(journal)))
    found: dict[tuple[str, int], tuple[float, Any]] = {}
    for name in optuna.get_all_study_names(storage):
        for trial in optuna.load_study(storage=storage, study_name=name).get_trials():
            if trial.state == TrialState.COMPLETE:
                key = name, trial.user_attrs["slot"]
                assert key not in found
                assert trial.value is not None
                found[key] = trial.value, trial.datetime_complete
    return found


def started(folder: Path, least: int, *more: str) -> subprocess.Popen[str]:
    """A search that has finished at least so many evaluations."""
    process = start(*SEARCH, *more, "--out", "run", folder=folder)
    journal = folder / "run" / "search.journal"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and len(re.findall(r'"state": ?1\b', journal.read_text())) >= least:
            return process
        time.sleep(0.02)
    raise AssertionError(process.communicate()[1])


@pytest.mark.slow
def test_a_search_leaves_everything_and_its_plan_compresses(folder: Path) -> None:
    printed = json.loads(finished(start(*SEARCH, "--out", "run", "--json", folder=folder)))
    run = folder / "run"
    assert {p.name for p in run.iterdir() if not p.name.endswith(".lock")} == {
        *("recipe.yaml", "plan.json", "search.json", "search.html", "search.journal"),
    }
    text = (run / "search.json").read_text()
    assert printed == json.loads(text)
    record = SearchRecord.from_json(text)
    assert record.to_json() == text
    assert record.target_bytes is not None
    assert abs(record.drop) <= 100  # points of validation error
    assert 0.98 * record.target_bytes <= record.bytes <= record.target_bytes
    assert clipq.Plan.load(run / "plan.json") == record.plan
    page = (run / "search.html").read_text()
    assert page.count("<svg") == 4
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert all(name in page for name in record.plan.tensors)

    again = finished(start(*SEARCH, "--out", "run", folder=folder))  # all is there: nothing is evaluated
    assert "Target: ratio 12.0" in again
    assert all(name in again for name in record.plan.tensors)
    assert clipq.Plan.load(run / "plan.json") == record.plan

    with_plan = [*NETWORK, *FAST, "--plan", "run/plan.json", "--epochs", "1", "--out", "planned"]
    for arguments in (with_plan, [*SEARCH, "--epochs", "1", "--out", "run"]):  # the second from the search there
        command = [sys.executable, "-m", "clipq", "compress", *arguments]
        result = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        assert result.returncode == 0, result.stderr
    assert SearchRecord.from_json((run / "search.json").read_text()).plan == record.plan
    assert (run / "model.clipq").stat().st_size <= record.target_bytes


@pytest.mark.slow
def test_a_killed_search_goes_on_without_repeating_what_was_finished(folder: Path) -> None:
    process = started(folder, 5)
    process.kill()
    process.communicate()
    before = evaluations(folder / "run" / "search.journal")
    workers = [start(*SEARCH, "--out", "run", folder=folder) for _ in range(2)]
    for worker in workers:
        finished(worker)
    after = evaluations(folder / "run" / "search.journal")
    assert len(before) >= 5
    assert len(after) > len(before)
    assert {key: after[key] for key in before} == before


@pytest.mark.slow
def test_an_interrupt_says_that_the_same_command_goes_on(folder: Path) -> None:
    process = started(folder, 3, "--search-evaluations", "500")  # never done before the signal comes
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command (without --force) goes on" in stderr
    assert "Traceback" not in stderr
    assert evaluations(folder / "run" / "search.journal")


@pytest.mark.slow
def test_an_interrupt_that_python_drops_is_not_lost(folder: Path) -> None:
    with (folder / "m.py").open("a") as module:
        module.write(
            """
import signal, time

class Destroyed:
    def __del__(self): signal.raise_signal(signal.SIGINT)

def slow():
    Destroyed()
    for _ in range(3000): time.sleep(0.1)
    return network()
"""
        )
    process = start(*SEARCH, "--model", "m.py:slow", "--out", "run", folder=folder)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "Traceback" not in stderr


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The message with which a command is refused."""
    monkeypatch.setattr(sys, "argv", ["clipq", "search", *arguments])
    with pytest.raises(SystemExit) as stopped:
        clipq.cli.main()
    stderr = capsys.readouterr().err
    assert stopped.value.code in (1, 2)
    assert "Traceback" not in stderr
    return " ".join(stderr.split())


def test_a_search_for_something_else_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["clipq", "search", *SEARCH, "--out", "run", "--json"])
    with pytest.raises(SystemExit) as stopped:
        clipq.cli.main()
    assert not stopped.value.code
    message = refused(capsys, monkeypatch, *NETWORK, *FAST, "--ratio", "10", "--out", "run")
    assert "run: holds a search that was made for something else: ratio (12.0 there, 10.0 here)" in message
    shared = ("--storage", "run/search.journal", "--out", "second")
    assert "target (" in refused(capsys, monkeypatch, *NETWORK, *FAST, "--ratio", "10", *shared)
    samples = refused(capsys, monkeypatch, *SEARCH, "--search-samples", "50", *shared, "--force")
    assert "search_samples (2000 there, 50 here)" in samples
    torch.save({n: t + 1 for n, t in torch.load("w.pt").items()}, "w.pt")  # the same recipe, another model
    assert re.search(r"model \(\w+ there, \w+ here\)", refused(capsys, monkeypatch, *SEARCH, "--out", "run"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*NETWORK, "--ratio", "9", "--plan", "p.json"], "gives ratio and plan"),
        ([*NETWORK, "--ratio", "9", "--bytes", "1MB"], "gives ratio and bytes"),
        ([*NETWORK, "--bytes", "lots"], "'lots' is no number of bytes"),
        ([*NETWORK, "--pruning-rate", "0.5"], "there is nothing to search for. Give one of --ratio"),
        ([*NETWORK, "--bytes", "200"], "the target of 200 bytes cannot be met: the smallest file"),
        ([*NETWORK[:2], "--data", "m.py:one_class", *NETWORK[4:], "--ratio", "9"], "are of class 0"),
        ([*NETWORK, "--ratio", "9", "--storage", "postgresql://nobody@127.0.0.1:1/x"], "cannot be used"),
        ([*NETWORK, "--ratio", "9", "--storage", "none/such.journal"], "cannot be used"),
        ([*NETWORK, "--ratio", "9", "--search-method", "layerwise"], "Give trade_off"),
        ([*NETWORK, "--ration", "9"], "--ratio"),
        ([*NETWORK, "--ratio", "1"], "ratio"),
    ],
)
def test_bad_input_is_one_clear_message(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "300")
    assert message in refused(capsys, monkeypatch, *arguments)
