"""Keeps what a run tells of itself, and passes it on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from clipq.errors import ArchiveError
from clipq.files import save
from clipq.finetune.checkpoint import PHASES
from clipq.finetune.run import RunFolder
from clipq.finetune.watch import EpochRecord, Watcher
from clipq.hold import file_bytes
from clipq.plan import Plan


class Recorder:
    """Passes everything on to the watchers, and keeps the metrics and the file of each epoch in the run folder."""

    def __init__(self, run: RunFolder, watcher: Watcher) -> None:
        self._run = run
        self._watchers: list[Watcher] = [watcher]
        self._writes = False
        self.records: list[EpochRecord] = []

    def start(self, loggers: Sequence[Watcher], state: Mapping[str, Any] | None) -> None:
        """Write from here on, after the epochs that lie behind a state; in the first process alone."""
        self._writes = True
        self._watchers += loggers
        if state is not None:
            behind = PHASES.index(state["phase"]), state["positions"][0]["epoch"]
            self.records = [r for r in self._run.load_metrics() if (PHASES.index(r.phase), r.epoch) <= behind]

    def keep_file(self, network: nn.Module, plan: Plan | None) -> int | None:
        """The bytes of the compressed file, written if it can be."""
        if plan is None:
            return None
        try:
            return save(network, self._run.model, plan=plan).bytes
        except ArchiveError as error:
            self.note(f"{error}. Training goes on")
            return file_bytes(network, plan)

    def phase(self, name: str, steps: int, done: int = 0) -> None:
        for watcher in self._watchers:
            watcher.phase(name, steps, done)

    def step(self, loss: float) -> None:
        for watcher in self._watchers:
            watcher.step(loss)

    def epoch(self, record: EpochRecord) -> None:
        self.records.append(record)
        if self._writes:
            try:
                self._run.save_metrics(self.records)
            except ArchiveError as error:
                self.note(f"{error}. Training goes on")
        for watcher in self._watchers:
            watcher.epoch(record)

    def note(self, text: str) -> None:
        for watcher in self._watchers:
            watcher.note(text)
