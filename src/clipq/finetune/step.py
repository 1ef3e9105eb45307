"""One optimizer step: the gradients of a minibatch, and the update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from clipq.errors import TrainingError, WeightError
from clipq.finetune.losses import Objective, cross_entropy


def gradients(
    fabric: Fabric,
    network: Any,
    optimizer: Any,
    batch: tuple[Tensor, Tensor],
    objective: Objective,
    passes: int = 1,
) -> float:
    """Compute the gradients of a minibatch's mean loss, and no more.

    Args:
        network, optimizer: as Fabric set them up.
        passes: the minibatch is taken in so many parts, each forward and backward by itself: the gradients are the same
            but for rounding, and where layers such as batch norms look at other samples; less memory is used.

    Returns:
        The loss, which may be no number; the gradients are no numbers then.
    """
    optimizer.zero_grad()
    inputs, targets = batch
    parts = list(zip(inputs.tensor_split(passes), targets.tensor_split(passes), strict=True))[: len(inputs)]
    total = 0.0
    for number, part in enumerate(parts, start=1):
        with fabric.no_backward_sync(network, enabled=number < len(parts)):
            loss = objective(network, *fabric.to_device(part))
            if len(parts) > 1:
                loss = loss * (len(part[0]) / len(inputs))
            fabric.backward(loss)
        total += loss.item()
    return total


def update(fabric: Fabric, network: Any, optimizer: Any, clip_norm: float | None = None) -> bool:
    """Step the optimizer on the gradients that are there.

    Args:
        network, optimizer: as Fabric set them up.
        clip_norm: gradients of a larger norm, all parameters together, are scaled down to it.

    Returns:
        Whether a step was made. A loss scaler, which precision fp16 has, skips those whose gradients are no numbers.
    """
    if clip_norm is not None:
        fabric.clip_gradients(network, optimizer, max_norm=clip_norm, error_if_nonfinite=False)
    scaler = scaler_of(fabric)
    before = 0.0 if scaler is None else scaler.get_scale()
    optimizer.step()
    return scaler is None or scaler.get_scale() >= before


def scaler_of(fabric: Fabric) -> torch.amp.GradScaler | None:
    """The loss scaler, if the precision has one."""
    scaler: torch.amp.GradScaler | None = getattr(fabric.strategy.precision, "scaler", None)
    return scaler


def train_steps(
    fabric: Fabric,
    network: Any,
    optimizer: Any,
    schedule: LRScheduler,
    batches: Iterable[tuple[Tensor, Tensor]],
    where: str,
) -> Iterator[float]:
    """One optimizer step a minibatch on the labels' cross-entropy; yields the loss of each.

    Args:
        network, optimizer: as Fabric set them up.
        where: what to call the place of a step, counted in these batches, in an error.

    Raises:
        TrainingError: the loss, or a weight, stopped being a number; says at which step.
    """
    objective = cross_entropy()
    for step, batch in enumerate(batches, start=1):
        loss = gradients(fabric, network, optimizer, batch, objective)
        if not math.isfinite(loss) and scaler_of(fabric) is None:
            raise TrainingError(f"the loss is {loss} at step {step} of {where}")
        try:
            update(fabric, network, optimizer)
        except WeightError as error:
            raise TrainingError(f"at step {step} of {where}: {error}") from error
        schedule.step()
        yield loss
