"""The paper's CLIP-Q, and clipq with all that it has beyond the paper."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import clipq
from benchmarks.frontier.bench import Bench
from clipq.finetune.finish import finish_of
from clipq.finetune.loop import fit
from clipq.finetune.search import search_recipe
from clipq.finetune.watch import Silent
from clipq.search import Target
from clipq.search.settings import Silent as SilentSearch

RAMP = 0.6


def ours(bench: Bench, setting: str, folder: Path) -> Path:
    """Searched for so many bytes, pruned little by little, held at the bytes, with what else the net's ``extras`` say.

    Args:
        setting: bytes of the file.
    """
    changes = {"pruning_ramp": RAMP, **bench.net.extras}
    return compressed(bench, folder, Target(bytes=int(setting)), int(setting), **changes)


def paper(bench: Bench, setting: str, folder: Path) -> Path:
    """The layerwise search for λ, and p and b fixed from the first step; weights alone.

    Args:
        setting: λ, in points of error.
    """
    changes = {"search_method": "layerwise", "include": ()}
    return compressed(bench, folder, Target(trade_off=float(setting)), None, **changes)


def compressed(
    bench: Bench,
    folder: Path,
    target: Target,
    hold: int | None,
    *,
    training: AbstractContextManager[object] | None = None,
    **changes: Any,
) -> Path:
    """Searched, trained, written, and read back.

    Args:
        hold: the most bytes of the file while it is trained; None holds p and b instead.
        training: what to train in.
        changes: of the recipe.
    """
    recipe = bench.recipe.model_copy(update=changes)
    weights = {name: tensor.clone() for name, tensor in bench.network.state_dict().items()}
    record = search_recipe(bench.fabric, bench.network, bench.data, recipe, target, None, SilentSearch())
    bench.network.load_state_dict(weights)
    with training or nullcontext():
        plan = fit(
            bench.fabric,
            bench.network,
            bench.data,
            recipe,
            record.plan,
            epochs=recipe.epochs,
            learning_rate=recipe.learning_rate,
            watcher=Silent(),
            hold_bytes=hold,
        )
    assert plan is not None
    finish = finish_of(bench.network, recipe)
    if finish is not None:
        bench.network.load_state_dict(finish(bench.network.state_dict(), plan))
    path = folder / "model.clipq"
    clipq.save(bench.network, path, plan=plan)
    clipq.load(path, into=bench.network)
    return path
