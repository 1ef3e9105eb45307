"""Shows a run's progress: loss, accuracy, bytes or best so far, and time left."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from rich import progress as bars
from rich.text import Text

from clipq.cli.common import errors
from clipq.finetune.watch import EpochRecord

if TYPE_CHECKING:  # it imports Optuna, which takes a while
    from clipq.search.progress import Progress as SearchProgress

_PHASES = {"float": "training", "compress": "compressing"}


@dataclass
class _Stage:
    name: str
    started: float
    best: float | None = None


class Progress:
    """A watcher of training and of searches: draws one bar a phase or search on standard error, and prints one line an
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
            _TimeLeft(),
            console=errors,
            disable=quiet,
        )
        self._task: bars.TaskID | None = None
        self._loss = 0.0
        self._last = ""
        self._search: bars.TaskID | None = None
        self._stage: _Stage | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._end_search()
        self._bars.stop()

    def phase(self, name: str, steps: int, done: int = 0) -> None:
        """A new bar."""
        self._end_search()
        self._bars.start()
        self._loss, self._last = 0.0, ""
        self._task = self._bars.add_task(_PHASES[name], total=steps, completed=done, state="")

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
        """A stage of the search begins; the one before becomes a line."""
        self._end_stage()
        self._bars.start()
        if self._search is None:
            self._search = self._bars.add_task("search", total=None, state="", left="")
        self._bars.update(self._search, description=f"search: {name}")
        self._stage = _Stage(name, time.monotonic())

    def evaluated(self, progress: SearchProgress) -> None:
        """Move the bar, which is over all stages of the search."""
        if self._search is None or self._stage is None:
            return
        self._stage.best = progress.best
        best = "" if progress.best is None else f"best {progress.best:.4g}"
        self._bars.update(
            self._search, completed=progress.done, total=progress.total, state=best, left=time_left(progress)
        )

    def _end_stage(self) -> None:
        stage, self._stage = self._stage, None
        if stage is not None:
            best = "" if stage.best is None else f"best so far {stage.best:.4g}, "
            self.note(f"search, {stage.name}: {best}{time.monotonic() - stage.started:.1f} s")

    def _end_search(self) -> None:
        self._end_stage()
        if self._search is not None:
            self._bars.remove_task(self._search)
            self._search = None

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._bars.console.print(text, highlight=False)


def time_left(progress: SearchProgress) -> str:
    """As hours, minutes and seconds; with a sign if it is the least."""
    if progress.seconds_left is None:
        return "-:--:--"
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    return f"{'> ' if progress.least else ''}{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class _TimeLeft(bars.TimeRemainingColumn):
    """What a task's owner says, or else what its speed tells."""

    def render(self, task: bars.Task) -> Text:
        return Text(task.fields["left"], style="progress.remaining") if "left" in task.fields else super().render(task)
