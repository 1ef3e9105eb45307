"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import nn

from clipq.attach import attach
from clipq.data import Data
from clipq.errors import TrainingError, WeightError
from clipq.finetune.optimization import make_optimizer, make_schedule
from clipq.finetune.score import score
from clipq.finetune.watch import EpochRecord, Watcher
from clipq.plan import Plan
from clipq.recipe import Recipe

EndOfEpoch = Callable[[dict[str, Any]], int | None]
"""Is given the whole state of the training; keeps it, and returns the bytes of the compressed file if it wrote one."""


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
) -> None:
    """Train a network in place, pruning and quantizing in parallel if there is a plan.

    Args:
        plan: what to compress; the network then ends quantized. None trains plainly.
        end_of_epoch: called after each epoch with all that a resume needs.

    Raises:
        TrainingError: the loss, or a weight, stopped being a number; says at which step.
    """
    optimizer = make_optimizer(network, recipe, learning_rate)
    wrapped_network, wrapped_optimizer = fabric.setup(network, optimizer)
    attachment = None if plan is None else attach(network, optimizer, plan)
    steps_per_epoch = math.ceil(len(data.train) / recipe.batch_size)
    schedule = make_schedule(optimizer, recipe, epochs * steps_per_epoch, steps_per_epoch)
    phase = "float" if plan is None else "compress"
    watcher.phase(phase, epochs * steps_per_epoch)
    started = time.monotonic()
    step = 0
    try:
        for epoch in range(epochs):
            network.train()
            total = 0.0
            for inputs, targets in _batches(data, "train", recipe, epoch):
                inputs, targets = fabric.to_device((inputs, targets))
                wrapped_optimizer.zero_grad()
                loss = F.cross_entropy(wrapped_network(inputs), targets)
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainingError(f"the loss is {value} at step {step + 1} (epoch {epoch + 1})")
                fabric.backward(loss)
                try:
                    wrapped_optimizer.step()
                except WeightError as error:
                    raise TrainingError(f"at step {step + 1} (epoch {epoch + 1}): {error}") from error
                schedule.step()
                step += 1
                total += value
                watcher.step(value)
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
                }
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
    finally:
        if attachment is not None:
            attachment.detach()


def _batches(data: Data, part: Any, recipe: Recipe, epoch: int = 0) -> Any:
    return data.batches(part, recipe.batch_size, recipe.seed, epoch, channels_last=recipe.channels_last)
