"""``clipq compress``: the main job."""

from __future__ import annotations

import inspect
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from clipq.cli.common import console, print_json
from clipq.cli.progress import Progress
from clipq.errors import RecipeError
from clipq.recipe import WHERE_IT_RUNS, Recipe
from clipq.report.run import to_table

EXAMPLE = """Compress a trained network: prune and quantize it in parallel with fine-tuning, and write the file.

Example: `clipq compress recipes/mnist/lenet-5.yaml --data-root data --epochs 20`

A recipe is optional: every field of one is an option too. The run folder that is left holds the recipe as resolved,
the plan, the metrics, the last checkpoints, the compressed file and the report.

`clipq compress --resume runs/lenet-5` goes on with a run that was stopped or killed. `torchrun` spreads one over
devices.
"""


def compress(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML).", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder.", show_default="runs/NAME")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run in that folder.")] = False,
    resume: Annotated[
        Path | None, typer.Option(help="A run folder to go on with, from its last checkpoint.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
    **fields: Any,
) -> None:
    """Parse, run, print."""
    from clipq.finetune.compress import compress as run
    from clipq.finetune.processes import leave

    if resume is not None:
        made, folder = _resumed(resume, {"RECIPE": recipe, "--out": out, "--force": force or None}, fields), resume
        if (folder / "report.json").exists():
            print((folder / ("report.json" if json else "report.md")).read_text(encoding="utf-8"), end="")
            return
    else:
        made = recipe_of(recipe, fields)
        folder = out or Path("runs") / (made.model.rpartition(":")[2] if recipe is None else recipe.stem)
    first = os.environ.get("RANK", "0") == "0"
    with Progress(quiet=json) as progress:
        report = run(made, folder, progress, progress, force=force, resume=resume is not None)
    if json and first:
        print_json(report.to_dict())
    elif first:
        console.print(to_table(report))
        console.print(f"The run is in {folder}", highlight=False)
    leave()


def _resumed(folder: Path, others: dict[str, Any], fields: dict[str, Any]) -> Recipe:
    """The recipe of a run that goes on; only where it runs may be another.

    Raises:
        RecipeError: there is no run, or more is to be changed.
    """
    changes = changes_of(fields)
    wrong = [name for name, value in others.items() if value is not None]
    wrong += ["--" + name.replace("_", "-") for name in changes if name not in WHERE_IT_RUNS]
    if wrong:
        changeable = ", ".join("--" + name.replace("_", "-") for name in WHERE_IT_RUNS)
        raise RecipeError(
            f"--resume goes on with the recipe of {folder}, and {', '.join(wrong)} cannot be given with it; leave that "
            f"out. What can be given is {changeable}"
        )
    path = folder / "recipe.yaml"
    if not path.exists():
        raise RecipeError(f"{folder}: holds no run to resume (no recipe.yaml); give the folder of one")
    return Recipe.load(path, changes)


def recipe_of(path: Path | None, fields: dict[str, Any]) -> Recipe:
    """The recipe of a file, of options, or of both; "none" as an option's value takes the field out."""
    changes = changes_of(fields)
    return Recipe.make(changes, "the command line") if path is None else Recipe.load(path, changes)


def changes_of(fields: dict[str, Any]) -> dict[str, Any]:
    """The recipe's fields that options give; "none" takes a field out."""
    changes = {name: value for name, value in fields.items() if value is not None and value != []}
    if "overrides" in changes:
        changes["overrides"] = dict(_override(text) for text in changes["overrides"])
    return {name: None if value == "none" else value for name, value in changes.items()}


def with_recipe_options(command: Callable[..., None], doc: str) -> Callable[..., None]:
    """Give a command one option for each field of a recipe, with the field's own description as help."""
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    hints = typing.get_type_hints(command, include_extras=True)
    own = [p.replace(annotation=hints[p.name]) for p in own]
    options = []
    for name, field in Recipe.model_fields.items():
        flag = "--" + name.replace("_", "-")
        default = "" if field.is_required() or field.default in (None, (), {}) else f" [default: {field.default}]"
        accepted = _option_type(field.annotation)
        number = next((kind for kind in (int, float) if accepted == kind | None), None)
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}" if field.annotation is bool else flag,
            help=(field.description or "") + default,
            show_default=False,
            rich_help_panel="The recipe's fields",
            parser=_or_none(number) if number and type(None) in typing.get_args(field.annotation) else None,
        )
        options.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[accepted, option]
            )
        )

    def wrapper(**values: Any) -> None:
        command(**values)

    wrapper.__name__ = command.__name__
    wrapper.__doc__ = doc
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    wrapper.__signature__ = inspect.Signature([*keyword_only, *options])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*keyword_only, *options]}
    return wrapper


def _option_type(annotation: Any) -> Any:
    """What the command line takes for a field: optional, lists for sequences and mappings, words for choices."""
    arguments = typing.get_args(annotation)
    if isinstance(annotation, types.UnionType):
        annotation = next(a for a in arguments if a is not type(None))
        arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin in (tuple, dict):
        return list[str] | None
    if origin is Literal:
        return str | None
    return annotation | None


def _or_none(kind: type[int] | type[float]) -> Callable[[str], int | float | str]:
    """What reads a number, or the word that takes the field out."""

    def read(text: str) -> int | float | str:
        try:
            return text if text == "none" else kind(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not a valid {kind.__name__}, nor none") from None

    read.__name__ = kind.__name__
    return read


def _override(text: str) -> tuple[str, dict[str, str]]:
    glob, colon, settings = text.rpartition(":")
    pairs = [setting.partition("=") for setting in settings.split(",")]
    if not colon or not all(equals for _, equals, _ in pairs):
        raise RecipeError(f"override {text!r} is not of the form 'GLOB:pruning_rate=P,bits=B'")
    return glob, {name.strip(): value.strip() for name, _, value in pairs}


COMMAND = with_recipe_options(compress, EXAMPLE)
