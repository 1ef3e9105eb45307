"""Shows a run's progress: loss, accuracy, bytes so far and time left."""

from __future__ import annotations

from types import TracebackType

from rich import progress as bars

from clipq.cli.common import errors
from clipq.finetune.watch import EpochRecord

_PHASES = {"float": "training", "compress": "compressing"}


class Progress:
    """A watcher that draws one bar a phase on standard error, and prints one line an epoch.

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

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._task is not None:
            self._bars.stop()

    def phase(self, name: str, steps: int) -> None:
        """A new bar."""
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

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._bars.console.print(text, highlight=False)
