"""Evaluations shared by any number of processes, and kept across interruptions, through Optuna's storages.

A study is a fixed number of slots. Each is evaluated exactly once: a worker claims a slot as it claims a waiting
trial, which the storage makes atomic. A worker that died leaves its slot to the others, who notice by its silence.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from clipq.errors import SearchError

HEARTBEAT_SECONDS = 5.0
PATIENCE_SECONDS = 60.0
"""A worker that was silent for so long is taken for dead; on the same machine its process is looked for instead."""
_SLOT, _WORKER, _READY = "slot", "worker", "ready"
_POLL_SECONDS = 0.2
_OPENINGS = 10

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

Evaluate = Callable[[optuna.Trial], float]
Slots = Sequence[Mapping[str, Any]]
Progress = Callable[[Sequence[FrozenTrial]], None]


def open_storage(where: str | None) -> BaseStorage:
    """The storage at a database URL, in a journal file, or, for None, in memory.

    Raises:
        SearchError: it cannot be reached.
    """
    if where is None:
        return InMemoryStorage()
    for tries_left in reversed(range(_OPENINGS)):
        try:
            if "://" in where:
                return RDBStorage(where)
            lock: Any = _Lock(f"{where}.lock")
            return JournalStorage(JournalFileBackend(where, lock_obj=lock))
        except (IntegrityError, ProgrammingError, OperationalError) as error:
            # Two processes that make the tables of a new database at once get in each other's way.
            if not tries_left or ("already exists" not in str(error) and "UniqueViolation" not in str(error)):
                raise _unreachable(where, error) from error
            time.sleep(_POLL_SECONDS)
        except Exception as error:  # each database driver has errors of its own
            raise _unreachable(where, error) from error
    raise AssertionError


class _Lock:
    """The lock of a journal file. The system gives it back when its holder dies; Optuna's own, a link, would stay."""

    def __init__(self, path: str) -> None:
        self._lock = FileLock(path)

    def acquire(self) -> bool:
        self._lock.acquire(poll_interval=0.005)
        return True

    def release(self) -> None:
        self._lock.release()


def _unreachable(where: str, error: Exception) -> SearchError:
    reason = str(error).strip().partition("\n")[0]
    return SearchError(
        f"the search's storage {where!r} cannot be used: {type(error).__name__}: {reason}. Give the path of a journal "
        f"file in a folder that exists, or a database URL such as sqlite:///study.db or postgresql://user@host/database"
    )


class Worker:
    """One process at work on the studies of one search.

    Args:
        storage: shared with the other workers.
        search: the search's own name in the storage.
        fingerprint: of the model and everything else the evaluations depend on.

    Raises:
        SearchError: the storage holds a search of that name with another fingerprint.
    """

    def __init__(self, storage: BaseStorage, search: str, fingerprint: Mapping[str, str]) -> None:
        self._storage = storage
        self._search = search
        self.name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._registry = self._create("workers")[0]
        _check_fingerprint(self._registry, fingerprint, search)
        self._lock = threading.Lock()

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Lets the other workers know, as long as it lasts, that this one lives."""
        stop = threading.Event()

        def beat() -> None:
            while True:
                with self._lock:
                    self._registry.set_user_attr(f"alive {self.name}", time.time())
                if stop.wait(HEARTBEAT_SECONDS):
                    return

        if isinstance(self._storage, InMemoryStorage):
            yield
            return
        thread = threading.Thread(target=beat, name="clipq-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def run(
        self,
        stage: str,
        slots: Slots,
        evaluate: Evaluate,
        *,
        sampler: Callable[[int], optuna.samplers.BaseSampler] | None = None,
        progress: Progress | None = None,
    ) -> list[FrozenTrial]:
        """Have every slot of a stage evaluated, by whichever worker, and give the finished trials in slot order.

        Args:
            stage: a name for it, unique in the search.
            slots: what distinguishes them: parameters that are fixed; the others are the sampler's to choose.
            evaluate: gives the value of a trial, having asked it for its parameters.
            sampler: made from this worker's own seed offset; none is needed where all parameters are fixed.
            progress: is told of all finished trials after each one.
        """
        study = self._open(stage, slots, sampler)
        seen = -1
        while True:
            trials = study.get_trials(deepcopy=False)
            finished = [t for t in trials if t.state == TrialState.COMPLETE]
            if progress is not None and len(finished) != seen:
                seen = len(finished)
                progress(finished)
            if len(finished) >= len(slots):
                return sorted(finished, key=lambda t: int(t.user_attrs[_SLOT]))
            if any(t.state == TrialState.WAITING for t in trials):
                self._evaluate_one(study, slots, evaluate)
            elif not self._revive(study, slots, trials):
                time.sleep(_POLL_SECONDS)

    def _evaluate_one(self, study: Study, slots: Slots, evaluate: Evaluate) -> None:
        trial = study.ask()
        if _SLOT not in trial.user_attrs:  # another worker was faster, and ask() made a trial of its own
            study.tell(trial, state=TrialState.FAIL)
            return
        try:
            trial.set_user_attr(_WORKER, self.name)
            value = evaluate(trial)
        except BaseException:
            self._give_back(study, slots, trial)
            raise
        study.tell(trial, value)

    def _give_back(self, study: Study, slots: Slots, trial: optuna.Trial | FrozenTrial) -> None:
        """Leave a slot to be evaluated again."""
        try:
            if not self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL):
                return
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # another worker did
        slot = trial.user_attrs[_SLOT]
        study.enqueue_trial(dict(slots[slot]), user_attrs={_SLOT: slot})

    def _revive(self, study: Study, slots: Slots, trials: Sequence[FrozenTrial]) -> bool:
        """Put back what dead workers had claimed; whether there was anything."""
        found = False
        for trial in trials:
            if trial.state == TrialState.RUNNING and not self._lives(trial):
                if _SLOT in trial.user_attrs:
                    self._give_back(study, slots, trial)
                found = True
        return found

    def _lives(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs.get(_WORKER)
        if worker == self.name:
            return True
        if worker is None:  # it died, or is just about to say its name
            started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
            return time.time() - started < HEARTBEAT_SECONDS
        host, pid, _ = worker.rsplit(":", 2)
        if host == socket.gethostname():
            return _process_exists(int(pid))
        last = self._registry.user_attrs.get(f"alive {worker}", 0.0)
        return bool(time.time() - last < PATIENCE_SECONDS)

    def _open(
        self,
        stage: str,
        slots: Slots,
        sampler: Callable[[int], optuna.samplers.BaseSampler] | None,
    ) -> Study:
        study, mine = self._create(stage)
        waited = time.monotonic()
        while not mine and _READY not in study.user_attrs:
            time.sleep(_POLL_SECONDS)
            # Whoever created the study died before it had put all slots in.
            mine = time.monotonic() - waited > 2 * HEARTBEAT_SECONDS
        if mine:
            there = {t.user_attrs.get(_SLOT) for t in study.get_trials(deepcopy=False)}
            for slot, fixed in enumerate(slots):
                if slot not in there:
                    study.enqueue_trial(dict(fixed), user_attrs={_SLOT: slot})
            study.set_user_attr(_READY, True)
        if sampler is not None:
            study.sampler = sampler(sum(t.state.is_finished() for t in study.get_trials(deepcopy=False)))
        return study

    def _create(self, stage: str) -> tuple[Study, bool]:
        """The study of a stage, and whether it was made just now, by us."""
        name = f"{self._search}/{stage}"
        try:
            return optuna.create_study(storage=self._storage, study_name=name), True
        except optuna.exceptions.DuplicatedStudyError:
            return optuna.load_study(storage=self._storage, study_name=name), False


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """The trial's value of a parameter: the slot's fixed one, or the sampler's choice."""
    return trial._suggest(name, distribution)


def _check_fingerprint(registry: Study, fingerprint: Mapping[str, str], search: str) -> None:
    known = registry.user_attrs.get("fingerprint")
    if known is None:
        registry.set_user_attr("fingerprint", dict(fingerprint))
        return
    differing = [key for key in {**known, **fingerprint} if known.get(key) != fingerprint.get(key)]
    if differing:
        what = ", ".join(f"{key} ({known.get(key)} there, {fingerprint.get(key)} here)" for key in differing)
        raise SearchError(
            f"the storage holds a search {search!r} that was made for something else: {what}. Go on with what it was "
            f"started with, or give another run folder or storage"
        )


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether it has ended and only waits for its parent to take note (where the system can tell)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return False
