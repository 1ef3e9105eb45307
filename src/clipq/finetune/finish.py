"""What a recipe does to a trained network before its file is written."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from clipq.files import round_rest
from clipq.hold import Finish
from clipq.norms import folded_norms
from clipq.plan import Plan
from clipq.recipe import Recipe


def finish_of(network: nn.Module, recipe: Recipe) -> Finish | None:
    """Batch norms folded, the rest rounded, as far as the recipe asks for it; None if it does not."""
    if not recipe.fold_norms and not recipe.bfloat16_rest:
        return None

    def finish(state: Mapping[str, Tensor], plan: Plan) -> Mapping[str, Tensor]:
        if recipe.fold_norms:
            state = {**state, **folded_norms(network, state, plan)}
        return round_rest(state, plan) if recipe.bfloat16_rest else state

    return finish
