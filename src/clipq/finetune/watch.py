"""What a run tells whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class EpochRecord:
    """One line of ``metrics.jsonl``.

    Attributes:
        phase: "float" for training before compression, "compress" for in-parallel training.
        epoch: counted from 1.
        step: optimizer steps of this phase so far.
        train_loss: mean over the epoch's steps.
        validation_loss, validation_accuracy: nats a sample; per cent.
        learning_rate: at the end of the epoch.
        bytes: size of the compressed file as it would be written now; None in the float phase.
        seconds: since the phase began.
    """

    phase: str
    epoch: int
    step: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    bytes: int | None
    seconds: float


class Watcher(Protocol):
    """Is told of a run's progress; the command line draws it."""

    def phase(self, name: str, steps: int, done: int = 0) -> None:
        """A phase of so many optimizer steps begins, or goes on after those that are done."""

    def step(self, loss: float) -> None:
        """One optimizer step is done."""

    def epoch(self, record: EpochRecord) -> None:
        """One epoch is done."""

    def note(self, text: str) -> None:
        """Something worth a line happened."""


class Silent:
    """A watcher that says nothing."""

    def phase(self, name: str, steps: int, done: int = 0) -> None: ...

    def step(self, loss: float) -> None: ...

    def epoch(self, record: EpochRecord) -> None: ...

    def note(self, text: str) -> None: ...
