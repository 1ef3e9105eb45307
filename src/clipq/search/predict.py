"""From a target to a plan: surfaces, the trade-off curve, candidates of the wanted size, and their joint refinement."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from clipq.plan import Plan
from clipq.search.allocate import Point, largest, plan_at, trade_off
from clipq.search.candidates import STARTING_PLANS, clusters_of, perturbed, starting_plans
from clipq.search.context import Context, gp_sampler, value_of
from clipq.search.groups import Theta, plan_of, thetas_of
from clipq.search.progress import Kind
from clipq.search.record import CurvePoint, Evaluation
from clipq.search.sizes import pruning_rate_of
from clipq.search.study import suggest
from clipq.search.surfaces import ErrorSurface, fit_surface
from clipq.search.target import Target

EVALUATIONS = 10
_DESIGN = ((2, 0.8), (3, 0.3), (3, 1.5), (4, 3.0), (2, 2.2), (5, 0.1), (4, 1.0), (3, 4.2), (2, 0.1), (3, 2.3))
"""Where a group is evaluated alone, first to last: bits and sparsity; further ones are spread evenly."""
WHOLE_PLANS = 6
_RESOLUTION = 1e-5
_BISECTIONS = 6
_SHIFT, _MORE_BITS = 0.8, 1
_STARTUP = 8


@dataclass(frozen=True)
class Interaction:
    """How the cost of a whole plan follows the sum of what its groups add alone: log(whole) = a + b log(sum)."""

    a: float = 0.0
    b: float = 1.0

    def whole(self, alone: float) -> float:
        return math.exp(self.a + self.b * math.log(max(alone, 1e-12)))

    @classmethod
    def fit(cls, alone: Sequence[float], whole: Sequence[float], resolution: float) -> Interaction:
        """Least squares over plans that add more than the resolution."""
        pairs = [(math.log(a), math.log(w)) for a, w in zip(alone, whole, strict=True) if min(a, w) > resolution]
        if len(pairs) < 2:
            return cls()
        x, y = np.array(pairs).T
        spread = float(np.var(x))
        b = float(np.mean((x - x.mean()) * (y - y.mean()))) / spread if spread > 1e-9 else 1.0
        b = min(max(b, 0.5), 2.0)
        return cls(float(y.mean() - b * x.mean()), b)


@dataclass(frozen=True)
class Prediction:
    """What the default search came to."""

    thetas: tuple[Theta, ...]
    surfaces: tuple[ErrorSurface, ...]
    curve: tuple[CurvePoint, ...]
    interaction: Interaction


def expect_stages(context: Context, target: Target) -> None:
    """The stages of `predict`."""
    expect = context.schedule.expect
    judged: Kind = "whole plan" if context.recover is None else "fine-tuned plan"
    expect("alone", "one group", _evaluations(context) * len(context.groups))
    expect("whole", "whole plan", WHOLE_PLANS)
    if target.max_drop is not None:
        for n in range(_BISECTIONS):
            expect(f"drop {n}", judged, 1)
    expect("candidates", judged, STARTING_PLANS, competes=True)
    if context.settings.refinements:
        expect("refine", judged, context.settings.refinements, competes=True)


def predict(context: Context, target: Target) -> Prediction:
    """θ of every group for a target.

    Raises:
        SearchError: the target cannot be met, or an evaluation cannot be used.
    """
    wanted = target.file_bytes(context.float32_bytes)
    if wanted is not None:
        context.check_reachable(wanted)
    surfaces = _surfaces(context)
    curve = trade_off(context.sizes, [surface.cost_at for surface in surfaces])
    rest = context.rest(largest(context.sizes))
    interaction, points = _whole_plans(context, curve, rest)
    if wanted is None:
        wanted = _size_for(context, target, curve, interaction, rest)
    plans = starting_plans(
        context.sizes, [surface.cost_at for surface in surfaces], context.evaluator.weights, wanted - rest
    )
    thetas = _refine(context, plans, wanted, rest)
    return Prediction(thetas, surfaces, points, interaction)


def _surfaces(context: Context) -> tuple[ErrorSurface, ...]:
    slots = []
    for i, size in enumerate(context.sizes):
        for bits, sparsity in _design(_evaluations(context), context.settings.bits):
            slots.append({"group": i, "bits": bits, "sparsity": min(sparsity, size.highest)})
    groups = IntDistribution(0, len(context.groups))
    widths = IntDistribution(1, 8)

    def evaluate(trial: optuna.Trial) -> float:
        i = suggest(trial, "group", groups)
        sparsities = FloatDistribution(0.0, max(context.sizes[i].highest, 1e-6))
        theta = Theta(pruning_rate_of(suggest(trial, "sparsity", sparsities)), suggest(trial, "bits", widths))
        return context.evaluator.at(context.groups, _only(context, i, theta), changing=i)

    trials = context.run_stage("alone", slots, evaluate)
    thetas: list[list[Theta]] = [[] for _ in context.groups]
    added: list[list[float]] = [[] for _ in context.groups]
    for trial in trials:
        i, bits, sparsity = trial.params["group"], trial.params["bits"], trial.params["sparsity"]
        theta = Theta(pruning_rate_of(sparsity), bits)
        thetas[i].append(theta)
        added[i].append(value_of(trial) - context.base_cost)
        context.evaluations.append(
            Evaluation("alone", value_of(trial), context.groups[i].name, theta.pruning_rate, theta.bits)
        )
    with context.timed("surfaces"):
        return tuple(
            fit_surface(size, ts, costs, _resolution(context))
            for size, ts, costs in zip(context.sizes, thetas, added, strict=True)
        )


def _whole_plans(context: Context, curve: Sequence[Point], rest: float) -> tuple[Interaction, tuple[CurvePoint, ...]]:
    """How far the sum of the groups' costs is from the cost of whole plans, and the curve corrected for it."""
    budgets = np.geomspace(curve[0].bytes * 1.5, curve[-1].bytes * 0.9, WHOLE_PLANS)
    chosen = [min(curve, key=lambda p, b=budget: abs(math.log(p.bytes / b))) for budget in budgets]  # type: ignore[misc]

    def evaluate(trial: optuna.Trial) -> float:
        n = suggest(trial, "plan", IntDistribution(0, WHOLE_PLANS))
        return context.evaluator.at(context.groups, chosen[n].thetas)

    trials = context.run_stage("whole", [{"plan": n} for n in range(WHOLE_PLANS)], evaluate)
    whole = [value_of(trial) for trial in trials]
    interaction = Interaction.fit(
        [p.cost for p in chosen], [w - context.base_cost for w in whole], _resolution(context)
    )
    measured = dict(zip((p.thetas for p in chosen), whole, strict=True))
    for point, cost in zip(chosen, whole, strict=True):
        context.evaluations.append(Evaluation("whole", cost, bytes=point.bytes + rest))
    points = tuple(
        CurvePoint(p.bytes + rest, context.base_cost + interaction.whole(p.cost), measured.get(p.thetas)) for p in curve
    )
    return interaction, points


def _size_for(context: Context, target: Target, curve: Sequence[Point], interaction: Interaction, rest: float) -> int:
    """The bytes at which a target that is not in bytes is met."""
    if target.trade_off is not None:
        price = target.trade_off / context.float32_bytes
        best = min(curve, key=lambda p: interaction.whole(p.cost) + price * p.bytes)
        return round(best.bytes + rest)
    assert target.max_drop is not None
    low, high = math.log(curve[0].bytes), math.log(curve[-1].bytes)
    met = high
    for n in range(_BISECTIONS):
        middle = (low + high) / 2
        drop = _drop(context, f"drop {n}", plan_at(curve, context.sizes, math.exp(middle)), rest)
        context.evaluations.append(Evaluation("drop", drop, bytes=math.exp(middle) + rest))
        if drop <= target.max_drop:
            met = high = middle
        else:
            low = middle
    if met == math.log(curve[-1].bytes):
        context.note(
            f"no plan was found that loses at most {target.max_drop:g}: the largest one is taken, of "
            f"{math.exp(met) + rest:,.0f} bytes"
        )
    return round(math.exp(met) + rest)


def _drop(context: Context, stage: str, thetas: Sequence[Theta], rest: float) -> float:
    plan = plan_of(context.groups, thetas)
    size = round(context.predicted_bytes(thetas) + rest)

    def evaluate(trial: optuna.Trial) -> float:
        return context.evaluator.validated(context.validate, plan, context.recover, size)

    return value_of(context.one(stage, evaluate)) - context.base_score


def _refine(context: Context, plans: dict[str, tuple[Theta, ...]], wanted: int, rest: float) -> tuple[Theta, ...]:
    """The best of a few plans of the wanted size, and then of plans around it."""
    names = list(plans)

    def cost_of(trial: optuna.Trial, thetas: Sequence[Theta]) -> float:
        plan = plan_of(context.groups, thetas)
        cost, _, ended = context.evaluator.of_plan(plan, context.recover, wanted)
        trial.set_user_attr("plan", json.loads(ended.to_json()))
        return cost

    def of_a_name(trial: optuna.Trial) -> float:
        return cost_of(trial, plans[names[suggest(trial, "plan", IntDistribution(0, len(names)))]])

    trials = context.run_stage("candidates", [{"plan": n} for n in range(len(names))], of_a_name)
    for name, trial in zip(names, trials, strict=True):
        context.evaluations.append(Evaluation("candidates", value_of(trial), bytes=wanted, name=name))
    winner = min(trials, key=lambda trial: (value_of(trial), trial.user_attrs["slot"]))
    start = _thetas(context, winner)

    clusters = clusters_of(context.groups)
    shift, more = FloatDistribution(-_SHIFT, _SHIFT), IntDistribution(-_MORE_BITS, _MORE_BITS)

    def around(trial: optuna.Trial) -> float:
        shifts = [
            (suggest(trial, f"survivors {k}", shift), suggest(trial, f"bits {k}", more))
            for k in range(max(clusters) + 1)
        ]
        return cost_of(trial, perturbed(context.sizes, start, clusters, shifts, wanted - rest))

    n = context.settings.refinements
    if n:
        tried = context.run_stage("refine", [{}] * n, around, gp_sampler(context.settings.seed, min(_STARTUP, n)))
        context.evaluations += [Evaluation("refine", value_of(trial), bytes=wanted) for trial in tried]
        winner = min([winner, *tried], key=value_of)
    return _thetas(context, winner)


def _thetas(context: Context, trial: FrozenTrial) -> tuple[Theta, ...]:
    return thetas_of(context.groups, Plan.from_json(json.dumps(trial.user_attrs["plan"])))


def _only(context: Context, i: int, theta: Theta) -> list[Theta | None]:
    thetas = context.nothing
    thetas[i] = theta
    return thetas


def _design(n: int, bits: tuple[int, int]) -> list[tuple[int, float]]:
    """So many points of bits and sparsity."""
    points = list(_DESIGN[:n])
    golden = (math.sqrt(5) - 1) / 2
    for k in range(n - len(points)):
        points.append((2 + k % 4, 6.0 * ((k + 1) * golden % 1)))
    return [(min(max(b, bits[0]), bits[1]), s) for b, s in points]


def _evaluations(context: Context) -> int:
    return context.settings.evaluations or EVALUATIONS


def _resolution(context: Context) -> float:
    """Costs that differ by less are alike."""
    return max(_RESOLUTION, 1e-4 * abs(context.base_cost))
