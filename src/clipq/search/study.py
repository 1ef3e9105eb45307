"""Evaluations shared by any number of processes, and kept across interruptions, through Optuna's storages.

A study is a fixed number of slots. Each is evaluated exactly once: a worker claims a slot as it claims a waiting
trial, which the storage makes atomic. A worker that died leaves its slot to the others, who notice by its silence.
Of two trials for one slot, which a death at the wrong moment can leave behind, the earlier one counts.
"""

from __future__ import annotations

import os
import random
import re
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from clipq.errors import SearchError

HEARTBEAT_SECONDS = 5.0
PATIENCE_SECONDS = 60.0
"""A worker that was silent for so long is taken for dead; on the same machine at once if its process is gone."""
_SLOT, _WORKER, _READY, _FINGERPRINT = "slot", "worker", "ready", "fingerprint"
_POLL_SECONDS = 0.2
_OPEN_TRIES = 10
_LOCK_SECONDS = 60

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
    try:
        if "://" in where:
            return _database(where)
        lock: Any = _Lock(f"{where}.lock")
        return JournalStorage(JournalFileBackend(where, lock_obj=lock))
    except Exception as error:  # each database driver has errors of its own
        reason = str(error).strip().partition("\n")[0]
        raise SearchError(
            f"the search's storage {where!r} cannot be used: {type(error).__name__}: {reason}. Give the path of a "
            f"journal file in a folder that exists, or a database URL such as sqlite:///study.db or "
            f"postgresql://user@host/database"
        ) from error


class _Lock:
    """The lock of a journal file. The system gives it back when its holder dies; Optuna's own, a link, would stay."""

    def __init__(self, path: str) -> None:
        self._lock = FileLock(path)

    def acquire(self) -> bool:
        self._lock.acquire(poll_interval=0.005)
        return True

    def release(self) -> None:
        self._lock.release()


def _database(url: str) -> RDBStorage:
    if not url.startswith("sqlite"):
        return _with_tables(url, {"pool_pre_ping": True})
    storage = _with_tables(url, {"connect_args": {"timeout": _LOCK_SECONDS}})

    # SQLite locks no rows: unless every transaction is alone from its start, two workers can claim one trial.
    def leave_transactions_to_us(connection: Any, _: object) -> None:
        connection.isolation_level = None

    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.engine.dispose()
    sqlalchemy.event.listen(storage.engine, "connect", leave_transactions_to_us)
    sqlalchemy.event.listen(storage.engine, "begin", begin)
    return storage


def _with_tables(url: str, engine_kwargs: dict[str, Any]) -> RDBStorage:
    for attempt in range(_OPEN_TRIES):
        try:
            return RDBStorage(url, engine_kwargs=engine_kwargs)
        except sqlalchemy.exc.DBAPIError as error:
            # Workers that start together on an empty database get in each other's way as they make the tables.
            if attempt == _OPEN_TRIES - 1 or not re.search("already exists|unique|duplicate|locked", str(error), re.I):
                raise
            time.sleep(_POLL_SECONDS * (1 + random.random()))
    raise AssertionError


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
        self.name = f"{_machine()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._heard: dict[str, tuple[object, float]] = {}
        with _storage_errors():
            self._registry, mine = self._create("workers")
            self._check_fingerprint(fingerprint, mine)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Lets the other workers know, as long as it lasts, that this one lives."""
        stop = threading.Event()

        def beat() -> None:
            while True:
                with suppress(Exception):  # a storage that is busy now may not be at the next beat
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
            sampler: made from the slot's number, so that no two slots see the same random numbers, whoever evaluates
                them; none is needed where all parameters are fixed.
            progress: is told of all trials, at first and after each that is finished.

        Raises:
            SearchError: the storage cannot be reached any more.
        """
        with _storage_errors():
            study = self._open(stage, slots)
            seen = -1
            while True:
                trials = study.get_trials(deepcopy=False)
                finished = [t for t in trials if t.state == TrialState.COMPLETE]
                if progress is not None and len(finished) != seen:
                    seen = len(finished)
                    progress(trials)
                if len(finished) == len(slots):
                    return sorted(finished, key=lambda t: int(t.user_attrs[_SLOT]))
                waiting = [t for t in trials if t.state == TrialState.WAITING]
                if waiting:
                    self._evaluate_first(study, slots, trials, waiting, evaluate, sampler)
                elif not self._put_back(study, slots, trials):
                    time.sleep(_POLL_SECONDS)

    def _evaluate_first(
        self,
        study: Study,
        slots: Slots,
        trials: Sequence[FrozenTrial],
        waiting: Sequence[FrozenTrial],
        evaluate: Evaluate,
        sampler: Callable[[int], optuna.samplers.BaseSampler] | None,
    ) -> None:
        """Evaluate the first waiting trial that no other worker claims before us."""
        claimed = next((t for t in waiting if self._set_state(t, TrialState.RUNNING)), None)
        if claimed is None:
            return
        slot = claimed.user_attrs[_SLOT]
        live = [t.number for t in trials if t.user_attrs.get(_SLOT) == slot and t.state != TrialState.FAIL]
        if min(live) < claimed.number:
            self._set_state(claimed, TrialState.FAIL)
            return
        try:
            self._storage.set_trial_user_attr(claimed._trial_id, _WORKER, self.name)
            if sampler is not None:
                study.sampler = sampler(slot)
            trial = optuna.Trial(study, claimed._trial_id)
            study.tell(trial, evaluate(trial))
        except optuna.exceptions.UpdateFinishedTrialError:
            pass  # we were taken for dead, and the slot is another's now
        except BaseException:
            self._give_back(study, slots, claimed)
            raise

    def _set_state(self, trial: FrozenTrial, state: TrialState) -> bool:
        """Whether it was us who gave the trial this state."""
        try:
            return bool(self._storage.set_trial_state_values(trial._trial_id, state))
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    def _give_back(self, study: Study, slots: Slots, trial: FrozenTrial) -> None:
        """Leave a slot to be evaluated again."""
        if self._set_state(trial, TrialState.FAIL):
            _enqueue(study, slots, trial.user_attrs[_SLOT])

    def _put_back(self, study: Study, slots: Slots, trials: Sequence[FrozenTrial]) -> bool:
        """Put back the slots that dead workers left unfinished; whether there were any."""
        dead = [t for t in trials if t.state == TrialState.RUNNING and not self._lives(t)]
        for trial in dead:
            self._give_back(study, slots, trial)
        there = {t.user_attrs[_SLOT] for t in trials if t.state != TrialState.FAIL}
        lost = [
            slot for slot in range(len(slots)) if slot not in there
        ]  # by a death between the two steps of giving back
        for slot in lost:
            _enqueue(study, slots, slot)
        return bool(dead or lost)

    def _lives(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs.get(_WORKER)
        if worker is None:  # it died, or is just about to say its name
            return self._silence(f"trial {trial._trial_id}", None) < HEARTBEAT_SECONDS
        machine, pid, _ = worker.rsplit(":", 2)
        if machine == _machine() and not _process_exists(int(pid)):
            return False
        return self._silence(worker, self._registry.user_attrs.get(f"alive {worker}")) < PATIENCE_SECONDS

    def _silence(self, of: str, sign: object) -> float:
        """For how many seconds, by our own clock, a sign of life has stayed the same."""
        now = time.monotonic()
        if of not in self._heard or self._heard[of][0] != sign:
            self._heard[of] = sign, now
        return now - self._heard[of][1]

    def _open(self, stage: str, slots: Slots) -> Study:
        study, mine = self._create(stage)
        if not mine:
            mine = not self._waited_for(study, _READY)
        if mine:
            there = {t.user_attrs.get(_SLOT) for t in study.get_trials(deepcopy=False)}
            for slot in range(len(slots)):
                if slot not in there:
                    _enqueue(study, slots, slot)
            study.set_user_attr(_READY, True)
        return study

    def _waited_for(self, study: Study, attribute: str) -> bool:
        """Wait until a study's creator has set an attribute; False if it seems to have died before it could."""
        started = time.monotonic()
        while attribute not in study.user_attrs:
            if time.monotonic() - started > 2 * HEARTBEAT_SECONDS:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _check_fingerprint(self, fingerprint: Mapping[str, str], mine: bool) -> None:
        if mine or not self._waited_for(self._registry, _FINGERPRINT):
            self._registry.set_user_attr(_FINGERPRINT, dict(fingerprint))
            return
        known = self._registry.user_attrs[_FINGERPRINT]
        differing = [key for key in {**known, **fingerprint} if known.get(key) != fingerprint.get(key)]
        if differing:
            what = ", ".join(f"{key} ({known.get(key)} there, {fingerprint.get(key)} here)" for key in differing)
            raise SearchError(
                f"the storage holds a search {self._search!r} that was made for something else: {what}. Go on with "
                f"what it was started with, or give another run folder or storage"
            )

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


def _enqueue(study: Study, slots: Slots, slot: int) -> None:
    study.enqueue_trial(dict(slots[slot]), user_attrs={_SLOT: slot})


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise SearchError(
            f"the search's storage failed: {reason}. Every finished evaluation is kept in it: start the search again "
            f"when it can be reached"
        ) from error


def _machine() -> str:
    """Where a process id means the same process: one start of one machine, and not within another container."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{socket.gethostname()}:{file.read().strip()}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


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
