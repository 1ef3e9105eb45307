"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from clipq.data import Batch, Batches, Data
from clipq.data.sources import Part
from clipq.errors import Interrupted, TrainingError, WeightError
from clipq.finetune.checkpoint import Checkpoints, seed_random_states
from clipq.finetune.interrupt import stop_request
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
        loss: of this process, summed over the epoch's steps; ``counted`` are those whose loss was a number.
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

    def share_of(part: Part, epoch: int, start: int = 0) -> Batches:
        return data.batches(
            part,
            batch_size,
            recipe.seed,
            epoch,
            start=start,
            channels_last=recipe.channels_last,
            rank=processes.rank,
            world_size=processes.count,
        )

    per_epoch = share_of("train", 0).total
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
    at = Position()
    if state is not None:
        positions = state["positions"]
        at = Position(**positions[processes.rank % len(positions)])
    phase = "float" if plan is None else "compress"
    watcher.phase(phase, training.steps, at.step)
    saver = _Saver(training, recipe, checkpoints, phase, at)
    try:
        with stop_request() as stop:
            while at.step < steps or at.batch:
                batches = share_of("train", at.epoch, at.batch)
                training.trained.train()
                while at.batch < per_epoch and at.step < steps:
                    loss = training.gradients(next(batches))
                    broken, stopping, due = processes.agree(not math.isfinite(loss), stop.signal, saver.due())
                    if broken and (scaler_of(fabric) is None or at.skipped >= MOST_SKIPPED):
                        raise _no_number(at, loss, processes, data, batch_size, recipe.seed, checkpoints)
                    try:
                        made = training.update(at.step + 1)
                    except WeightError as error:
                        raise TrainingError(f"at step {at.step + 1}: {error}; {kept_in(checkpoints)}") from error
                    at.step, at.batch, at.skipped = at.step + 1, at.batch + 1, 0 if made else at.skipped + 1
                    if math.isfinite(loss):
                        at.loss, at.counted = at.loss + loss, at.counted + 1
                    watcher.step(loss)
                    if at.step == steps and plan is not None and recipe.batch_norm_batches:
                        training.reestimate(stop.checked(share_of("train", epochs)), recipe.batch_norm_batches)
                    if due or stopping or at.batch == per_epoch or at.step == steps:
                        saver.save()
                    if stopping:
                        raise Interrupted(f"stopped after step {at.step}; {kept_in(checkpoints)}", stopping)
                validation = stop.checked(share_of("validation", 0))  # a checkpoint is there: it may be left at once
                watcher.epoch(_record_of(training, at, phase, validation, end_of_epoch))
                at.epoch, at.batch, at.loss, at.counted = at.epoch + 1, 0, 0.0, 0
            stop.check()
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
            "positions": self._training.processes.gather(asdict(self._at)),
            **self._training.state(),
        }
        checkpoints, step = self._checkpoints, self._at.step
        self._training.processes.by_first(lambda: checkpoints.save(self._phase, step, state))
        checkpoints.last = self._training.processes.by_first(lambda: checkpoints.last)
        self._last = time.monotonic()


def kept_in(checkpoints: Checkpoints | None) -> str:
    """Which state can be gone on from."""
    last = None if checkpoints is None else checkpoints.last
    return f"the last good state is in {last}" if last else "no checkpoint was written"


def _record_of(
    training: Training, at: Position, phase: str, batches: Iterable[Batch], end_of_epoch: EndOfEpoch | None
) -> EpochRecord:
    """Evaluate the network as it would ship, on every process's validation batches together."""
    network, processes = training.publish(), training.processes
    validation = Score.together(processes.gather(score(network, batches, training.fabric.device)))
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


def _no_number(
    at: Position,
    loss: float,
    processes: Processes,
    data: Data,
    batch_size: int,
    seed: int,
    checkpoints: Checkpoints | None,
) -> TrainingError:
    what = f"the loss is {loss}" if not math.isfinite(loss) else "the loss of another process is no number"
    where = "" if processes.count == 1 else f", rank={processes.rank}, world_size={processes.count}"
    return TrainingError(
        f"{what} at step {at.step + 1}, minibatch {at.batch} of epoch {at.epoch + 1}: "
        f"batches('train', {batch_size}, {seed}, {at.epoch}, start={at.batch}{where}) of data {data.name!r} begins "
        f"with it; {kept_in(checkpoints)}. Try a lower learning rate, or a warm-up"
    )
