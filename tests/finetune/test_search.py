"""``clipq compress`` with a target: the file that is written meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import clipq
from clipq.errors import RecipeError
from clipq.finetune.compress import compress
from clipq.finetune.run import RunFolder
from clipq.finetune.watch import Silent
from clipq.recipe import Recipe
from clipq.report.run import to_markdown

FIELDS = {
    "model": "clipq.demo:network",
    "data": "digits",
    "float_epochs": 4,
    "epochs": 3,
    "optimizer": "adam",
    "learning_rate": 2e-3,
    "search_evaluations": 3,
    "search_refinements": 2,
    "search_steps": 3,
}


NORMED = """
from torch import nn

def net():
    first = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()
    second = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(512, 10))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", [{"ratio": 20}, {"bytes": "10KB"}], ids=["ratio", "bytes"])
def test_the_file_meets_the_target(tmp_path: Path, target: dict[str, float | str]) -> None:
    report = compress(Recipe.make(FIELDS | target), tmp_path / "run", Silent())
    size = (tmp_path / "run" / "model.clipq").stat().st_size
    wanted = int(report.file.float32_bytes / 20) if "ratio" in target else 10_000
    assert 0.98 * wanted <= size <= wanted
    assert report.aim is not None
    assert report.aim.bytes == wanted
    assert (tmp_path / "run" / "search.html").exists()
    page = to_markdown(report)
    assert "The target is met" in page
    assert "(search.html)" in page
    assert report.to_dict()["search"]["met"]


@pytest.mark.slow
def test_the_file_meets_the_target_with_norms_folded_and_the_rest_rounded(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NORMED)
    finish = {"fold_norms": True, "bfloat16_rest": True}
    fields = FIELDS | {"model": f"{tmp_path / 'net.py'}:net", "bytes": 3000, "batch_norm_batches": 5}
    report = compress(Recipe.make(fields | finish), tmp_path / "run", Silent())
    assert 0.97 * 3000 <= report.file.bytes <= 3000
    assert report.reloaded == report.after
    state = clipq.load(tmp_path / "run" / "model.clipq")
    assert bool((state["1.running_var"] == 1).all())
    assert torch.equal(state["1.bias"], state["1.bias"].bfloat16().float())
    assert report.exact is not None
    assert report.exact.bytes > 3000  # the search and the training aimed at what is left after rounding


@pytest.mark.slow
def test_a_drop_is_measured_on_the_trained_network(tmp_path: Path) -> None:
    report = compress(Recipe.make(FIELDS | {"max_drop": 3.0}), tmp_path / "run", Silent())
    assert report.aim is not None
    assert report.aim.drop is not None
    best_float = [e for e in report.epochs if e.phase == "float"][-1].validation_accuracy
    assert report.aim.drop == pytest.approx(best_float - report.epochs[-1].validation_accuracy)
    assert report.file.bytes <= report.aim.bytes


@pytest.mark.parametrize("change", [{"epochs": 7}, {"pruning_ramp": 0.5}, {"bits": 2}, {"device": "cpu"}])
def test_a_search_is_gone_on_with_whatever_follows_it(tmp_path: Path, change: dict[str, object]) -> None:
    RunFolder.create(tmp_path / "run", Recipe.make(FIELDS | {"ratio": 20})).study.write_text("evaluations")
    recipe = Recipe.make(FIELDS | {"ratio": 20} | change)
    run = RunFolder.create(tmp_path / "run", recipe, go_on=True)
    assert run.study.read_text() == "evaluations"
    assert Recipe.load(run.recipe) == recipe


@pytest.mark.parametrize("change", [{"ratio": 21}, {"search_steps": 4}, {"seed": 1}, {"fold_norms": True}])
def test_another_search_is_not_gone_on_with(tmp_path: Path, change: dict[str, object]) -> None:
    recipe = Recipe.make(FIELDS | {"ratio": 20})
    RunFolder.create(tmp_path / "run", recipe)
    with pytest.raises(RecipeError, match="made for something else: "):
        RunFolder.create(tmp_path / "run", Recipe.make(FIELDS | {"ratio": 20} | change), go_on=True)
    assert Recipe.load(tmp_path / "run" / "recipe.yaml") == recipe
