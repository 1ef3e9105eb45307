"""The network of a recipe, with its trained weights."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from clipq.data.named import DATA_ROOT_VARIABLE
from clipq.errors import RecipeError
from clipq.formats import read_state
from clipq.models import build
from clipq.recipe import Recipe
from clipq.userfunction import load_function


def make_network(recipe: Recipe) -> nn.Module:
    """The recipe's network, newly initialised from the recipe's seed.

    Raises:
        RecipeError: the model cannot be found, its function raises, or what it returns is no module.
    """
    torch.manual_seed(recipe.seed)
    if ":" not in recipe.model:
        return build(recipe.model)
    function = load_function(recipe.model, "model", RecipeError)
    try:
        network = function()
    except Exception as cause:
        raise RecipeError(f"model {recipe.model!r}: the function raised {type(cause).__name__}: {cause}") from cause
    if not isinstance(network, nn.Module):
        raise RecipeError(
            f"model {recipe.model!r}: the function returned a {type(network).__name__}; it must return a "
            f"torch.nn.Module and is called without arguments"
        )
    return network


def find_weights(recipe: Recipe) -> Path:
    """The recipe's file of weights: relative to the current folder, or else to the data root.

    Raises:
        RecipeError: there is no such file.
    """
    assert recipe.weights is not None
    places = [Path(recipe.weights)]
    root = recipe.data_root or os.environ.get(DATA_ROOT_VARIABLE)
    if root:
        places.append(Path(root) / recipe.weights)
    for place in places:
        if place.is_file():
            return place
    raise RecipeError(
        f"weights: there is no file {' or '.join(str(p) for p in places)}. Give --weights, or give --data-root with "
        f"the folder it lies in, or train the network first with --weights none --float-epochs N"
    )


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill a network from a .safetensors, .clipq or .pt file; every tensor must fit.

    Batch-norm step counters, which many files leave out and no result depends on, may be missing.

    Raises:
        RecipeError: names or shapes differ, with every difference listed.
        ArchiveError: the file cannot be read.
    """
    state = read_state(path)
    own = network.state_dict()
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    differences = [
        *(f"{name}: in the network, not in the file" for name in own if name not in state and name not in optional),
        *(f"{name}: in the file, not in the network" for name in state if name not in own),
        *(
            f"{name}: shape {tuple(own[name].shape)} in the network, {tuple(tensor.shape)} in the file"
            for name, tensor in state.items()
            if name in own and own[name].shape != tensor.shape
        ),
    ]
    if differences:
        raise RecipeError(f"the weights in {path} do not fit {type(network).__name__}:\n  " + "\n  ".join(differences))
    network.load_state_dict({**own, **state})
