"""One search, from a model and a target to a plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import ParamSpec

from torch import nn

from clipq.errors import SearchError
from clipq.hold import Finish
from clipq.plan import Plan
from clipq.search.evaluator import Evaluate, Evaluator, Recover
from clipq.search.groups import groups_of, plan_of
from clipq.search.record import SearchRecord
from clipq.search.settings import Settings, Silent, Watcher
from clipq.search.target import Target

Arguments = ParamSpec("Arguments")


def _for_its_plan(run: Callable[Arguments, SearchRecord]) -> Callable[Arguments, Plan]:
    """A search that gives the plan alone."""

    @functools.wraps(run)
    def search(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Plan:
        return run(*args, **kwargs).plan

    search.__name__ = search.__qualname__ = "search"
    return search


def run_search(
    model: nn.Module,
    evaluate: Evaluate,
    target: Target,
    *,
    settings: Settings | None = None,
    validate: Evaluate | None = None,
    recover: Recover | None = None,
    finish: Finish | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    storage: str | None = None,
    name: str = "clipq",
    depends: Mapping[str, object] | None = None,
    watcher: Watcher | None = None,
) -> SearchRecord:
    """Choose every tensor's pruning rate and bit width (paper, section 3.3).

    The model is evaluated in place and has its own weights again whenever the search returns or raises.

    Args:
        model: trained.
        evaluate: gives a model's cost, lower is better, on data that the search may see: an error, or better a loss,
            which tells more. See `clipq.search.evaluator.Evaluate`.
        target: what to reach; see `Target`.
        settings: how to search.
        validate: what ``max_drop`` is measured by, if not by ``evaluate``.
        recover: fine-tunes for a few steps under a plan, so that candidates are judged by what fine-tuning makes of
            them; see `clipq.search.evaluator.Recover`.
        finish: what will be done to the model's tensors before its file is written, such as rounding: a function from
            tensors by name and the plan to tensors by name. Sizes are those of files made so.
        include, exclude: globs on parameter names, as in `Plan.uniform`.
        storage: a journal file or database URL that other processes with the same arguments share, and from which an
            interrupted search goes on.
        name: of the search in the storage.
        depends: what else the evaluations depend on, in a few words each; processes that share a storage must agree.
        watcher: is told of the progress.

    Returns:
        `clipq.search`: a plan whose file, with the model's weights as they are, meets the target.
        `clipq.search.run_search`: that plan, and everything that was found on the way.

    Raises:
        SearchError: the target cannot be met; ``evaluate`` raises, gives no number or changes the model; the storage
            cannot be reached or holds a search for something else.

    Example:
        >>> plan = clipq.search(model, validation_loss, clipq.Target(ratio=15))
    """
    # Here and not above: these import Optuna, SciPy and scikit-learn, which takes a while.
    from clipq.search.context import Context, fingerprint, group_records
    from clipq.search.fit import fit
    from clipq.search.layerwise import expect_layers, search_layerwise
    from clipq.search.predict import expect_stages, predict
    from clipq.search.sensitivity import sensitivities
    from clipq.search.sizes import measure_sizes
    from clipq.search.study import Worker, open_storage

    if not isinstance(target, Target):
        raise SearchError(f"target is {target!r}; give a clipq.Target, such as clipq.Target(ratio=15)")
    settings, watcher = settings or Settings(), watcher or Silent()
    if settings.method == "layerwise" and target.trade_off is None:
        raise SearchError(
            f"the layerwise search of the paper has one knob, trade_off (λ); got {target.given()}. Give trade_off, or "
            f"search with the default method"
        )
    if not isinstance(model, nn.Module):
        raise SearchError(f"model is {model!r}; give the trained network, a torch.nn.Module")
    groups = groups_of(model, include, exclude)
    evaluator = Evaluator(model, evaluate, settings.memory)
    print_of = fingerprint(evaluator, groups, target.given(), settings)
    print_of |= {key: str(value) for key, value in (depends or {}).items()}
    worker = Worker(open_storage(storage), name, print_of)
    watcher.stage("sizes", 0)
    context = Context(evaluator, validate, recover, finish, groups, [], worker, settings, watcher)
    with context.timed("sizes"):
        bits = range(settings.bits[0], settings.bits[1] + 1)
        context.sizes = measure_sizes(groups, evaluator.weights, bits, settings.highest_pruning_rate)
    context.schedule.expect("base", "whole plan", 1)
    if settings.method == "layerwise":
        expect_layers(context)
    else:
        expect_stages(context, target)
    context.schedule.expect("plan", "whole plan" if recover is None else "fine-tuned plan", 1)
    context.expect_prices()
    with worker.alive():
        context.measure_base()
        prediction = None
        if target.trade_off is not None and settings.method == "layerwise":
            thetas = search_layerwise(context, target.trade_off)
        else:
            prediction = predict(context, target)
            thetas = prediction.thetas
        wanted = target.file_bytes(context.float32_bytes)
        if wanted is None:
            size = context.file_bytes(thetas)
        else:
            thetas, size = fit(context.sizes, thetas, wanted, context.file_bytes)
        plan = plan_of(groups, thetas)
        cost, drop = context.measure_plan(plan, wanted or size)
        costs = None if prediction is None else [s.cost(t) for s, t in zip(prediction.surfaces, thetas, strict=True)]
        records = group_records(context, thetas, size, costs)
    return SearchRecord(
        method=settings.method,
        target=target.given(),
        plan=plan,
        float32_bytes=context.float32_bytes,
        base_cost=context.base_cost,
        bytes=size,
        cost=cost,
        drop=drop,
        groups=records,
        evaluations=tuple(context.evaluations),
        curve=() if prediction is None else prediction.curve,
        interaction=None if prediction is None else (prediction.interaction.a, prediction.interaction.b),
        sensitivity=() if prediction is None else sensitivities(groups, prediction.surfaces),
        recovered=recover is not None,
        notes=tuple(context.notes),
        seconds=context.seconds,
    )


search = _for_its_plan(run_search)
