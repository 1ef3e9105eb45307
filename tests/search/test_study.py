"""Processes that share a search, die, and go on: every evaluation is made once, and all come to the same plan."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

import clipq
from clipq import Target
from clipq.errors import SearchError
from clipq.search import SearchRecord
from clipq.search.study import open_storage
from tests.search.nets import small_regression

WORKER = Path(__file__).parents[1] / "workers" / "search.py"
EVALUATIONS = {"base": 1, "alone": 2 * 4, "whole": 6, "candidates": 11, "refine": 10, "plan": 1, "prices": 3}
"""Of each stage of the workers' search, which is over two tensors."""
TOLERANCE = 0.1
"""By how much the cost of a shared search's plan may exceed a single worker's. The refinement knows, when it chooses a
plan, the evaluations that are finished by then, and those differ."""


def start(storage: str, out: Path, seconds: float = 0.0, *change: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(WORKER), storage, str(out), str(seconds), *change]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()


def evaluations_of(out: Path) -> int:
    log = out.with_name(out.name + ".log")
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for(out: Path, evaluations: int) -> None:
    for _ in range(2400):
        if evaluations_of(out) >= evaluations:
            return
        time.sleep(0.05)
    raise AssertionError(f"{out} made {evaluations_of(out)} evaluations")


def check_every_evaluation_is_there_once(storage: str) -> None:
    opened = open_storage(storage)
    for stage, n in EVALUATIONS.items():
        study = optuna.load_study(storage=opened, study_name=f"clipq/{stage}")
        done = [t.user_attrs["slot"] for t in study.trials if t.state == TrialState.COMPLETE]
        assert sorted(done) == list(range(n)), stage
        assert all(t.state.is_finished() for t in study.trials), stage


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a single worker's search: its ``journal``, and its record, ``found``."""
    folder = tmp_path_factory.mktemp("alone")
    finish(start(str(folder / "journal"), folder / "found"))
    return folder


def record(out: Path) -> SearchRecord:
    return SearchRecord.from_json(out.read_text())


def check_as_good_as(alone: Path, found: Sequence[SearchRecord]) -> None:
    """All workers came to one plan, of the same target, which is as good as a single worker's."""
    by_one = record(alone / "found")
    for other in found:
        assert other.plan == found[0].plan
        assert other.target_bytes == by_one.target_bytes
        assert 0.98 * by_one.target_bytes <= other.bytes <= by_one.target_bytes
        assert other.cost <= (1 + TOLERANCE) * by_one.cost


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_two_workers_on_a_file_share_the_evaluations(kind: str, tmp_path: Path, alone: Path) -> None:
    storage = str(tmp_path / "study") if kind == "journal" else f"sqlite:///{tmp_path / 'study.db'}"
    outs = [tmp_path / "a", tmp_path / "b"]
    workers = [start(storage, out, 0.05) for out in outs]
    for worker in workers:
        finish(worker)
    check_every_evaluation_is_there_once(storage)
    counts = [evaluations_of(out) for out in outs]
    assert sum(counts) == sum(EVALUATIONS.values())
    assert min(counts) >= 3
    check_as_good_as(alone, [record(out) for out in outs])


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_was(tmp_path: Path, alone: Path) -> None:
    storage = str(tmp_path / "journal")
    first, second = tmp_path / "first", tmp_path / "second"
    worker = start(storage, first, 0.05)
    wait_for(first, 12)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    finish(start(storage, second))
    check_every_evaluation_is_there_once(storage)
    # At most the one evaluation that was under way is made again.
    assert evaluations_of(first) + evaluations_of(second) <= sum(EVALUATIONS.values()) + 1
    # One worker sees the same evaluations in the same order, killed or not.
    assert record(second).plan == record(alone / "found").plan


@pytest.mark.slow
@pytest.mark.parametrize(("change", "message"), [("model", "model ("), ("target", "target (")])
def test_a_study_for_something_else_is_refused(change: str, message: str, tmp_path: Path, alone: Path) -> None:
    other = start(str(alone / "journal"), tmp_path / "b", 0.0, change)
    _, errors = other.communicate(timeout=120)
    assert other.returncode != 0
    assert "was made for something else" in errors.decode()
    assert message in errors.decode()
    assert evaluations_of(tmp_path / "b") == 0


@pytest.fixture
def postgresql() -> Iterator[str]:
    """The URL of a new database server of our own."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("no PostgreSQL server is installed")
    binaries, folder = found[-1].parent, Path(tempfile.mkdtemp(prefix="clipq-postgresql-"))
    user: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        shutil.chown(folder, "postgres")
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder / "data"

    def run(*command: str) -> None:
        subprocess.run([*user, *command], check=True, capture_output=True, cwd=folder)

    run(str(binaries / "initdb"), "-D", str(data), "-U", "clipq", "--auth=trust", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    run(str(binaries / "pg_ctl"), "-D", str(data), "-l", str(folder / "log"), "-w", "-o", options, "start")
    try:
        yield f"postgresql+psycopg://clipq@127.0.0.1:{port}/postgres"
    finally:
        run(str(binaries / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.mark.slow
def test_four_workers_on_a_database_of_which_one_is_killed(postgresql: str, tmp_path: Path, alone: Path) -> None:
    outs = [tmp_path / f"worker{i}" for i in range(4)]
    workers = [start(postgresql, out, 0.2) for out in outs]
    wait_for(outs[0], 2)
    workers[0].send_signal(signal.SIGKILL)
    workers[0].wait()
    for worker in workers[1:]:
        finish(worker)
    check_every_evaluation_is_there_once(postgresql)
    # At most the one evaluation that was under way is made again.
    made = sum(evaluations_of(out) for out in outs)
    assert sum(EVALUATIONS.values()) <= made <= sum(EVALUATIONS.values()) + 1
    check_as_good_as(alone, [record(out) for out in outs[1:]])


@pytest.mark.parametrize(
    "storage", ["postgresql+psycopg://clipq@127.0.0.1:9/none", "nosuch://place", "missing-folder/study.journal"]
)
def test_a_storage_that_cannot_be_reached(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SearchError, match=r"the search's storage '.*' cannot be used: .*Give the path of"):
        clipq.search(*small_regression(), Target(ratio=8), storage=storage)
