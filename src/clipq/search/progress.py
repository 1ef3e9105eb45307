"""How far a search is, over all its stages: evaluations done and to come, and the time they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from optuna.trial import FrozenTrial, TrialState

Kind = Literal["one group", "whole plan", "screened plan", "fine-tuned plan"]
"""Evaluations that take about the same time each."""


@dataclass(frozen=True)
class Progress:
    """How far a search is; all processes that share it, and what was done before an interruption, count.

    Attributes:
        stage: which is under way.
        done, total: evaluations, over all stages.
        best: the lowest so far of what competes in this stage: the cost of whole plans of the wanted size, or ε - λc of
            a layer; None in the other stages, and before the first.
        seconds_left: until the search ends, by the mean time of each kind of evaluation; None if none was timed yet.
        least: whether that leaves out a kind that was not timed yet, so that it is the least.
    """

    stage: str
    done: int
    total: int
    best: float | None
    seconds_left: float | None
    least: bool


@dataclass
class _Stage:
    kind: Kind
    competes: bool
    total: int
    done: int = 0
    seconds: float = 0.0
    best: float | None = None


class Schedule:
    """The stages of a search, in order, with what is known of each."""

    def __init__(self) -> None:
        self._stages: dict[str, _Stage] = {}

    def expect(self, stage: str, kind: Kind, total: int, *, competes: bool = False) -> None:
        """A stage of about so many evaluations will come.

        Args:
            competes: whether its evaluations, with those of other such stages of its kind, look for the lowest.
        """
        self._stages[stage] = _Stage(kind, competes, total)

    def begins(self, stage: str, total: int) -> None:
        """A stage that is expected begins, and has so many evaluations."""
        self._stages[stage].total = total

    def after(self, stage: str, trials: Sequence[FrozenTrial]) -> Progress:
        """The progress when the trials of a stage are these."""
        finished = [t for t in trials if t.state == TrialState.COMPLETE]
        workers = 1 + sum(t.state == TrialState.RUNNING for t in trials)
        now = self._stages[stage]
        now.done = len(finished)
        now.seconds = sum(t.duration.total_seconds() for t in finished if t.duration is not None)
        if now.competes and finished:
            now.best = min(t.value for t in finished if t.value is not None)
        left, least = 0.0, False
        for other in self._stages.values():
            mean = self._mean(other.kind)
            if mean is None:
                least |= other.done < other.total
            else:
                left += mean * max(other.total - other.done, 0) / workers
        timed = any(s.done for s in self._stages.values())
        return Progress(
            stage,
            sum(s.done for s in self._stages.values()),
            sum(s.total for s in self._stages.values()),
            self._best(now),
            left if timed else None,
            least,
        )

    def _best(self, now: _Stage) -> float | None:
        """Of the stage, and of the plans of the wanted size that came before; layers compete within themselves."""
        rivals = [now] if now.kind == "one group" else [s for s in self._stages.values() if s.kind != "one group"]
        found = [s.best for s in rivals if s.best is not None]
        return min(found) if now.competes and found else None

    def _mean(self, kind: Kind) -> float | None:
        """Seconds of an evaluation; one of a group takes at most as long as one of a whole plan."""
        for of in (kind, "whole plan") if kind == "one group" else (kind,):
            stages = [s for s in self._stages.values() if s.kind == of]
            if done := sum(s.done for s in stages):
                return sum(s.seconds for s in stages) / done
        return None
