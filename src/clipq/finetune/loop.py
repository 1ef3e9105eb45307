"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from lightning_fabric import Fabric
from torch import nn

from clipq.data import Data
from clipq.errors import Interrupted, TrainingError, WeightError
from clipq.finetune.checkpoint import Checkpoints, seed_random_states
from clipq.finetune.interrupt import StopRequest, stop_request
from clipq.finetune.losses import Distillation, cross_entropy
from clipq.finetune.processes import Processes
from clipq.finetune.score import Score, score
from clipq.finetune.step import scaler_of
from clipq.finetune.training import Training
from clipq.finetune.watch import EpochRecord, Watcher
from clipq.plan import Plan
from clipq.recipe import Recipe

EndOfEpoch = Callable[[nn.Module, Plan | None], int | None]
"""Is given the network as it would ship and the plan in force; returns the bytes of the compressed file if it wrote
one. Called in the first process alone."""
MOST_SKIPPED = 50
"""So many steps without numbers in a row, and a loss scaler does not help."""


@dataclass
class Position:
    """Where a training is.

    Attributes:
        epoch: whole epochs behind, their evaluation included.
        batch: minibatches of the epoch behind.
        step: optimizer steps behind.
        loss: summed over the epoch's steps; ``counted`` are those whose loss was a number.
        skipped: steps skipped in a row by the loss scaler.
        seconds: in training.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss: float = 0.0
    counted: int = 0
    skipped: int = 0
    seconds: float = 0.0


def fit(
    fabric: Fabric,
    network: nn.Module,
    data: Data,
    recipe: Recipe,
    plan: Plan | None,
    *,
    epochs: int,
    learning_rate: float,
    watcher: Watcher,
    end_of_epoch: EndOfEpoch | None = None,
    checkpoints: Checkpoints | None = None,
    state: Mapping[str, Any] | None = None,
    hold_bytes: int | None = None,
) -> Plan | None:
    """Train a network in place, pruning and quantizing in parallel if there is a plan.

    Args:
        plan: what to compress; the network then ends quantized. None trains plainly.
        checkpoints: are kept there at the end of every epoch, and as often as the recipe says.
        state: of a checkpoint of this training, to go on from there: on a CPU, with as many processes, what comes out
            is what would have come without a break, bit for bit.
        hold_bytes: the most bytes of the compressed file: the plan's pruning rates are corrected on the way so that
            the file of the trained network meets them; see `SizeHolder`.

    Returns:
        The plan that the network ends with.

    Raises:
        TrainingError: the loss, or a weight, stopped being a number; says at which step.
        Interrupted: a signal asked to stop; the checkpoint is written.
    """
    processes = Processes.of(fabric)
    batch_size = processes.share_of(recipe.batch_size)
    keywords: dict[str, Any] = {"channels_last": recipe.channels_last, "rank": processes.rank}
    keywords["world_size"] = processes.count
    per_epoch = data.batches("train", batch_size, recipe.seed, **keywords).total
    steps = min(epochs * per_epoch, recipe.limit_steps or math.inf)
    if state is None:  # whatever came before, such as a search or an interruption, does not count
        seed_random_states(recipe.seed + processes.rank)
    objective = cross_entropy(recipe.label_smoothing)
    if plan is not None and recipe.distillation:
        settings = recipe.distillation, recipe.distillation_temperature, recipe.label_smoothing
        objective = Distillation(network, *settings, autocast=fabric.autocast)
    training = Training(
        fabric,
        network,
        recipe,
        plan,
        steps=int(steps),
        steps_per_epoch=per_epoch,
        learning_rate=learning_rate,
        objective=objective,
        hold_bytes=hold_bytes,
        state=state,
    )
    at = Position() if state is None else Position(**state["position"])
    phase = "float" if plan is None else "compress"
    watcher.phase(phase, training.steps, at.step)
    saver = _Saver(training, recipe, checkpoints, phase, at)
    try:
        with stop_request() as stop:
            while at.step < steps or at.batch:
                batches = data.batches("train", batch_size, recipe.seed, at.epoch, start=at.batch, **keywords)
                training.trained.train()
                while at.batch < per_epoch and at.step < steps:
                    loss = training.gradients(next(batches))
                    broken, stopping, due = processes.agree(not math.isfinite(loss), stop.signal, saver.due())
                    if broken and (scaler_of(fabric) is None or at.skipped >= MOST_SKIPPED):
                        _stop_at(at, loss, data, batch_size, recipe, keywords, checkpoints)
                    try:
                        made = training.update(at.step + 1)
                    except WeightError as error:
                        raise TrainingError(f"at step {at.step + 1}: {error}; {kept_in(checkpoints)}") from error
                    at.step, at.batch, at.skipped = at.step + 1, at.batch + 1, 0 if made else at.skipped + 1
                    if math.isfinite(loss):
                        at.loss, at.counted = at.loss + loss, at.counted + 1
                    watcher.step(loss)
                    if at.step == steps and plan is not None and recipe.batch_norm_batches:
                        again = data.batches("train", batch_size, recipe.seed, epochs, **keywords)
                        training.reestimate(stop.checked(again), recipe.batch_norm_batches)
                    if due or stopping or at.batch == per_epoch or at.step == steps:
                        saver.save()
                    if stopping:
                        raise Interrupted(f"stopped after step {at.step}; {kept_in(checkpoints)}", stopping)
                record = _end_of_epoch(training, data, recipe, batch_size, keywords, at, phase, stop, end_of_epoch)
                watcher.epoch(record)
                at.epoch, at.batch, at.loss, at.counted = at.epoch + 1, 0, 0.0, 0
        training.publish()
        return training.plan
    finally:
        training.end()


class _Saver:
    """When a checkpoint is due, and the writing of it."""

    def __init__(
        self, training: Training, recipe: Recipe, checkpoints: Checkpoints | None, phase: str, at: Position
    ) -> None:
        self._training = training
        self._recipe = recipe
        self._checkpoints = checkpoints
        self._phase = phase
        self._at = at
        self._last = self._now = time.monotonic()

    def due(self) -> bool:
        """Whether the recipe wants one after the step that is under way."""
        self._at.seconds, self._now = self._at.seconds + time.monotonic() - self._now, time.monotonic()
        every = self._recipe.checkpoint_steps
        return (every is not None and (self._at.step + 1) % every == 0) or (
            self._now - self._last > 60 * self._recipe.checkpoint_minutes
        )

    def save(self) -> None:
        if self._checkpoints is None:
            return
        state = {
            "recipe": self._recipe.model_dump(mode="json"),
            "position": asdict(self._at),
            "processes": self._training.processes.count,
            **self._training.state(),
        }
        self._training.processes.by_first(lambda: self._written(state))
        self._last = time.monotonic()

    def _written(self, state: Mapping[str, Any]) -> bool:
        assert self._checkpoints is not None
        return self._checkpoints.save(self._phase, self._at.step, state)


def kept_in(checkpoints: Checkpoints | None) -> str:
    """Which state can be gone on from."""
    last = None if checkpoints is None else checkpoints.last
    return f"the last good state is in {last}" if last else "no checkpoint was written"


def _end_of_epoch(
    training: Training,
    data: Data,
    recipe: Recipe,
    batch_size: int,
    keywords: Mapping[str, Any],
    at: Position,
    phase: str,
    stop: StopRequest,
    end_of_epoch: EndOfEpoch | None,
) -> EpochRecord:
    """Evaluate the network as it would ship. What it needs is in a checkpoint, so a signal ends it at once."""
    network, processes = training.publish(), training.processes
    batches = data.batches("validation", batch_size, recipe.seed, **keywords)
    part = score(network, stop.checked(batches), training.fabric.device)
    validation = Score.together(processes.gather(part))
    loss = sum(processes.gather(at.loss / max(at.counted, 1))) / processes.count
    plan = training.plan
    size = processes.by_first(lambda: end_of_epoch(network, plan) if end_of_epoch is not None else None)
    return EpochRecord(
        phase=phase,
        epoch=at.epoch + 1,
        step=at.step,
        train_loss=loss,
        validation_loss=validation.loss,
        validation_accuracy=validation.accuracy,
        learning_rate=float(training.schedule.get_last_lr()[0]),
        bytes=size,
        seconds=round(at.seconds, 3),
    )


def _stop_at(
    at: Position,
    loss: float,
    data: Data,
    batch_size: int,
    recipe: Recipe,
    keywords: Mapping[str, Any],
    checkpoints: Checkpoints | None,
) -> NoReturn:
    what = f"the loss is {loss}" if not math.isfinite(loss) else "the loss of another process is no number"
    where = "" if keywords["world_size"] == 1 else f", rank={keywords['rank']}, world_size={keywords['world_size']}"
    raise TrainingError(
        f"{what} at step {at.step + 1}, minibatch {at.batch} of epoch {at.epoch + 1}: "
        f"batches('train', {batch_size}, {recipe.seed}, {at.epoch}, start={at.batch}{where}) of data {data.name!r} "
        f"begins with it; {kept_in(checkpoints)}. Try a lower learning rate, or a warm-up"
    )
