"""The run folder: what a run leaves on disk, each file written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from clipq.archive import write_file
from clipq.errors import RecipeError
from clipq.finetune.watch import EpochRecord
from clipq.plan import Plan
from clipq.recipe import AFTER_THE_SEARCH, WHERE_IT_RUNS, Recipe
from clipq.report.search import to_page
from clipq.search import SearchRecord


class RunFolder:
    """Where one run writes.

    recipe.yaml     the recipe as resolved
    plan.json       what is compressed, and how
    search.journal  the evaluations of the search for the plan, if there was one
    search.json, search.html    what the search found
    weights.safetensors     the float network, if it was trained here
    metrics.jsonl   one line an epoch
    checkpoints/    the last states of the training; see `Checkpoints`
    model.clipq     the compressed network
    report.json, report.md      what came out
    tensorboard/, mlflow-run    TensorBoard's files, the number of MLflow's run, if the recipe names these loggers
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.plan = path / "plan.json"
        self.study = path / "search.journal"
        self.search = path / "search.json"
        self.search_page = path / "search.html"
        self.weights = path / "weights.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model.clipq"
        self.report = path / "report.json"
        self.report_page = path / "report.md"
        self.tensorboard = path / "tensorboard"
        self.mlflow = path / "mlflow-run"

    @classmethod
    def create(cls, path: Path, recipe: Recipe, *, force: bool = False, go_on: bool = False) -> RunFolder:
        """Make the folder and put the recipe in.

        Args:
            force: clear the files of an earlier run there.
            go_on: accept a folder with the same search, finished or not, whatever is to follow it.

        Raises:
            RecipeError: the folder holds another run, or cannot be written to.
        """
        run = cls(path)
        searched = (run.recipe, run.plan, run.study, run.search, run.search_page, run.weights)
        left = (run.metrics, run.checkpoints, run.model, run.report, run.report_page)
        compressed = (*left, run.tensorboard, run.mlflow)
        present = [file for file in (*searched, *compressed) if file.exists()]
        if present and not force:
            compresses = any(file in present for file in compressed)
            if not go_on or compresses or not run.recipe.exists():
                raise RecipeError(
                    f"{path}: holds a run already ({present[0].name}, …); go on with it by --resume {path}, give "
                    f"another folder with --out, or --force to replace it"
                )
            _check_same_search(run.recipe, recipe)
            present = []
        try:
            path.mkdir(parents=True, exist_ok=True)
            for file in present:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            write_file(run.recipe, recipe.to_yaml().encode())
        except OSError as error:
            raise RecipeError(
                f"{path}: cannot be used as run folder ({error.strerror}); give a writable one with --out"
            ) from None
        return run

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """The folder of a run that is to be gone on with; what was half written when it was killed is deleted.

        Raises:
            RecipeError: there is no run.
        """
        run = cls(path)
        if not run.recipe.exists():
            raise RecipeError(f"{path}: holds no run to resume (no recipe.yaml); give the folder of one")
        for half_written in path.glob(".*.part"):
            half_written.unlink(missing_ok=True)
        return run

    def save_plan(self, plan: Plan) -> None:
        write_file(self.plan, plan.to_json().encode())

    def save_search(self, found: SearchRecord) -> None:
        write_file(self.search, found.to_json().encode())
        write_file(self.search_page, to_page(found).encode())

    def save_weights(self, state: Mapping[str, Tensor]) -> None:
        """Keep the float network, unless another process was faster."""
        own = self.path / f".{self.weights.name}.{os.getpid()}.part"
        try:
            write_file(own, safetensors.torch.save({name: tensor.cpu().clone() for name, tensor in state.items()}))
            with contextlib.suppress(FileExistsError):
                os.link(own, self.weights)
        finally:
            own.unlink(missing_ok=True)

    def save_metrics(self, records: Iterable[EpochRecord]) -> None:
        lines = [json.dumps(dataclasses.asdict(record)) + "\n" for record in records]
        write_file(self.metrics, "".join(lines).encode())

    def load_metrics(self) -> list[EpochRecord]:
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.exists() else []
        return [EpochRecord(**json.loads(line)) for line in lines]


def _check_same_search(path: Path, recipe: Recipe) -> None:
    """Raise `RecipeError` if a folder's recipe searches for something else."""
    aside = {*WHERE_IT_RUNS, *AFTER_THE_SEARCH}
    there, here = (r.model_dump(mode="json", exclude=aside) for r in (Recipe.load(path), recipe))
    differing = [f"{name} ({there[name]} there, {here[name]} here)" for name in here if there[name] != here[name]]
    if differing:
        raise RecipeError(
            f"{path.parent}: holds a search that was made for something else: {', '.join(differing)}. Go on with what "
            f"it was started with, give another folder with --out, or --force to replace it"
        )
