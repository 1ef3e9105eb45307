"""The run folder: what a run leaves on disk, each file written whole or not at all."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import torch

from clipq.archive import write_file
from clipq.errors import RecipeError
from clipq.finetune.watch import EpochRecord
from clipq.plan import Plan
from clipq.recipe import Recipe
from clipq.search import SearchRecord


class RunFolder:
    """Where one run writes.

    recipe.yaml     the recipe as resolved
    plan.json       what is compressed, and how
    search.journal  the evaluations of the search for the plan, if there was one
    search.json, search.html    what the search found
    metrics.jsonl   one line an epoch
    checkpoint.pt   the state of the training after the last whole epoch
    model.clipq     the compressed network
    report.json, report.md      what came out
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.plan = path / "plan.json"
        self.study = path / "search.journal"
        self.search = path / "search.json"
        self.search_page = path / "search.html"
        self.metrics = path / "metrics.jsonl"
        self.checkpoint = path / "checkpoint.pt"
        self.model = path / "model.clipq"
        self.report = path / "report.json"
        self.report_page = path / "report.md"

    @classmethod
    def create(cls, path: Path, recipe: Recipe, *, force: bool = False) -> RunFolder:
        """Make the folder and put the recipe in.

        Args:
            force: clear the files of an earlier run there.

        Raises:
            RecipeError: the folder holds a run already, or cannot be written to.
        """
        run = cls(path)
        searched = (run.study, run.search, run.search_page)
        files = (run.recipe, run.plan, *searched, run.metrics, run.checkpoint, run.model, run.report, run.report_page)
        present = [file for file in files if file.exists()]
        if present and not force:
            raise RecipeError(
                f"{path}: holds a run already ({present[0].name}, …); give another folder with --out, or --force to "
                f"replace it"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            for file in present:
                file.unlink()
            write_file(run.recipe, recipe.to_yaml().encode())
        except OSError as error:
            raise RecipeError(
                f"{path}: cannot be used as run folder ({error.strerror}); give a writable one with --out"
            ) from None
        return run

    def save_plan(self, plan: Plan) -> None:
        write_file(self.plan, plan.to_json().encode())

    def save_search(self, found: SearchRecord) -> None:
        write_file(self.search, found.to_json().encode())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_file(self.checkpoint, buffer.getvalue())

    def add_metrics(self, record: EpochRecord) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(record)) + "\n")
