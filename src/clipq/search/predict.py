"""From a target to a plan: surfaces, the trade-off curve, candidates of the wanted size, and their joint refinement."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from clipq.plan import Plan
from clipq.search.allocate import Point, largest, plan_at, trade_off
from clipq.search.candidates import KINDS, STARTING_PLANS, Family, clusters_of, families, kind_of, perturbed
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
NEGLIGIBLE = 1e-3  # of the cost that the costliest plan adds
_BISECTIONS = (3, 4)
"""Of the size for a drop: along the surfaces' curve, and then among plans of the family that is best there."""
SCREENING = 0.25
"""The share of the steps of ``recover`` that plans get while there are many; what comes out on top is judged by all."""
_BEST = 2
FINALISTS = _BEST + KINDS
"""Plans judged in full: the best of all that were screened, and the best of each kind of family. What is best after few
steps need not be best after many, and plans of one kind err alike."""
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
        """Least squares over plans that add more than the resolution, and a thousandth of what the costliest adds.

        Logarithms of less are mostly noise, and far from the rest: they would turn the line.
        """
        least = max(resolution, NEGLIGIBLE * max(whole, default=0.0))
        pairs = [(math.log(a), math.log(w)) for a, w in zip(alone, whole, strict=True) if min(a, w) > least]
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
    screened: Kind = "whole plan" if context.recover is None else "screened plan"
    judged: Kind = "whole plan" if context.recover is None else "fine-tuned plan"
    expect("alone", "one group", _evaluations(context) * len(context.groups))
    expect("whole", "whole plan", WHOLE_PLANS)
    if target.max_drop is not None:
        for n in range(sum(_BISECTIONS)):
            expect(f"drop {n}", judged, 1)
        expect("families", screened, STARTING_PLANS)
    expect("candidates", screened, STARTING_PLANS, competes=True)
    if context.settings.refinements:
        expect("refine", screened, context.settings.refinements, competes=True)
    if context.recover is not None:
        expect("finalists", judged, FINALISTS, competes=True)


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
    ways = families(context.sizes, [surface.cost_at for surface in surfaces], context.evaluator.weights)
    if wanted is None:
        wanted = _size_for(context, target, curve, interaction, ways, rest)
    thetas = _choose(context, ways, wanted, rest)
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


def _size_for(
    context: Context,
    target: Target,
    curve: Sequence[Point],
    interaction: Interaction,
    ways: Mapping[str, Family],
    rest: float,
) -> int:
    """The bytes at which a target that is not in bytes is met."""
    if target.trade_off is not None:
        price = target.trade_off / context.float32_bytes
        best = min(curve, key=lambda p: interaction.whole(p.cost) + price * p.bytes)
        return round(best.bytes + rest)
    assert target.max_drop is not None
    least, most = math.log(curve[0].bytes), math.log(curve[-1].bytes)
    low, high = least, most
    by_curve, by_best = _BISECTIONS

    def met(n: int, family: Family) -> bool:
        middle = (low + high) / 2
        drop = _drop(context, f"drop {n}", family(math.exp(middle)), rest)
        context.evaluations.append(Evaluation("drop", drop, bytes=math.exp(middle) + rest))
        return drop <= target.max_drop  # type: ignore[operator]

    for n in range(by_curve):
        if met(n, lambda budget: plan_at(curve, context.sizes, budget)):
            high = (low + high) / 2
        else:
            low = (low + high) / 2
    plans = {name: family(math.exp(high)) for name, family in ways.items()}
    screened = _candidates(context, "families", plans, round(math.exp(high) + rest))
    found = ways[min(screened, key=lambda name: value_of(screened[name]))]
    low = max(low - (high - low), least)
    for n in range(by_curve, by_curve + by_best):
        if met(n, found):
            high = (low + high) / 2
        else:
            low = (low + high) / 2
    if high == most:
        context.note(
            f"no plan was found that loses at most {target.max_drop:g}: the largest one is taken, of "
            f"{math.exp(high) + rest:,.0f} bytes"
        )
    return round(math.exp(high) + rest)


def _drop(context: Context, stage: str, thetas: Sequence[Theta], rest: float) -> float:
    plan = plan_of(context.groups, thetas)
    size = round(context.predicted_bytes(thetas) + rest)

    def evaluate(trial: optuna.Trial) -> float:
        return context.evaluator.validated(context.validate, plan, context.recover, size)

    return value_of(context.one(stage, evaluate)) - context.base_score


def _choose(context: Context, ways: Mapping[str, Family], wanted: int, rest: float) -> tuple[Theta, ...]:
    """The best plan of the wanted size: of all families, and around the best of them; the last few judged in full."""
    plans = {name: family(wanted - rest) for name, family in ways.items()}
    screened = _candidates(context, "candidates", plans, wanted)
    context.evaluations += [
        Evaluation("candidates", value_of(trial), bytes=wanted, name=name) for name, trial in screened.items()
    ]
    tried = list(screened.values())
    start = _thetas(context, min(tried, key=_rank))

    clusters = clusters_of(context.groups)
    shift, more = FloatDistribution(-_SHIFT, _SHIFT), IntDistribution(-_MORE_BITS, _MORE_BITS)

    def around(trial: optuna.Trial) -> float:
        shifts = [
            (suggest(trial, f"survivors {k}", shift), suggest(trial, f"bits {k}", more))
            for k in range(max(clusters) + 1)
        ]
        moved = perturbed(context.sizes, start, clusters, shifts, wanted - rest)
        return _cost_of(context, trial, moved, wanted, SCREENING)

    n = context.settings.refinements
    if n:
        refined = context.run_stage("refine", [{}] * n, around, gp_sampler(context.settings.seed, min(_STARTUP, n)))
        context.evaluations += [Evaluation("refine", value_of(trial), bytes=wanted) for trial in refined]
        tried += refined
    tried.sort(key=_rank)
    if context.recover is None:
        return _thetas(context, tried[0])
    of_kind: dict[str, FrozenTrial] = {}
    for name in sorted(screened, key=lambda name: _rank(screened[name])):
        of_kind.setdefault(kind_of(name), screened[name])
    everything = list(dict.fromkeys(_thetas(context, trial) for trial in tried))
    best = list(dict.fromkeys(everything[:_BEST] + [_thetas(context, trial) for trial in of_kind.values()]))

    def in_full(trial: optuna.Trial) -> float:
        return _cost_of(context, trial, best[suggest(trial, "plan", IntDistribution(0, len(best)))], wanted, 1.0)

    judged = context.run_stage("finalists", [{"plan": n} for n in range(len(best))], in_full)
    context.evaluations += [Evaluation("finalists", value_of(trial), bytes=wanted) for trial in judged]
    return _thetas(context, min(judged, key=_rank))


def _candidates(
    context: Context, stage: str, plans: Mapping[str, Sequence[Theta]], wanted: int
) -> dict[str, FrozenTrial]:
    """Each plan screened, by name."""
    names = list(plans)

    def of_a_name(trial: optuna.Trial) -> float:
        thetas = plans[names[suggest(trial, "plan", IntDistribution(0, len(names)))]]
        return _cost_of(context, trial, thetas, wanted, SCREENING)

    trials = context.run_stage(stage, [{"plan": n} for n in range(len(names))], of_a_name)
    return dict(zip(names, trials, strict=True))


def _cost_of(context: Context, trial: optuna.Trial, thetas: Sequence[Theta], wanted: int, share: float) -> float:
    plan = plan_of(context.groups, thetas)
    cost, _, ended = context.evaluator.of_plan(plan, context.recover, wanted, share=share)
    trial.set_user_attr("plan", json.loads(ended.to_json()))
    return cost


def _rank(trial: FrozenTrial) -> tuple[float, int]:
    return value_of(trial), trial.user_attrs["slot"]


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
