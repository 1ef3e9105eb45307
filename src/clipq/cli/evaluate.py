"""``clipq evaluate``: the accuracy of a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipq.cli.common import console, print_json
from clipq.recipe import Recipe


def evaluate(
    recipe: Annotated[Path, typer.Argument(help="The recipe that names the model and the data.", show_default=False)],
    weights: Annotated[Path | None, typer.Option(help="A .clipq, .safetensors or .pt; else the recipe's own.")] = None,
    data_root: Annotated[Path | None, typer.Option(help="Folder of the named data sets.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the score as JSON.")] = False,
) -> None:
    """Measure the accuracy of a recipe's network with the weights in a file.

    Example: `clipq evaluate runs/lenet-5/recipe.yaml --weights runs/lenet-5/model.clipq`

    On the test set, or on the validation set where the data has no test set.
    """
    from clipq.finetune.compress import evaluate as measure
    from clipq.finetune.compress import prepare

    given = {"weights": weights, "data_root": data_root}
    made = Recipe.load(recipe, {name: str(value) for name, value in given.items() if value is not None})
    if made.weights is None:
        raise typer.BadParameter("the recipe names no weights; give --weights FILE")
    fabric, network, data = prepare(made)
    result = measure(network, data, made, fabric.device)
    part = "validation" if data.test is None else "test"
    if json:
        values = {"part": part, "correct": result.correct, "count": result.count, "loss": result.loss}
        print_json(values | {"accuracy": result.accuracy})
    else:
        console.print(f"{result.accuracy:.2f} % top-1 on the {part} set ({result.correct} of {result.count})")
