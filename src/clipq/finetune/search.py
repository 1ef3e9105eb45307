"""The search for the plan of a recipe: its evaluations, and the few steps of fine-tuning that candidates get."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from clipq.attach import attach
from clipq.data import Data
from clipq.errors import DataError
from clipq.finetune.finish import finish_of
from clipq.finetune.optimization import make_optimizer, make_schedule
from clipq.finetune.score import score
from clipq.finetune.step import train_steps
from clipq.hold import SizeHolder
from clipq.plan import Plan
from clipq.recipe import Recipe
from clipq.search import SearchRecord, Settings, Target, run_search
from clipq.search.evaluator import Evaluate, Recover
from clipq.search.settings import Watcher
from clipq.search.target import parse_bytes

_ADJUSTMENTS = 3  # of the size, while a candidate is fine-tuned
_EVALUATIONS_DEPEND_ON = (
    *("data", "validation_fraction", "search_samples", "search_steps", "batch_size", "optimizer", "learning_rate"),
    *("momentum", "weight_decay", "schedule", "warmup_epochs", "precision", "fold_norms", "bfloat16_rest"),
)
DEFAULT_MAX_DROP = 0.5
"""Points of top-1 accuracy: what is asked of a search where the recipe asks for nothing."""


def target_of(recipe: Recipe) -> Target | None:
    """What the recipe's plan is searched for; None if it gives a plan, or p and b.

    Raises:
        SearchError: the target is out of range.
    """
    given: Any = recipe.targets()
    if given:
        return Target(**given)
    by_hand = (recipe.plan, recipe.pruning_rate, recipe.bits)
    return Target(max_drop=DEFAULT_MAX_DROP) if all(v is None for v in by_hand) and not recipe.overrides else None


def search_recipe(
    fabric: Fabric,
    network: nn.Module,
    data: Data,
    recipe: Recipe,
    target: Target,
    storage: str | None,
    watcher: Watcher,
) -> SearchRecord:
    """Search the plan of a recipe's network.

    The cost is the cross-entropy on a fixed part of the training set (for the paper's layerwise search the top-1 error
    there, in points); ``max_drop`` is in points of top-1 error on the validation set.
    """
    batches = search_batches(data, recipe, fabric.device)
    layerwise = recipe.search_method == "layerwise"
    return run_search(
        network,
        top_1_error(batches) if layerwise else cross_entropy(batches),
        target,
        settings=Settings(
            method=recipe.search_method,
            evaluations=recipe.search_evaluations,
            refinements=recipe.search_refinements,
            seed=recipe.seed,
            memory=parse_bytes(recipe.search_memory),
        ),
        validate=validation_error(data, recipe, fabric.device),
        recover=None if layerwise or not recipe.search_steps else short_fine_tuning(fabric, data, recipe),
        finish=finish_of(network, recipe),
        include=recipe.include,
        exclude=recipe.exclude,
        storage=storage,
        depends=recipe.model_dump(mode="json", include=set(_EVALUATIONS_DEPEND_ON)),
        watcher=watcher,
    )


def search_batches(data: Data, recipe: Recipe, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The fixed samples of the training set that every evaluation uses, not augmented.

    Raises:
        DataError: all of them are of one class.
    """
    batches = []
    left = recipe.search_samples
    pairs = data.train.batches(
        min(256, left), seed=recipe.seed, epoch=0, shuffle=True, channels_last=recipe.channels_last
    )
    for inputs, targets in pairs:
        batches.append((inputs[:left].to(device), targets[:left].to(device)))
        left -= len(batches[-1][1])
        if left <= 0:
            break
    classes = set(torch.cat([targets.flatten() for _, targets in batches]).tolist())
    if len(classes) < 2:
        labels = sum(targets.numel() for _, targets in batches)
        raise DataError(
            f"data {recipe.data!r}: all {labels} labels that the search evaluates on are of class {classes.pop()}; "
            f"give data of several classes, or more search_samples"
        )
    return batches


def cross_entropy(batches: list[tuple[Tensor, Tensor]]) -> Evaluate:
    """The mean cross-entropy (nats a sample), as the search's cost."""
    return _summed(batches, lambda outputs, targets: F.cross_entropy(outputs.float(), targets, reduction="sum"), 1.0)


def top_1_error(batches: list[tuple[Tensor, Tensor]]) -> Evaluate:
    """The top-1 error (per cent), as the search's cost: ε of the paper."""
    return _summed(batches, lambda outputs, targets: (outputs.argmax(1) != targets).sum(), 100.0)


def _summed(batches: list[tuple[Tensor, Tensor]], loss: Callable[[Tensor, Tensor], Tensor], unit: float) -> Evaluate:
    """What a non-negative loss comes to in the mean; on the way, what it comes to at least."""
    count = sum(targets.numel() for _, targets in batches)

    def evaluate(network: nn.Module) -> Iterator[float]:
        network.eval()
        total = 0.0
        for inputs, targets in batches:
            total += float(loss(network(inputs), targets))
            yield unit * total / count if math.isfinite(total) else unit * 1e6

    return evaluate


def validation_error(data: Data, recipe: Recipe, device: torch.device) -> Callable[[nn.Module], float]:
    """The top-1 error (per cent) on the validation set."""

    def evaluate(network: nn.Module) -> float:
        batches = data.batches("validation", 256, channels_last=recipe.channels_last)
        return score(network, batches, device).error

    return evaluate


def _first(data: Data, recipe: Recipe, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first minibatches of the training, over as many epochs as it takes."""
    left, epoch = steps, 0
    while left:
        batches = data.batches("train", recipe.batch_size, recipe.seed, epoch, channels_last=recipe.channels_last)
        for pair in itertools.islice(batches, left):
            left -= 1
            yield pair
        epoch += 1


def short_fine_tuning(fabric: Fabric, data: Data, recipe: Recipe) -> Recover:
    """A few steps of the recipe's own training, with the file held at its size."""

    def recover(network: nn.Module, plan: Plan, file_bytes: int, share: float) -> Plan:
        steps = math.ceil(share * recipe.search_steps)
        optimizer = make_optimizer(network, recipe, recipe.learning_rate)
        wrapped_network, wrapped_optimizer = fabric.setup(network, optimizer)
        attachment = attach(network, optimizer, plan)
        holder = SizeHolder(network, attachment, file_bytes, finish_of(network, recipe))
        schedule = make_schedule(optimizer, recipe, steps, steps)
        network.train()
        try:
            batches = _first(data, recipe, steps)
            where = "the fine-tuning of a candidate plan"
            losses = train_steps(fabric, wrapped_network, wrapped_optimizer, schedule, batches, where)
            for step, _ in enumerate(losses, start=1):
                if step % max(steps // _ADJUSTMENTS, 1) == 0 and step < steps:
                    holder.adjust()
            holder.finish()
            return attachment.plan
        finally:
            attachment.detach()

    return recover
