"""One compression run, from recipe to report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning_fabric
import torch
from torch import nn

from clipq.archive import write_file
from clipq.data import Data, load_data
from clipq.errors import RecipeError, TrainingError
from clipq.files import round_rest, save
from clipq.finetune.loop import fit
from clipq.finetune.network import find_weights, load_weights, make_network
from clipq.finetune.run import RunFolder
from clipq.finetune.score import Score, score
from clipq.finetune.search import search_recipe, target_of, validation_error
from clipq.finetune.watch import EpochRecord, Watcher
from clipq.plan import Plan
from clipq.recipe import Recipe
from clipq.report.run import Aim, ExactRest, RunReport, to_markdown
from clipq.search.settings import Silent as SilentSearch
from clipq.search.settings import Watcher as SearchWatcher

DEFAULT_PRUNING_RATE, DEFAULT_BITS = 0.9, 3  # where the other one is given
_PRECISION = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def compress(
    recipe: Recipe, out: Path, watcher: Watcher, searching: SearchWatcher | None = None, *, force: bool = False
) -> RunReport:
    """Compress the recipe's network and leave everything in a run folder; see `RunFolder`.

    The accuracy reported is that on the test set, or on the validation set where the data has no test set. It is
    measured before, after, and once more by a fresh process that loads the file.

    Args:
        searching: is told of the progress of the search, if there is one.
        force: replace an earlier run in the folder. A folder with nothing but the search of the same recipe, finished
            or not, is gone on with.

    Raises:
        ClipqError: the recipe, its model, weights, data or plan cannot be used, or training cannot go on.
    """
    fabric, network, data = prepare(recipe)
    target = target_of(recipe)
    plan = None if target is not None else make_plan(network, recipe)
    run = RunFolder.create(out, recipe, force=force, go_on=target is not None)
    if plan is not None:
        run.save_plan(plan)
    recorder = _Recorder(run, watcher)
    part = "validation" if data.test is None else "test"

    if recipe.weights is None and run.weights.exists():
        load_weights(network, run.weights)
    elif recipe.weights is None:
        _fit(fabric, network, data, recipe, None, run, recorder)
    before = evaluate(network, data, recipe, fabric.device)
    watcher.note(f"before: {before.accuracy:.2f} % ({part})")

    found, hold_bytes, float_error = None, None, 0.0
    if target is not None:
        float_error = validation_error(data, recipe, fabric.device)(network)
        found = search_recipe(fabric, network, data, recipe, target, str(run.study), searching or SilentSearch())
        run.save_search(found)
        plan, hold_bytes = found.plan, target.file_bytes(found.float32_bytes) or found.bytes
        run.save_plan(plan)
    plan = _fit(fabric, network, data, recipe, plan, run, recorder, hold_bytes)
    assert plan is not None
    run.save_plan(plan)
    aim = None
    if found is not None:
        assert hold_bytes is not None
        drop = 100 - recorder.records[-1].validation_accuracy - float_error
        aim = Aim(found.target, hold_bytes, drop if "max_drop" in found.target else None)
    after = evaluate(network, data, recipe, fabric.device)
    saved = save(network, run.model, plan=plan)
    exact = None
    if recipe.bfloat16_rest:  # before what is reported is measured: the file holds what was evaluated
        exact = ExactRest(after, saved.bytes)
        network.load_state_dict(round_rest(network.state_dict(), plan))
        after = evaluate(network, data, recipe, fabric.device)
        saved = save(network, run.model, plan=plan)
    reloaded = _evaluate_in_a_fresh_process(run, recipe)
    if reloaded != after:
        raise TrainingError(
            f"{run.model}: a fresh process measures {reloaded} from the file and this one measured {after}; the "
            f"file is kept, but do not trust it"
        )
    report = RunReport.of(
        recipe,
        plan,
        network,
        saved,
        part=part,
        before=before,
        after=after,
        reloaded=reloaded,
        epochs=recorder.records,
        exact=exact,
        aim=aim,
    )
    write_file(run.report, (json.dumps(report.to_dict(), indent=2) + "\n").encode())
    write_file(run.report_page, to_markdown(report).encode())
    return report


def prepare(recipe: Recipe) -> tuple[lightning_fabric.Fabric, nn.Module, Data]:
    """The recipe's device, its network there, with its weights if it names any, and its data.

    Raises:
        ClipqError: one of them cannot be used.
    """
    fabric = make_fabric(recipe)
    network = make_network(recipe)
    if recipe.weights is not None:
        load_weights(network, find_weights(recipe))
    data = load_data(
        recipe.data,
        recipe.data_root,
        recipe.seed,
        validation_fraction=recipe.validation_fraction,
        workers=recipe.workers,
    )
    network = network.to(fabric.device)
    return fabric, network, data.for_outputs(number_of_outputs(network, data, recipe, fabric.device))


def evaluate(network: nn.Module, data: Data, recipe: Recipe, device: torch.device) -> Score:
    """Score the network on the test set, or on the validation set where the data has none."""
    part: Any = "validation" if data.test is None else "test"
    batches = data.batches(part, recipe.batch_size, channels_last=recipe.channels_last)
    return score(network, batches, device)


def make_fabric(recipe: Recipe) -> lightning_fabric.Fabric:
    """The device and arithmetic of a recipe.

    Raises:
        RecipeError: there is no such device here.
    """
    try:
        precision: Any = _PRECISION[recipe.precision]
        return lightning_fabric.Fabric(accelerator=recipe.device, devices=1, precision=precision)
    except (ValueError, RuntimeError) as error:
        raise RecipeError(f"device {recipe.device!r} cannot be used here: {error}") from None


def make_plan(network: nn.Module, recipe: Recipe) -> Plan:
    """The recipe's plan: from its file, or uniform with the recipe's globs and overrides.

    Raises:
        PlanError: it does not fit the network.
    """
    if recipe.plan is not None:
        plan = Plan.load(recipe.plan)
    else:
        plan = Plan.uniform(
            network,
            pruning_rate=DEFAULT_PRUNING_RATE if recipe.pruning_rate is None else recipe.pruning_rate,
            bits=DEFAULT_BITS if recipe.bits is None else recipe.bits,
            include=recipe.include,
            exclude=recipe.exclude,
        )
    plan = plan.override({glob: o.model_dump(exclude_none=True) for glob, o in recipe.overrides.items()})
    plan.check(network)
    return plan


@torch.no_grad()
def number_of_outputs(network: nn.Module, data: Data, recipe: Recipe, device: torch.device) -> int:
    """How many classes the network tells apart, found by running it on two samples.

    Raises:
        RecipeError: it does not run on the data, or its output is no (batch, classes) tensor.
    """
    inputs, _ = next(data.batches("validation", 2, channels_last=recipe.channels_last))
    network.eval()
    try:
        outputs = network(inputs.to(device))
    except Exception as cause:
        raise RecipeError(
            f"model {recipe.model!r} does not run on the data {recipe.data!r}, whose inputs are "
            f"{tuple(inputs.shape)}: {type(cause).__name__}: {cause}"
        ) from cause
    if not isinstance(outputs, torch.Tensor) or outputs.dim() != 2 or len(outputs) != len(inputs):
        shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise RecipeError(
            f"model {recipe.model!r} returns {shape} for {len(inputs)} samples; a classifier returns a tensor of "
            f"(samples, classes)"
        )
    return outputs.shape[1]


def _fit(
    fabric: lightning_fabric.Fabric,
    network: nn.Module,
    data: Data,
    recipe: Recipe,
    plan: Plan | None,
    run: RunFolder,
    recorder: _Recorder,
    hold_bytes: int | None = None,
) -> Plan | None:
    def end_of_epoch(state: dict[str, Any], in_force: Plan | None) -> int | None:
        run.save_checkpoint({"recipe": recipe.model_dump(mode="json"), **state})
        return None if in_force is None else save(network, run.model, plan=in_force).bytes

    try:
        return fit(
            fabric,
            network,
            data,
            recipe,
            plan,
            epochs=recipe.float_epochs if plan is None else recipe.epochs,
            learning_rate=(plan is None and recipe.float_learning_rate) or recipe.learning_rate,
            watcher=recorder,
            end_of_epoch=end_of_epoch,
            hold_bytes=hold_bytes,
        )
    except TrainingError as error:
        kept = (
            f"the state after the last whole epoch is in {run.checkpoint}"
            if run.checkpoint.exists()
            else "no epoch was finished"
        )
        raise TrainingError(f"{error}; {kept}. Try a lower learning rate, or a warm-up") from error


def _evaluate_in_a_fresh_process(run: RunFolder, recipe: Recipe) -> Score:
    command = [sys.executable, "-m", "clipq", "evaluate", str(run.recipe), "--weights", str(run.model), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise TrainingError(f"{run.model}: a fresh process could not evaluate the file:\n{result.stderr.strip()}")
    values = json.loads(result.stdout)
    return Score(values["correct"], values["count"], values["loss"])


class _Recorder:
    """Passes everything on to the watcher, and writes the metrics of each epoch to the run folder."""

    def __init__(self, run: RunFolder, watcher: Watcher) -> None:
        self._run = run
        self._watcher = watcher
        self.records: list[EpochRecord] = []

    def phase(self, name: str, steps: int) -> None:
        self._watcher.phase(name, steps)

    def step(self, loss: float) -> None:
        self._watcher.step(loss)

    def epoch(self, record: EpochRecord) -> None:
        self.records.append(record)
        self._run.add_metrics(record)
        self._watcher.epoch(record)

    def note(self, text: str) -> None:
        self._watcher.note(text)
