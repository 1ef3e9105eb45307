"""Shows a run's progress: loss, accuracy, bytes or best so far, and time left."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from types import TracebackType

from rich import progress as bars

from clipq.cli.common import errors
from clipq.finetune.watch import EpochRecord

_PHASES = {"float": "training", "compress": "compressing"}


@dataclass
class _Stage:
    name: str
    started: float
    task: bars.TaskID
    done: int = 0
    best: float = math.inf


class Progress:
    """A watcher of training and of searches: draws one bar a phase or stage on standard error, and prints one line an
    epoch or stage.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=None),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[state]}"),
            bars.TimeRemainingColumn(),
            console=errors,
            disable=quiet,
        )
        self._task: bars.TaskID | None = None
        self._loss = 0.0
        self._last = ""
        self._stage: _Stage | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._end_stage()
        self._bars.stop()

    def phase(self, name: str, steps: int) -> None:
        """A new bar."""
        self._end_stage()
        self._bars.start()
        self._loss, self._last = 0.0, ""
        self._task = self._bars.add_task(_PHASES[name], total=steps, state="")

    def step(self, loss: float) -> None:
        """Move the bar; the loss shown is a running mean over about twenty steps."""
        assert self._task is not None
        self._loss = loss if self._loss == 0.0 else 0.95 * self._loss + 0.05 * loss
        self._bars.update(self._task, advance=1, state=f"loss {self._loss:.4f}{self._last}")

    def epoch(self, record: EpochRecord) -> None:
        """One line."""
        size = "" if record.bytes is None else f", {record.bytes:,} bytes"
        self._last = f", {record.validation_accuracy:.2f} %{size}"
        self.note(
            f"epoch {record.epoch:3d}: train loss {record.train_loss:.4f}, validation "
            f"{record.validation_accuracy:.2f} %{size}"
        )

    def stage(self, name: str, total: int) -> None:
        """A new bar for the evaluations of a stage of the search; the one before becomes a line."""
        self._end_stage()
        if total > 1:
            self._bars.start()
            self._stage = _Stage(name, time.monotonic(), self._bars.add_task(f"search: {name}", total=total, state=""))

    def evaluated(self, done: int, best: float) -> None:
        """Move the stage's bar; evaluations of other processes, and of before an interruption, count too."""
        if self._stage is None:
            return
        if self._stage.done == 0 and done > 1:  # they were there already, and say nothing about the time left
            self._bars.reset(self._stage.task, completed=done)
        self._stage.done, self._stage.best = done, best
        self._bars.update(self._stage.task, completed=done, state=f"best {best:.4g}")

    def _end_stage(self) -> None:
        stage, self._stage = self._stage, None
        if stage is not None:
            self._bars.remove_task(stage.task)
            self.note(
                f"search, {stage.name}: {stage.done} evaluations, best {stage.best:.4g}, "
                f"{time.monotonic() - stage.started:.1f} s"
            )

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._bars.console.print(text, highlight=False)
