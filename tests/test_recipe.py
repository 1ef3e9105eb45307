"""What a recipe accepts, and that the command line offers all of it."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from clipq import ClipqError
from clipq.cli.app import app
from clipq.cli.compress import changes_of, recipe_of
from clipq.finetune.compress import make_plan
from clipq.models import build
from clipq.recipe import Recipe

ROOT = Path(__file__).parents[1]
MINIMAL: dict[str, Any] = {"model": "lenet-5", "data": "mnist", "weights": "w.safetensors"}


def test_every_field_is_an_option_of_compress() -> None:
    program: Any = typer.main.get_command(app)
    options = {p.name for p in program.commands["compress"].params}
    assert set(Recipe.model_fields) <= options


def test_options_mean_what_the_fields_mean() -> None:
    fields = {
        **dict.fromkeys(Recipe.model_fields),
        **MINIMAL,
        "weights": "none",
        "float_epochs": 3,
        "include": ["*.bias"],
        "overrides": ["conv1.*:pruning_rate=0.3,bits=4", "ip2.*:bits=2"],
        "channels_last": True,
    }
    made = recipe_of(None, fields)
    expected = {
        **MINIMAL,
        "weights": None,
        "float_epochs": 3,
        "include": ("*.bias",),
        "overrides": {"conv1.*": {"pruning_rate": 0.3, "bits": 4}, "ip2.*": {"bits": 2}},
        "channels_last": True,
    }
    assert made == Recipe.make(expected)


def test_none_takes_any_optional_field_out_on_the_command_line() -> None:
    program: Any = typer.main.get_command(app)
    command = program.commands["compress"]
    optional = [n for n, f in Recipe.model_fields.items() if type(None) in typing.get_args(f.annotation)]
    assert {"weights", "ratio", "bits", "clip_norm", "bytes"} <= set(optional)
    words = [word for name in optional for word in (f"--{name.replace('_', '-')}", "none")]
    values = command.make_context("compress", words).params
    assert {name: values[name] for name in optional} == dict.fromkeys(optional, "none")
    assert changes_of({name: values[name] for name in optional}) == dict.fromkeys(optional)
    numbers = command.make_context("compress", ["--ratio", "9", "--bits", "2"]).params
    assert (numbers["ratio"], numbers["bits"]) == (9.0, 2)
    for words in (["--ratio", "many"], ["--bits", "2.5"]):
        with pytest.raises(Exception, match=f"'{words[1]}' is not a valid (float|int), nor none"):
            command.make_context("compress", words)


def test_options_change_a_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(Recipe.make(MINIMAL).to_yaml())
    assert recipe_of(path, {"epochs": 3, "bits": None, "include": []}) == Recipe.make({**MINIMAL, "epochs": 3})


def test_yaml_round_trips(tmp_path: Path) -> None:
    recipe = Recipe.make({**MINIMAL, "overrides": {"conv1.*": {"bits": 4}}, "include": ["*.bias"], "data_root": "d"})
    path = tmp_path / "r.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_of_the_project_fit_their_networks(path: Path, request: pytest.FixtureRequest) -> None:
    recipe = Recipe.load(path)
    library = recipe.model.rpartition("/")[0]
    if library:
        request.getfixturevalue("vision")
        pytest.importorskip(library)
    with torch.device("meta"):
        network = build(recipe.model)
    make_plan(network, recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lerning_rate": 0.1}, r"lerning_rate: unknown field \(did you mean 'learning_rate'\?\)"),
        ({"bits": 9}, r"bits: input should be less than or equal to 8 \(got 9\)"),
        ({"pruning_rate": 1}, r"pruning_rate: input should be less than 1"),
        ({"optimizer": "sdg"}, r"optimizer: input should be 'sgd', 'adam' or 'adamw' \(got 'sdg'\)"),
        ({"epochs": "many"}, r"epochs: .*integer.*\(got 'many'\)"),
        ({"overrides": {"*": {"density": 1}}}, r"overrides.*density: unknown field"),
        ({"weights": None}, "neither weights nor float_epochs"),
    ],
)
def test_a_recipe_with_a_mistake_says_which_and_what_is_accepted(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ClipqError, match=message):
        Recipe.make({**MINIMAL, **change})


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: [", "is not YAML"), ("- a\n- b\n", "holds no recipe"), ("", "holds no recipe"), ("1: 2", "no recipe")],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ClipqError, match=f"r.yaml.*{message}"):
        Recipe.load(path)
    with pytest.raises(ClipqError, match=r"none\.yaml: cannot be read"):
        Recipe.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["conv1.*", "conv1.*:bits", ":bits=3=", "bits=3"])
def test_an_override_option_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ClipqError):
        recipe_of(None, {**MINIMAL, "overrides": [text]})
