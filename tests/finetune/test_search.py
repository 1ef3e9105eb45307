"""``clipq compress`` with a target: the file that is written meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipq.finetune.compress import compress
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
def test_a_drop_is_measured_on_the_trained_network(tmp_path: Path) -> None:
    report = compress(Recipe.make(FIELDS | {"max_drop": 3.0}), tmp_path / "run", Silent())
    assert report.aim is not None
    assert report.aim.drop is not None
    best_float = [e for e in report.epochs if e.phase == "float"][-1].validation_accuracy
    assert report.aim.drop == pytest.approx(best_float - report.epochs[-1].validation_accuracy)
    assert report.file.bytes <= report.aim.bytes
