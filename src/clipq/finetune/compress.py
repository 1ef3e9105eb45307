"""One compression run, from recipe to report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning_fabric
import torch
from torch import nn

from clipq.archive import write_file
from clipq.data import Data, load_data
from clipq.errors import RecipeError, TrainingError
from clipq.files import round_rest, save
from clipq.finetune.checkpoint import Checkpoints, unpack
from clipq.finetune.devices import make_fabric, single
from clipq.finetune.loggers import check_loggers, make_loggers
from clipq.finetune.loop import fit
from clipq.finetune.network import find_weights, load_weights, make_network
from clipq.finetune.processes import Processes, process_environment, restarted
from clipq.finetune.recorder import Recorder
from clipq.finetune.run import RunFolder
from clipq.finetune.score import Score, score
from clipq.finetune.search import search_recipe, target_of, validation_error
from clipq.finetune.watch import Silent, Watcher
from clipq.norms import fold_norms
from clipq.plan import Plan
from clipq.recipe import Recipe
from clipq.report.run import Aim, ExactRest, RunReport, to_markdown
from clipq.search import SearchRecord, Target
from clipq.search.settings import Silent as SilentSearch
from clipq.search.settings import Watcher as SearchWatcher

DEFAULT_PRUNING_RATE, DEFAULT_BITS = 0.9, 3  # where the other one is given


def compress(
    recipe: Recipe,
    out: Path,
    watcher: Watcher,
    searching: SearchWatcher | None = None,
    *,
    force: bool = False,
    resume: bool = False,
) -> RunReport:
    """Compress the recipe's network and leave everything in a run folder; see `RunFolder`.

    The accuracy reported is that on the test set, or on the validation set where the data has no test set. It is
    measured before, after, and once more by a fresh process that loads the file.

    Under ``torchrun`` every process calls this; the first one alone writes, searches and measures the report. After
    torchrun has started its processes anew they go on with the run.

    Args:
        searching: is told of the progress of the search, if there is one.
        force: replace an earlier run in the folder. A folder with nothing but the search of the same recipe, finished
            or not, is gone on with.
        resume: go on with the run in the folder, from its last checkpoint; ``recipe`` is its own.

    Raises:
        ClipqError: the recipe, its model, weights, data or plan cannot be used, or training cannot go on.
        Interrupted: a signal asked to stop; the run can be resumed.
    """
    check_loggers(recipe)
    fabric, network, data = prepare(recipe)
    processes = Processes.of(fabric)
    processes.share_of(recipe.batch_size)
    target = target_of(recipe)
    plan = None if target is not None else make_plan(network, recipe)
    run = RunFolder(out)
    resume = resume or processes.by_first(lambda: restarted() and run.recipe.exists())
    recorder = Recorder(run, watcher if processes.first else Silent())
    checkpoints = Checkpoints(recipe.checkpoints or str(run.checkpoints), recipe.keep_checkpoints, recorder.note)
    processes.by_first(lambda: _open(run, recipe, plan, checkpoints, force, resume, go_on=target is not None))
    state = _last_state(processes, checkpoints, recorder) if resume else None
    if processes.first:
        recorder.start(make_loggers(recipe, run, recorder.note), state)

    def train(plan: Plan | None, state: Mapping[str, Any] | None, hold_bytes: int | None = None) -> Plan | None:
        return fit(
            fabric,
            network,
            data,
            recipe,
            plan,
            epochs=recipe.float_epochs if plan is None else recipe.epochs,
            learning_rate=(plan is None and recipe.float_learning_rate) or recipe.learning_rate,
            watcher=recorder,
            end_of_epoch=recorder.keep_file,
            checkpoints=checkpoints,
            state=state,
            hold_bytes=hold_bytes,
        )

    if recipe.weights is None:
        if processes.by_first(run.weights.exists):
            processes.by_first(lambda: load_weights(network, run.weights))
            processes.copy_from_first(list(network.state_dict().values()))
        else:
            train(None, state if state is not None and state["phase"] == "float" else None)
            processes.by_first(lambda: run.save_weights(network.state_dict()))
    if state is not None and state["phase"] == "float":
        state = None  # that training is over
    before = processes.by_first(lambda: evaluate(network, data, recipe, fabric.device))
    part = "validation" if data.test is None else "test"
    recorder.note(f"before: {before.accuracy:.2f} % ({part})")

    found, hold_bytes, float_error = None, None, 0.0
    if target is not None:
        found, float_error = processes.by_first(
            lambda: _search(fabric, network, data, recipe, target, run, searching or SilentSearch(), resume)
        )
        plan, hold_bytes = found.plan, target.file_bytes(found.float32_bytes) or found.bytes
    plan = train(plan, state, hold_bytes)
    assert plan is not None
    ended = plan
    scores = before, float_error
    return processes.by_first(
        lambda: _report(network, data, recipe, fabric.device, ended, run, recorder, scores, found, hold_bytes)
    )


def _open(
    run: RunFolder,
    recipe: Recipe,
    plan: Plan | None,
    checkpoints: Checkpoints,
    force: bool,
    resume: bool,
    *,
    go_on: bool,
) -> None:
    """Make the folder ready, and the place of the checkpoints."""
    if resume:
        RunFolder.reopen(run.path)
        checkpoints.sweep()
        return
    RunFolder.create(run.path, recipe, force=force, go_on=go_on)
    checkpoints.clear(force=force)
    if plan is not None:
        run.save_plan(plan)


def _last_state(processes: Processes, checkpoints: Checkpoints, recorder: Recorder) -> dict[str, Any] | None:
    """The state of the last whole checkpoint, which the first process reads for all."""
    content, checkpoints.last = processes.by_first(lambda: (checkpoints.latest(), checkpoints.last))
    if content is None:
        recorder.note("there is no checkpoint yet: the run starts from the beginning")
        return None
    state = unpack(content)
    recorder.note(f"going on from {checkpoints.last}")
    if len(state["positions"]) != processes.count:
        recorder.note(
            f"the run had {len(state['positions'])} processes and goes on with {processes.count}: it will not "
            f"end in the very bits of a run without a break"
        )
    return state


def _search(
    fabric: lightning_fabric.Fabric,
    network: nn.Module,
    data: Data,
    recipe: Recipe,
    target: Target,
    run: RunFolder,
    searching: SearchWatcher,
    resume: bool,
) -> tuple[SearchRecord, float]:
    """The search of a run, and the error of the float network on the validation set."""
    float_error = validation_error(data, recipe, fabric.device)(network)
    if resume and run.search.exists():
        return SearchRecord.from_json(run.search.read_text(encoding="utf-8")), float_error
    alone = fabric if fabric.world_size == 1 else single(recipe, fabric.device)
    found = search_recipe(alone, network, data, recipe, target, str(run.study), searching)
    run.save_search(found)
    run.save_plan(found.plan)
    return found, float_error


def _report(
    network: nn.Module,
    data: Data,
    recipe: Recipe,
    device: torch.device,
    plan: Plan,
    run: RunFolder,
    recorder: Recorder,
    float_scores: tuple[Score, float],
    found: SearchRecord | None,
    hold_bytes: int | None,
) -> RunReport:
    """Write the compressed file, measure it, and write what came out."""
    before, float_error = float_scores
    run.save_plan(plan)
    aim = None
    if found is not None:
        assert hold_bytes is not None
        drop = 100 - recorder.records[-1].validation_accuracy - float_error
        aim = Aim(found.target, hold_bytes, drop if "max_drop" in found.target else None)
    if recipe.fold_norms and not fold_norms(network, plan):
        recorder.note("fold_norms: the network has no batch norm that can be folded")
    after = evaluate(network, data, recipe, device)
    saved = save(network, run.model, plan=plan)
    exact = None
    if recipe.bfloat16_rest:  # before what is reported is measured: the file holds what was evaluated
        exact = ExactRest(after, saved.bytes)
        network.load_state_dict(round_rest(network.state_dict(), plan))
        after = evaluate(network, data, recipe, device)
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
        part="validation" if data.test is None else "test",
        before=before,
        after=after,
        reloaded=reloaded,
        epochs=recorder.records,
        exact=exact,
        aim=aim,
    )
    write_file(run.report_page, to_markdown(report).encode())
    write_file(run.report, (json.dumps(report.to_dict(), indent=2) + "\n").encode())
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
    Processes.of(fabric).copy_from_first(list(network.state_dict().values()))
    return fabric, network, data.for_outputs(number_of_outputs(network, data, recipe, fabric.device))


def evaluate(network: nn.Module, data: Data, recipe: Recipe, device: torch.device) -> Score:
    """Score the network on the test set, or on the validation set where the data has none."""
    part: Any = "validation" if data.test is None else "test"
    batches = data.batches(part, recipe.batch_size, channels_last=recipe.channels_last)
    return score(network, batches, device)


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
        RecipeError: it does not run on the data, or its output has no scores of classes for each label.
    """
    inputs, targets = next(data.batches("validation", 2, channels_last=recipe.channels_last))
    network.eval()
    try:
        outputs = network(inputs.to(device))
    except Exception as cause:
        raise RecipeError(
            f"model {recipe.model!r} does not run on the data {recipe.data!r}, whose inputs are "
            f"{tuple(inputs.shape)}: {type(cause).__name__}: {cause}"
        ) from cause
    wanted = len(inputs), *targets.shape[1:]
    if not isinstance(outputs, torch.Tensor) or outputs.dim() < 2 or (len(outputs), *outputs.shape[2:]) != wanted:
        shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise RecipeError(
            f"model {recipe.model!r} returns {shape} for {len(inputs)} samples with labels of {tuple(targets.shape)}; "
            f"it must return a tensor of (samples, classes), or (samples, classes, positions) where there is a label "
            f"at each position"
        )
    return outputs.shape[1]


def _evaluate_in_a_fresh_process(run: RunFolder, recipe: Recipe) -> Score:
    command = [sys.executable, "-m", "clipq", "evaluate", str(run.recipe), "--weights", str(run.model), "--json"]
    environment = process_environment() | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise TrainingError(f"{run.model}: a fresh process could not evaluate the file:\n{result.stderr.strip()}")
    values = json.loads(result.stdout)
    return Score(values["correct"], values["count"], values["loss"])
