"""Where metrics go beside the run folder: TensorBoard and MLflow, each asked for by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from clipq.errors import RecipeError
from clipq.finetune.run import RunFolder
from clipq.finetune.watch import EpochRecord
from clipq.recipe import Recipe

EVERY = 50
"""Steps between two values of the loss, which are means over the steps between."""


class MetricsLog:
    """A watcher that writes a run's metrics: the loss of steps, and all that an epoch's record has.

    Args:
        write: takes metrics by name, and the step. If it fails that is noted, and training goes on.
        note: is told so.
    """

    def __init__(self, write: Callable[[Mapping[str, float], int], None], note: Callable[[str], None]) -> None:
        self._to = write
        self._tell = note
        self._phase, self._done, self._losses = "", 0, list[float]()

    def phase(self, name: str, steps: int, done: int = 0) -> None:
        self._phase, self._done, self._losses = name, done, []

    def step(self, loss: float) -> None:
        self._done += 1
        self._losses.append(loss)
        if self._done % EVERY == 0:
            self._write({f"{self._phase}/loss": sum(self._losses) / len(self._losses)}, self._done)
            self._losses = []

    def epoch(self, record: EpochRecord) -> None:
        names = ("train_loss", "validation_loss", "validation_accuracy", "learning_rate", "bytes")
        values = {f"{record.phase}/{name}": getattr(record, name) for name in names}
        self._write({name: float(value) for name, value in values.items() if value is not None}, record.step)

    def note(self, text: str) -> None: ...

    def _write(self, metrics: Mapping[str, float], step: int) -> None:
        try:
            self._to(metrics, step)
        except Exception as error:  # whatever a tracking server's client raises
            self._tell(f"metrics of step {step} were not logged; training goes on. {type(error).__name__}: {error}")


def make_loggers(recipe: Recipe, run: RunFolder, note: Callable[[str], None]) -> list[MetricsLog]:
    """The loggers that a recipe names: TensorBoard's files go into the run folder, MLflow's runs to its own store.

    Raises:
        RecipeError: a package is not installed.
    """
    make = {"tensorboard": _tensorboard, "mlflow": _mlflow}
    return [MetricsLog(make[name](recipe, run), note) for name in recipe.loggers]


def check_loggers(recipe: Recipe) -> None:
    """Raise `RecipeError` if a package is not installed that a logger of the recipe needs."""
    for name in recipe.loggers:
        _package({"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow"}[name], name)


def _tensorboard(recipe: Recipe, run: RunFolder) -> Callable[[Mapping[str, float], int], None]:
    writer = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(run.tensorboard))

    def write(metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def _mlflow(recipe: Recipe, run: RunFolder) -> Callable[[Mapping[str, float], int], None]:
    mlflow = _package("mlflow", "mlflow")
    run_id = run.mlflow.read_text().strip() if run.mlflow.exists() else None
    started = mlflow.start_run(run_id=run_id, run_name=None if run_id else run.path.resolve().name)
    if run_id is None:
        run.mlflow.write_text(started.info.run_id)
        mlflow.log_params({name: str(value)[:250] for name, value in recipe.model_dump(mode="json").items()})

    def write(metrics: Mapping[str, float], step: int) -> None:
        mlflow.log_metrics(dict(metrics), step=step)

    return write


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise RecipeError(
            f"loggers names {package}, which is not installed: pip install {package}, or leave it out"
        ) from None
