"""The optimizer and the learning-rate schedule of a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from clipq.recipe import Recipe


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters for an optimizer: weight decay on matrices and kernels only, not on biases and norms."""
    trained = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def make_optimizer(network: nn.Module, recipe: Recipe, learning_rate: float) -> torch.optim.Optimizer:
    """The recipe's optimizer of a network; see `parameter_groups`."""
    groups = parameter_groups(network, recipe.weight_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=learning_rate)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int, steps_per_epoch: int) -> LambdaLR:
    """The recipe's schedule, stepped once an optimizer step, over a phase of so many steps."""
    return LambdaLR(optimizer, learning_rate_factor(recipe, steps, steps_per_epoch))


def learning_rate_factor(recipe: Recipe, steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The factor on the highest learning rate at each step, 0 to ``steps``."""
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(steps - warmup, 1)
        if recipe.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        if recipe.schedule == "step":
            return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
        return 1.0

    return factor
