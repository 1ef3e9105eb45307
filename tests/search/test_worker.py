"""One worker on a study that others left in some state: slots lost, claimed twice, or held by the dead."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.distributions import FloatDistribution
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

import clipq
from clipq import Target
from clipq.errors import SearchError
from clipq.search import Settings, study
from clipq.search.context import gp_sampler
from clipq.search.study import Worker, open_storage, suggest
from tests.search.nets import small_regression

SLOTS = [{"x": float(i)} for i in range(4)]


def value(trial: optuna.Trial) -> float:
    return float(suggest(trial, "x", FloatDistribution(0.0, 10.0)))


def within(seconds: float, run: Callable[[], Any]) -> Any:
    """What a call gives; the test fails if it waits for ever."""
    given: list[Any] = []
    thread = threading.Thread(target=lambda: given.append(run()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert given, "it did not end"
    return given[0]


def started(storage: BaseStorage, trials: list[tuple[int, TrialState, str | None]]) -> optuna.Study:
    """A stage that was under way: slots, with what became of them and the worker that had claimed them."""
    made = optuna.create_study(storage=storage, study_name="clipq/stage")
    for slot, state, worker in trials:
        made.enqueue_trial(SLOTS[slot], user_attrs={"slot": slot} | ({"worker": worker} if worker else {}))
        if state != TrialState.WAITING:
            number = len(made.trials) - 1
            storage.set_trial_state_values(made.trials[number]._trial_id, TrialState.RUNNING)
            if state != TrialState.RUNNING:
                values = [SLOTS[slot]["x"]] if state == TrialState.COMPLETE else None
                storage.set_trial_state_values(made.trials[number]._trial_id, state, values)
    made.set_user_attr("ready", True)
    return made


def values_of(trials: list[FrozenTrial]) -> list[float | None]:
    return [trial.value for trial in trials]


def complete(of: optuna.Study) -> list[int]:
    return sorted(t.user_attrs["slot"] for t in of.trials if t.state == TrialState.COMPLETE)


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize(
    "trials",
    [
        pytest.param([(0, "WAITING", None), (1, "FAIL", None), (2, "WAITING", None), (3, "WAITING", None)], id="lost"),
        pytest.param([(0, "WAITING", None), (1, "WAITING", None)], id="never put in"),
        pytest.param([(i, "WAITING", None) for i in (0, 1, 2, 3, 2, 0)], id="twice"),
        pytest.param([(0, "COMPLETE", None), (1, "COMPLETE", None), (0, "WAITING", None)], id="twice, one done"),
        pytest.param([(0, "RUNNING", "gone"), (1, "WAITING", None)], id="held by a dead process"),
        pytest.param([(0, "RUNNING", None), (1, "WAITING", None)], id="claimed without a name"),
        pytest.param([(0, "RUNNING", "ours"), (1, "WAITING", None)], id="held by a process whose id is another's now"),
        pytest.param([(0, "RUNNING", "far:1:abc"), (1, "WAITING", None)], id="held by a silent machine"),
    ],
)
def test_every_slot_is_evaluated_once_whatever_the_dead_left(
    trials: list[tuple[int, str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(study, "HEARTBEAT_SECONDS", 0.5)
    storage = InMemoryStorage()
    worker = Worker(storage, "clipq", {})
    machine = worker.name.rsplit(":", 2)[0]
    names = {"gone": f"{machine}:{dead_process()}:abc", "ours": f"{machine}:{os.getpid()}:abc"}
    left = started(storage, [(s, TrialState[state], names.get(w or "", w)) for s, state, w in trials])
    found = within(20, lambda: worker.run("stage", SLOTS, value))
    assert values_of(found) == [0.0, 1.0, 2.0, 3.0]
    assert complete(left) == [0, 1, 2, 3]
    assert all(t.state != TrialState.RUNNING for t in left.trials)


def test_a_worker_taken_for_dead_drops_its_value() -> None:
    storage = InMemoryStorage()
    asked = []

    def taken(trial: optuna.Trial) -> float:
        asked.append(trial.user_attrs["slot"])
        if len(asked) == 1:  # another worker takes the slot meanwhile, and gives it back
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        return value(trial)

    found = within(20, lambda: Worker(storage, "clipq", {}).run("stage", SLOTS, taken))
    assert values_of(found) == [0.0, 1.0, 2.0, 3.0]
    assert sorted(asked) == [0, 0, 1, 2, 3]


def test_an_evaluation_that_raises_leaves_its_slot_to_others() -> None:
    storage = InMemoryStorage()

    def raises(trial: optuna.Trial) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Worker(storage, "clipq", {}).run("stage", SLOTS, raises)
    assert values_of(Worker(storage, "clipq", {}).run("stage", SLOTS, value)) == [0.0, 1.0, 2.0, 3.0]


def test_no_two_workers_try_the_same_random_points() -> None:
    storage = InMemoryStorage()
    barrier = threading.Barrier(2, timeout=20)

    def together(trial: optuna.Trial) -> float:
        x = value(trial)
        barrier.wait()
        return x

    def run() -> list[FrozenTrial]:
        return Worker(storage, "clipq", {}).run("stage", [{}] * 4, together, sampler=gp_sampler(0, 8))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    tried = optuna.load_study(storage=storage, study_name="clipq/stage").trials
    assert len({t.value for t in tried}) == len(tried) == 4


def test_a_trial_on_sqlite_is_claimed_by_one_worker(tmp_path: Path) -> None:
    storages = [open_storage(f"sqlite:///{tmp_path / 'study.db'}") for _ in range(2)]
    made = optuna.create_study(storage=storages[0], study_name="s")
    made.enqueue_trial({})
    trial = made.trials[0]._trial_id

    def late(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("UPDATE trials"):
            time.sleep(0.5)

    claimed = []
    for storage in storages:
        sqlalchemy.event.listen(storage.engine, "before_cursor_execute", late)
    threads = [
        threading.Thread(target=lambda s=s: claimed.append(s.set_trial_state_values(trial, TrialState.RUNNING)))
        for s in storages
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == [False, True]


def test_a_worker_with_another_fingerprint_is_refused_though_both_start_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = InMemoryStorage()
    slow = threading.Event()
    check = Worker._check_fingerprint

    def late(self: Worker, fingerprint: dict[str, str], mine: bool) -> None:
        if mine:
            slow.wait(20)
        check(self, fingerprint, mine)

    monkeypatch.setattr(Worker, "_check_fingerprint", late)
    first = threading.Thread(target=lambda: Worker(storage, "clipq", {"model": "a"}), daemon=True)
    first.start()
    while not storage.get_all_studies():
        time.sleep(0.01)
    threading.Timer(0.5, slow.set).start()
    with pytest.raises(SearchError, match=r"made for something else: model \(a there, b here\)"):
        Worker(storage, "clipq", {"model": "b"})


@pytest.mark.parametrize("after", [3, 14, 22])
def test_a_search_that_went_on_comes_to_the_same_plan(after: int, tmp_path: Path) -> None:
    (model, cost), settings, left = small_regression(), Settings(evaluations=4, refinements=10), after

    def interrupted(network: Any) -> float:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return cost(network)

    def search(evaluate: Any, storage: str | None) -> clipq.Plan:
        return clipq.search(model, evaluate, Target(ratio=5), settings=settings, storage=storage)

    with pytest.raises(KeyboardInterrupt):
        search(interrupted, str(tmp_path / "journal"))
    assert search(cost, str(tmp_path / "journal")) == search(cost, None)


def test_a_storage_that_fails_during_the_search_is_named(tmp_path: Path) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}")

    def fails(trial: optuna.Trial) -> float:
        (tmp_path / "study.db").write_bytes(b"overwritten" * 1000)
        return value(trial)

    with pytest.raises(SearchError, match=r"storage failed: .*finished evaluation is kept"):
        Worker(storage, "clipq", {}).run("stage", SLOTS, fails)


def test_optuna_dashboard_opens_the_studies(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'study.db'}"
    Worker(open_storage(database), "clipq", {}).run("stage", SLOTS, value)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("optuna-dashboard")
    command = [str(program), "--host", "127.0.0.1", "--port", str(port), database]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        studies = {s["study_name"]: s for s in get(f"http://127.0.0.1:{port}/api/studies")["study_summaries"]}
        assert studies.keys() == {"clipq/workers", "clipq/stage"}
        trials = get(f"http://127.0.0.1:{port}/api/studies/{studies['clipq/stage']['study_id']}?after=0")["trials"]
        assert sorted(trial["values"][0] for trial in trials) == [0.0, 1.0, 2.0, 3.0]
    finally:
        server.terminate()
        server.wait()


def get(url: str) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
