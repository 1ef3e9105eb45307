"""Plans of one size that differ in how they share it out: where the joint refinement starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from clipq.search.allocate import CostAt, fitted, plan_at, trade_off
from clipq.search.groups import VECTORS, Group, Theta
from clipq.search.sizes import SizeModel, pruning_rate_of

_EXPONENTS = (1.0, 0.6, 0.35)
"""Fine-tuning heals much of the cost that is measured before it, and the more the higher: low powers of it."""
_WIDTHS = (2, 3)
_BY_RULE = ("uniform", "magnitude", "lamp", "erk")
STARTING_PLANS = len(_EXPONENTS) + len(_BY_RULE) * len(_WIDTHS)
"""How many `families` gives; fewer if not all bit widths are allowed."""
KINDS = 1 + len(_BY_RULE)
"""How many kinds they are of, by `kind_of`: the surfaces, and each rule."""
FOR_VECTORS = Theta(0.3, 4)
"""Of biases and the like, in plans that treat all weights alike: they are few, and matter more than their size."""
_QUANTILES = 2048

Floats = npt.NDArray[np.float64]
Family = Callable[[float], tuple[Theta, ...]]
"""Gives a plan for any number of bytes in the groups."""


def families(sizes: Sequence[SizeModel], costs: Sequence[CostAt], weights: Mapping[str, Tensor]) -> dict[str, Family]:
    """Ways to share bytes out among the groups, by name.

    By the surfaces, and by powers of them; and, at several bit widths, the same θ everywhere, the smallest weights of
    the whole model pruned, and the rules LAMP and ERK.
    """
    found: dict[str, Family] = {}
    for exponent in _EXPONENTS:
        curve = trade_off(sizes, [_power(cost, exponent) for cost in costs])
        found[f"surfaces^{exponent:g}"] = lambda budget, curve=curve: plan_at(curve, sizes, budget)  # type: ignore[misc]
    magnitudes, lamp = zip(*(magnitude_and_lamp(size.group, weights) for size in sizes), strict=True)
    for bits in _WIDTHS:
        if sizes[0].bits[0] <= bits <= sizes[0].bits[-1]:
            by_rule: tuple[Family, ...] = (
                lambda budget, b=bits: uniform_plan(sizes, b, budget),  # type: ignore[misc]
                lambda budget, b=bits: plan_by(magnitudes, sizes, b, budget),  # type: ignore[misc]
                lambda budget, b=bits: plan_by(lamp, sizes, b, budget),  # type: ignore[misc]
                lambda budget, b=bits: erk_plan(sizes, b, budget),  # type: ignore[misc]
            )
            found |= {f"{name}, {bits} bits": family for name, family in zip(_BY_RULE, by_rule, strict=True)}
    return found


def kind_of(name: str) -> str:
    """What families that differ in exponent or bit width alone have in common, from a name that `families` gives."""
    return name.split("^")[0].split(",")[0]


def uniform_plan(sizes: Sequence[SizeModel], bits: int, budget: float) -> tuple[Theta, ...]:
    """The same θ for all tensors; vectors have `FOR_VECTORS`."""
    return _shared(sizes, lambda shape: 1.0, bits, budget)


def erk_plan(sizes: Sequence[SizeModel], bits: int, budget: float) -> tuple[Theta, ...]:
    """Survivors of a tensor in proportion to the sum of its dimensions over their product, the rule of Erdős-Rényi
    kernels (Evci et al., ICML 2020); vectors have `FOR_VECTORS`."""
    return _shared(sizes, lambda shape: sum(shape) / math.prod(shape), bits, budget)


def plan_by(scores: Sequence[Scores], sizes: Sequence[SizeModel], bits: int, budget: float) -> tuple[Theta, ...]:
    """The weights of least score of the whole model pruned, the same bit width everywhere; vectors have `FOR_VECTORS`.

    By magnitude, the smallest weights of the whole model; by LAMP scores, the rule of Lee et al., ICLR 2021.
    """

    def thetas_at(threshold: float) -> tuple[Theta, ...]:
        return tuple(
            FOR_VECTORS if _is_vector(size) else Theta(min(of.rate(threshold), pruning_rate_of(size.highest)), bits)
            for of, size in zip(scores, sizes, strict=True)
        )

    low = min(float(of.values[0]) for of in scores)
    high = max(float(of.values[-1]) for of in scores) + 1
    for _ in range(40):
        middle = (low + high) / 2
        if sum(size.bytes(theta) for size, theta in zip(sizes, thetas_at(middle), strict=True)) > budget:
            low = middle
        else:
            high = middle
    return thetas_at(high)


@dataclass(frozen=True)
class Scores:
    """By what the weights of one group are pruned: the least first.

    Attributes:
        rates: shares of the group's weights, ascending.
        values: the logarithm of the score that so many weights are below.
    """

    rates: Floats
    values: Floats

    def rate(self, threshold: float) -> float:
        """The share of the weights whose score is below the threshold."""
        found = int(np.searchsorted(self.values, threshold))
        return float(self.rates[found]) if found < len(self.rates) else 1.0


def magnitude_and_lamp(group: Group, weights: Mapping[str, Tensor]) -> tuple[Scores, Scores]:
    """The magnitudes of the group's weights; and w² over the sum of v² of all its weights v that are not smaller."""
    values = [weights[name].detach().abs().double().cpu().numpy().ravel() for name in group.tensors]
    squares = np.square(np.sort(np.concatenate(values)))
    n = len(squares)
    few_left = n - np.geomspace(1, n, min(n, _QUANTILES))
    ranks = np.unique(np.concatenate([np.linspace(0, n - 1, min(n, _QUANTILES)), few_left]).round().astype(np.int64))
    square, tail = (np.log(np.maximum(v[ranks], 1e-60)) for v in (squares, np.cumsum(squares[::-1])[::-1]))
    return Scores(ranks / n, square / 2), Scores(ranks / n, square - tail)


def perturbed(
    sizes: Sequence[SizeModel],
    thetas: Sequence[Theta],
    clusters: Sequence[int],
    shifts: Sequence[tuple[float, int]],
    budget: float,
) -> tuple[Theta, ...]:
    """The plan with each cluster's survivors multiplied and bits changed, brought back to the budget of bytes.

    Args:
        clusters: of each group, the number of its cluster.
        shifts: of each cluster, the logarithm of the factor and what to add to the bits.
    """
    moved = []
    for size, theta, cluster in zip(sizes, thetas, clusters, strict=True):
        log_factor, more = shifts[cluster]
        survivors = min((1 - theta.pruning_rate) * math.exp(log_factor), 1.0)
        bits = min(max(theta.bits + more, size.bits[0]), size.bits[-1])
        moved.append(Theta(1 - survivors, bits))
    return fitted(sizes, moved, budget)


def clusters_of(groups: Sequence[Group], most: int = 6) -> list[int]:
    """A cluster for each group: its own if they are few; else first, last, vectors, and the others by depth."""
    if len(groups) <= most:
        return list(range(len(groups)))
    matrices = [i for i, group in enumerate(groups) if group.name != VECTORS]
    middle = matrices[1:-1]
    stages = most - 2 - (len(matrices) < len(groups))
    of = {i: 2 + stages * n // len(middle) for n, i in enumerate(middle)}
    of |= {matrices[0]: 0, matrices[-1]: 1}
    return [of.get(i, most - 1) for i in range(len(groups))]


def _shared(
    sizes: Sequence[SizeModel], share: Callable[[tuple[int, ...]], float], bits: int, budget: float
) -> tuple[Theta, ...]:
    """Survivors of each tensor in proportion to its share, up to the budget."""
    matrices = [size for size in sizes if not _is_vector(size)]
    left = budget - sum(size.bytes(FOR_VECTORS) for size in sizes if _is_vector(size))
    shares = [share(size.group.shapes[0]) for size in matrices]
    start = [Theta(1 - 0.2 * s / max(shares), bits) for s in shares]
    thetas = iter(fitted(matrices, start, left))
    return tuple(FOR_VECTORS if _is_vector(size) else next(thetas) for size in sizes)


def _is_vector(size: SizeModel) -> bool:
    return all(len(shape) <= 1 for shape in size.group.shapes)


def _power(cost: CostAt, exponent: float) -> CostAt:
    return lambda sparsities, bits: cost(sparsities, bits) ** exponent
