"""``clipq search``: from a target to a plan."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from clipq.cli.common import console, errors, print_json
from clipq.cli.compress import recipe_of, with_recipe_options
from clipq.cli.progress import Progress

EXAMPLE = """Search a plan: every tensor's pruning rate and bit width, for a file of a wanted size or a wanted accuracy.

Example: `clipq search recipes/mnist/lenet-5.yaml --data-root data --ratio 200`

Give one of `--ratio`, `--bytes`, `--max-drop` and `--trade-off`. The run folder that is left holds the plan, which
`clipq compress --plan` takes, a page of plots (search.html), all that was found (search.json) and every evaluation
(search.journal). The same command again goes on where it was stopped; several processes that run it share the work.
"""


def search(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML).", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.", show_default="runs/NAME")] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Where the evaluations are kept and shared: a journal file, or a database URL.",
            show_default="search.journal in the run folder",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run in that folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON, and nothing else.")] = False,
    **fields: Any,
) -> None:
    """Parse, run, print."""
    from clipq.finetune.plan_search import search_plan
    from clipq.report.search import to_table

    made = recipe_of(recipe, fields)
    folder = out or Path("runs") / (made.model.rpartition(":")[2] if recipe is None else recipe.stem)
    try:
        with Progress(quiet=json) as progress:
            found = search_plan(made, folder, progress, progress, storage=storage, force=force)
    except KeyboardInterrupt:
        errors.print(
            "interrupted: every finished evaluation is kept; the same command (without --force) goes on from there",
            highlight=False,
        )
        raise
    if json:
        print_json(json_module.loads(found.to_json()))
    else:
        console.print(to_table(found))
        console.print(f"The plan is {folder / 'plan.json'}, the page {folder / 'search.html'}", highlight=False)


COMMAND = with_recipe_options(search, EXAMPLE)
