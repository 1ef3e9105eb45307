"""What every method of search works with: the groups, their sizes, the evaluator, the studies, and the record."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import optuna
import torch
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial

from clipq.archive import EncodedTensors
from clipq.errors import SearchError
from clipq.hold import Finish, file_bytes
from clipq.plan import Plan
from clipq.search.allocate import fitted, largest
from clipq.search.evaluator import Evaluate, Evaluator, Recover
from clipq.search.fit import smallest_file
from clipq.search.groups import Group, Theta, plan_of, quantize_group
from clipq.search.progress import Schedule
from clipq.search.record import Evaluation, GroupRecord
from clipq.search.remarks import FEWER, remarks
from clipq.search.settings import Settings, Watcher
from clipq.search.sizes import SizeModel
from clipq.search.study import Worker, suggest

_SCORE = "score"


@dataclass
class Context:
    """One search under way."""

    evaluator: Evaluator
    validate: Evaluate | None
    recover: Recover | None
    finish: Finish | None
    groups: tuple[Group, ...]
    sizes: list[SizeModel]
    worker: Worker
    settings: Settings
    watcher: Watcher
    evaluations: list[Evaluation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Schedule)
    base_cost: float = 0.0
    base_score: float = 0.0
    _encoded: EncodedTensors = field(default_factory=EncodedTensors)

    @property
    def float32_bytes(self) -> int:
        """Of the whole model, tied tensors once."""
        own = {t.untyped_storage().data_ptr(): t.numel() for t in self.evaluator.tensors().values() if t.numel()}
        return 4 * sum(own.values())

    @property
    def nothing(self) -> list[Theta | None]:
        """Every group in full precision."""
        return [None] * len(self.groups)

    def run_stage(
        self,
        stage: str,
        slots: Sequence[Mapping[str, Any]],
        evaluate: Any,
        sampler: Any = None,
    ) -> list[FrozenTrial]:
        """Have a stage's slots evaluated by all workers together; see `Worker.run`."""
        self.schedule.begins(stage, len(slots))
        self.watcher.stage(stage, len(slots))

        def progress(trials: Sequence[FrozenTrial]) -> None:
            self.watcher.evaluated(self.schedule.after(stage, trials))

        with self.timed(stage):
            return self.worker.run(stage, slots, evaluate, sampler=sampler, progress=progress)

    def one(self, stage: str, evaluate: Any) -> FrozenTrial:
        """A stage of a single evaluation."""
        return self.run_stage(stage, [{}], evaluate)[0]

    def measure_base(self) -> None:
        """The cost of the full-precision model, and what ``validate`` (or else ``evaluate``) gives for it."""

        def evaluate(trial: optuna.Trial) -> float:
            cost = self.evaluator.at(self.groups, self.nothing)
            trial.set_user_attr(_SCORE, cost if self.validate is None else self.evaluator.validated(self.validate))
            return cost

        trial = self.one("base", evaluate)
        self.base_cost, self.base_score = value_of(trial), trial.user_attrs[_SCORE]
        self.evaluations.append(Evaluation("base", self.base_cost))

    def measure_plan(self, plan: Plan, file_bytes: int) -> tuple[float, float]:
        """The cost of the chosen plan, after ``recover`` if any, and how much worse ``validate`` finds it."""

        def evaluate(trial: optuna.Trial) -> float:
            cost, score, _ = self.evaluator.of_plan(plan, self.recover, file_bytes, self.validate)
            trial.set_user_attr(_SCORE, cost if score is None else score)
            return cost

        trial = self.one("plan", evaluate)
        return value_of(trial), trial.user_attrs[_SCORE] - self.base_score

    def expect_prices(self) -> None:
        """The stage of `prices`."""
        self.schedule.expect("prices", "whole plan", len(self.groups) + 1)

    def prices(self, thetas: Sequence[Theta]) -> list[float]:
        """Of each group in a plan, what the cost rises by for each byte fewer; NaN if it cannot have fewer.

        Measured on whole plans, before fine-tuning, with a fifth of the group's bytes taken away.
        """
        plans, taken = [tuple(thetas)], []
        for i, (size, theta) in enumerate(zip(self.sizes, thetas, strict=True)):
            [thinner] = fitted([size], [theta], FEWER * size.bytes(theta))
            plans.append((*thetas[:i], thinner, *thetas[i + 1 :]))
            taken.append(size.bytes(theta) - size.bytes(thinner))

        def evaluate(trial: optuna.Trial) -> float:
            plan = plans[suggest(trial, "plan", IntDistribution(0, len(plans)))]
            return self.evaluator.at(self.groups, plan)

        trials = self.run_stage("prices", [{"plan": n} for n in range(len(plans))], evaluate)
        cost, *thinned = [value_of(trial) for trial in trials]
        return [(c - cost) / n if n >= 1 else math.nan for c, n in zip(thinned, taken, strict=True)]

    def file_bytes(self, thetas: Sequence[Theta]) -> int:
        """The bytes of the file of the model, its full-precision weights quantized at these θ: a real encode."""
        model = self.evaluator.model
        try:
            with torch.no_grad():
                for group, theta in zip(self.groups, thetas, strict=True):
                    quantize_group(group, theta, self.evaluator.weights, self.evaluator.tensors())
            return file_bytes(model, plan_of(self.groups, thetas), self._encoded, self.finish)
        finally:
            self.evaluator.restore()

    def predicted_bytes(self, thetas: Sequence[Theta]) -> float:
        """What the groups take, by the size model; the file has the rest of the model besides."""
        return sum(size.bytes(theta) for size, theta in zip(self.sizes, thetas, strict=True))

    def rest(self, thetas: Sequence[Theta]) -> float:
        """The file's bytes beyond the size model's, found by one real encode."""
        return self.file_bytes(thetas) - self.predicted_bytes(thetas)

    def check_reachable(self, target: int) -> None:
        """Raise `SearchError` at once if no plan can be as small as the target; note it if none is as large."""
        least, low = smallest_file(self.sizes, self.file_bytes)
        if low > target:
            bare = low - self.predicted_bytes(least)
            raise SearchError(
                f"the target of {target:,} bytes cannot be met: the smallest file the search can reach has {low:,} "
                f"bytes ({self.float32_bytes / low:.1f} times smaller than float32), {bare:,.0f} of them for what is "
                f"not compressed and the header. Ask for at least that, or compress more tensors, such as biases with "
                f"include=['*.bias']"
            )
        high = self.file_bytes(largest(self.sizes))
        if high < target:
            self.note(
                f"the target allows {target:,} bytes, but at p = 0 and {self.settings.bits[1]} bits the file has only "
                f"{high:,}: that is the nearest"
            )

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.watcher.note(text)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            kind = stage.partition(" ")[0]
            self.seconds[kind] = round(self.seconds.get(kind, 0.0) + time.monotonic() - started, 3)


def fingerprint(
    evaluator: Evaluator, groups: Sequence[Group], target: Mapping[str, Any], settings: Settings
) -> dict[str, str]:
    """What the evaluations of a search depend on, in a few words each; processes that share a study must agree."""
    weights = hashlib.sha256()
    for name, tensor in evaluator.weights.items():
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        weights.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return {
        "model": weights.hexdigest()[:16],
        "tensors": hashlib.sha256(json.dumps([g.tensors for g in groups]).encode()).hexdigest()[:16],
        "target": json.dumps(dict(target)),
        "settings": f"{settings.method}, evaluations {settings.evaluations}, refinements {settings.refinements}, "
        f"p up to {settings.highest_pruning_rate}, bits {settings.bits}, seed {settings.seed}",
    }


def group_records(
    context: Context, thetas: Sequence[Theta], file_size: int, costs: Sequence[float] | None
) -> tuple[GroupRecord, ...]:
    """The groups as they are in a plan, and which are out of proportion there.

    Args:
        costs: what each adds alone, if the method tells.
    """
    bytes_of = [size.bytes(theta) for size, theta in zip(context.sizes, thetas, strict=True)]
    said = remarks(bytes_of, context.prices(thetas))
    records = []
    for i, (group, theta) in enumerate(zip(context.groups, thetas, strict=True)):
        cost, share = (None, None) if costs is None else (costs[i], costs[i] / max(sum(costs), 1e-12))
        size = bytes_of[i]
        records.append(
            GroupRecord(
                group.name, group.size, theta.pruning_rate, theta.bits, size, size / file_size, cost, share, said[i]
            )
        )
    return tuple(records)


def value_of(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def gp_sampler(seed: int, startup: int) -> Any:
    """Optuna's Gaussian process with expected improvement, for `Worker.run`."""

    def make(offset: int) -> optuna.samplers.BaseSampler:
        return optuna.samplers.GPSampler(
            seed=seed + 7919 * offset, n_startup_trials=startup, deterministic_objective=True
        )

    return make
