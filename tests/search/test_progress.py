"""Progress over a whole search: the best so far, and the time left from the mean time of each kind of evaluation."""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from clipq import Target
from clipq.cli.progress import time_left
from clipq.search import SearchRecord, Settings, run_search
from clipq.search.progress import Progress, Schedule
from clipq.search.settings import Silent
from tests.search.nets import small_regression


def trials(done: int, seconds: float, *, running: int = 0, value: float = 1.0) -> list[FrozenTrial]:
    finished = [create_trial(value=value + i) for i in range(done)]
    for trial in finished:
        trial.datetime_start = datetime(2026, 1, 1)
        trial.datetime_complete = trial.datetime_start + timedelta(seconds=seconds)
    return [*finished, *(create_trial(state=TrialState.RUNNING) for _ in range(running))]


def schedule() -> Schedule:
    made = Schedule()
    made.expect("base", "whole plan", 1)
    made.expect("alone", "one group", 20)
    made.expect("candidates", "fine-tuned plan", 9, competes=True)
    made.expect("refine", "fine-tuned plan", 30, competes=True)
    made.expect("plan", "fine-tuned plan", 1)
    return made


def test_time_left_is_over_all_stages() -> None:
    made = schedule()
    assert made.after("base", []) == Progress("base", 0, 61, None, None, True)
    # An evaluation of one group takes at most as long as one of a whole plan; fine-tuning was not timed yet.
    assert made.after("base", trials(1, 4.0)) == Progress("base", 1, 61, None, 80.0, True)
    assert made.after("alone", trials(10, 1.0)) == Progress("alone", 11, 61, None, 10.0, True)
    made.after("alone", trials(20, 1.0))
    made.begins("candidates", 8)
    found = made.after("candidates", trials(2, 6.0, value=0.5))
    assert found == Progress("candidates", 23, 60, 0.5, 6.0 * (6 + 30 + 1), False)


def test_workers_share_the_time() -> None:
    made = schedule()
    alone, shared = (made.after("base", trials(1, 4.0, running=n)).seconds_left for n in (0, 3))
    assert alone is not None
    assert shared == alone / 4


def test_the_best_is_kept_over_stages_that_compete() -> None:
    made = schedule()
    made.after("candidates", trials(9, 1.0, value=0.5))
    assert made.after("refine", trials(2, 1.0, value=0.7)).best == 0.5
    assert made.after("refine", trials(3, 1.0, value=0.3)).best == 0.3
    assert made.after("plan", []).best is None


def test_layers_compete_within_themselves() -> None:
    made = Schedule()
    for i in range(2):
        made.expect(f"layer {i}", "one group", 5, competes=True)
    made.after("layer 0", trials(5, 1.0, value=0.1))
    assert made.after("layer 1", []).best is None
    assert made.after("layer 1", trials(1, 1.0, value=0.4)).best == 0.4


class Watching(Silent):
    def __init__(self) -> None:
        self.told: list[Progress] = []

    def evaluated(self, progress: Progress) -> None:
        self.told.append(progress)


@pytest.mark.parametrize(
    ("target", "method"),
    [
        (Target(ratio=4), "default"),
        (Target(max_drop=0.1), "default"),
        (Target(trade_off=1.0), "layerwise"),
    ],
    ids=["ratio", "max_drop", "layerwise"],
)
def test_a_search_tells_how_far_it_is(target: Target, method: str, tmp_path: Path) -> None:
    model, cost = small_regression()
    settings = Settings(method=method, evaluations=3, refinements=3)

    def search() -> tuple[SearchRecord, list[Progress]]:
        watching = Watching()
        record = run_search(model, cost, target, settings=settings, storage=str(tmp_path / "s"), watcher=watching)
        return record, watching.told

    record, told = search()
    assert told[0].done == 0
    assert told[-1].done == told[-1].total == len({p.done for p in told}) - 1
    assert len({p.total for p in told}) <= 2  # the number of candidates is known late
    assert told[-1].seconds_left == 0.0
    assert not told[-1].least
    assert all(a.done <= b.done for a, b in itertools.pairwise(told))
    best = [p.best for p in told if p.best is not None]
    if method == "default":
        assert best == sorted(best, reverse=True)
        assert best[-1] == min(e.cost for e in record.evaluations if e.stage in ("candidates", "refine"))
    again = search()[1]  # everything is there
    assert again[-1].done == again[-1].total == told[-1].total


@pytest.mark.parametrize(
    ("seconds", "least", "shown"), [(None, True, "-:--:--"), (3725.0, False, "1:02:05"), (59.6, True, "> 0:01:00")]
)
def test_how_time_left_is_written(seconds: float | None, least: bool, shown: str) -> None:
    assert time_left(Progress("alone", 1, 9, None, seconds, least)) == shown
