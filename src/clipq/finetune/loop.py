"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from clipq.attach import attach
from clipq.data import Data
from clipq.errors import TrainingError, WeightError
from clipq.finetune.optimization import make_optimizer, make_schedule
from clipq.finetune.score import score
from clipq.finetune.watch import EpochRecord, Watcher
from clipq.hold import SizeHolder
from clipq.plan import Plan
from clipq.recipe import Recipe

EndOfEpoch = Callable[[dict[str, Any], Plan | None], int | None]
"""Is given the whole state of the training and the plan in force; keeps them, and returns the bytes of the compressed
file if it wrote one."""
ADJUSTMENTS = 20
"""How often the size of the file is corrected while training holds it."""
SETTLED = 0.9
"""From this share of the steps on, the plan stays as it is until the last step."""


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
    end_of_epoch: EndOfEpoch,
    hold_bytes: int | None = None,
) -> Plan | None:
    """Train a network in place, pruning and quantizing in parallel if there is a plan.

    Args:
        plan: what to compress; the network then ends quantized. None trains plainly.
        end_of_epoch: called after each epoch with all that a resume needs.
        hold_bytes: the most bytes of the compressed file: the plan's pruning rates are corrected on the way so that
            the file of the trained network meets them; see `SizeHolder`.

    Returns:
        The plan that the network ends with.

    Raises:
        TrainingError: the loss, or a weight, stopped being a number; says at which step.
    """
    optimizer = make_optimizer(network, recipe, learning_rate)
    wrapped_network, wrapped_optimizer = fabric.setup(network, optimizer)
    attachment = None if plan is None else attach(network, optimizer, plan)
    steps_per_epoch = math.ceil(len(data.train) / recipe.batch_size)
    schedule = make_schedule(optimizer, recipe, epochs * steps_per_epoch, steps_per_epoch)
    holder = None if attachment is None or hold_bytes is None else SizeHolder(network, attachment, hold_bytes)
    phase = "float" if plan is None else "compress"
    watcher.phase(phase, epochs * steps_per_epoch)
    settled = math.ceil(SETTLED * epochs * steps_per_epoch)
    every = max(settled // ADJUSTMENTS, 1)
    started = time.monotonic()
    step = 0
    try:
        for epoch in range(epochs):
            network.train()
            total = 0.0
            batches = _batches(data, "train", recipe, epoch)
            for value in train_steps(
                fabric, wrapped_network, wrapped_optimizer, schedule, batches, f"epoch {epoch + 1}"
            ):
                step += 1
                total += value
                watcher.step(value)
                if holder is not None and step < settled and step % every == 0:
                    holder.adjust()
                elif holder is not None and step in (settled, epochs * steps_per_epoch):
                    holder.finish()
            validation = score(network, _batches(data, "validation", recipe), fabric.device)
            size = end_of_epoch(
                {
                    "phase": phase,
                    "epoch": epoch + 1,
                    "step": step,
                    "model": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "random_state": torch.get_rng_state(),
                },
                None if attachment is None else attachment.plan,
            )
            watcher.epoch(
                EpochRecord(
                    phase=phase,
                    epoch=epoch + 1,
                    step=step,
                    train_loss=total / steps_per_epoch,
                    validation_loss=validation.loss,
                    validation_accuracy=validation.accuracy,
                    learning_rate=float(schedule.get_last_lr()[0]),
                    bytes=size,
                    seconds=round(time.monotonic() - started, 3),
                )
            )
        return None if attachment is None else attachment.plan
    finally:
        if attachment is not None:
            attachment.detach()


def train_steps(
    fabric: Fabric,
    network: Any,
    optimizer: Any,
    schedule: LRScheduler,
    batches: Iterable[tuple[Tensor, Tensor]],
    where: str,
) -> Iterator[float]:
    """One optimizer step a minibatch; yields the loss of each.

    Args:
        network, optimizer: as `Fabric.setup` gave them.
        where: what to call the place of a step, counted in these batches, in an error.

    Raises:
        TrainingError: the loss, or a weight, stopped being a number; says at which step.
    """
    for step, pair in enumerate(batches, start=1):
        inputs, targets = fabric.to_device(pair)
        optimizer.zero_grad()
        loss = F.cross_entropy(network(inputs), targets)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value} at step {step} of {where}")
        fabric.backward(loss)
        try:
            optimizer.step()
        except WeightError as error:
            raise TrainingError(f"at step {step} of {where}: {error}") from error
        schedule.step()
        yield value


def _batches(data: Data, part: Any, recipe: Recipe, epoch: int = 0) -> Any:
    return data.batches(part, recipe.batch_size, recipe.seed, epoch, channels_last=recipe.channels_last)
