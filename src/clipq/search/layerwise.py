"""The paper's search (section 3.3): layer by layer, minimise ε(θ) - λ·c(θ) by Bayesian optimisation."""

from __future__ import annotations

import math

import optuna
from optuna.distributions import FloatDistribution, IntDistribution

from clipq.search.context import Context, gp_sampler, value_of
from clipq.search.groups import Theta
from clipq.search.record import Evaluation
from clipq.search.sizes import pruning_rate_of
from clipq.search.study import suggest

EVALUATIONS = 30
_STARTUP = 8


def expect_layers(context: Context) -> None:
    """The stages of `search_layerwise`."""
    for i in range(len(context.groups)):
        context.schedule.expect(_stage(context, i), "one group", _evaluations(context), competes=True)


def search_layerwise(context: Context, trade_off: float) -> tuple[Theta, ...]:
    """θ of every group, in the model's order: the choices so far applied, the later groups in full precision.

    For group i, ε is the cost of the model and c = (m_i - s_i(θ)) / Σ m_j, with m_i its bits in the uncompressed
    model and s_i its bits in the file.

    Args:
        trade_off: λ, in the units of the cost.
    """
    settings = context.settings
    chosen: list[Theta | None] = context.nothing
    for i, group in enumerate(context.groups):
        trials = context.run_stage(
            _stage(context, i),
            [{}] * _evaluations(context),
            _Objective(context, i, list(chosen), trade_off),
            gp_sampler(settings.seed + 1000 * i, _STARTUP),
        )
        for trial in trials:
            theta = Theta(pruning_rate_of(trial.params["sparsity"]), trial.params["bits"])
            context.evaluations.append(
                Evaluation(
                    "layerwise",
                    trial.user_attrs["cost"],
                    group.name,
                    theta.pruning_rate,
                    theta.bits,
                    objective=value_of(trial),
                )
            )
        winner = min(trials, key=lambda trial: (trial.value, trial.user_attrs["slot"]))
        chosen[i] = Theta(pruning_rate_of(winner.params["sparsity"]), winner.params["bits"])
    return tuple(theta for theta in chosen if theta is not None)


def _stage(context: Context, i: int) -> str:
    return f"layer {i}: {context.groups[i].name}"


def _evaluations(context: Context) -> int:
    return context.settings.evaluations or EVALUATIONS


class _Objective:
    """ε(θ) - λ·c(θ) of one group."""

    def __init__(self, context: Context, i: int, chosen: list[Theta | None], trade_off: float) -> None:
        self._context, self._i, self._chosen, self._trade_off = context, i, chosen, trade_off
        self._sparsities = FloatDistribution(0.0, context.sizes[i].highest)
        self._bits = IntDistribution(*context.settings.bits)
        self._best = math.inf

    def __call__(self, trial: optuna.Trial) -> float:
        context, i = self._context, self._i
        sparsity = suggest(trial, "sparsity", self._sparsities)
        theta = Theta(pruning_rate_of(sparsity), suggest(trial, "bits", self._bits))
        saved = (4 * context.groups[i].size - context.sizes[i].bytes(theta)) / context.float32_bytes
        gain = self._trade_off * saved
        thetas = [*self._chosen[:i], theta, *self._chosen[i + 1 :]]
        cost = context.evaluator.at(context.groups, thetas, changing=i, ceiling=self._best + gain)
        trial.set_user_attr("cost", cost)
        self._best = min(self._best, cost - gain)
        return cost - gain
