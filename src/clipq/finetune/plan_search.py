"""One search by itself, from recipe to plan, in a run folder that any number of processes share."""

from __future__ import annotations

from pathlib import Path

import lightning_fabric
from torch import nn

from clipq.data import Data
from clipq.errors import RecipeError
from clipq.finetune.compress import prepare
from clipq.finetune.loop import fit
from clipq.finetune.network import load_weights
from clipq.finetune.run import RunFolder
from clipq.finetune.search import search_recipe, target_of
from clipq.finetune.watch import Watcher
from clipq.recipe import Recipe
from clipq.search import SearchRecord
from clipq.search.settings import Watcher as SearchWatcher


def search_plan(
    recipe: Recipe,
    out: Path,
    watcher: Watcher,
    searching: SearchWatcher,
    *,
    storage: str | None = None,
    force: bool = False,
) -> SearchRecord:
    """Search the plan of a recipe and leave it, and all that was found on the way, in a run folder.

    In a folder that holds the same search it goes on where that stopped; several processes share its evaluations.

    Args:
        watcher: is told of the training of the float network, if there is any.
        storage: a journal file or database URL; else the run folder's ``search.journal``.
        force: replace an earlier run in the folder.

    Raises:
        ClipqError: the recipe, its model, weights or data cannot be used; the target cannot be met; the folder or the
            storage holds something else.
    """
    target = target_of(recipe)
    if target is None:
        raise RecipeError(
            "the recipe gives a plan, or p and b, and no target: there is nothing to search for. Give one of --ratio, "
            "--bytes, --max-drop and --trade-off"
        )
    fabric, network, data = prepare(recipe)
    run = RunFolder.create(out, recipe, force=force, go_on=True)
    if recipe.weights is None:
        train_float_once(fabric, network, data, recipe, run, watcher)
    found = search_recipe(fabric, network, data, recipe, target, storage or str(run.study), searching)
    run.save_search(found)
    run.save_plan(found.plan)
    return found


def train_float_once(
    fabric: lightning_fabric.Fabric, network: nn.Module, data: Data, recipe: Recipe, run: RunFolder, watcher: Watcher
) -> None:
    """Train the float network, or take the one that the run folder holds; all processes end with the same."""
    if not run.weights.exists():
        fit(
            fabric,
            network,
            data,
            recipe,
            None,
            epochs=recipe.float_epochs,
            learning_rate=recipe.float_learning_rate or recipe.learning_rate,
            watcher=watcher,
        )
        run.save_weights(network.state_dict())
    load_weights(network, run.weights)
