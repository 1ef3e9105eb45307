"""Plans of one size that differ in how they share it out: where the joint refinement starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from clipq.search.allocate import CostAt, fitted, plan_at, trade_off
from clipq.search.groups import VECTORS, Group, Theta
from clipq.search.sizes import SizeModel, pruning_rate_of

_EXPONENTS = (1.0, 0.6, 0.35)
"""Fine-tuning heals much of the cost that is measured before it, and the more the higher: low powers of it."""
_WIDTHS = (2, 3, 4)
STARTING_PLANS = len(_EXPONENTS) + 2 * len(_WIDTHS)
"""How many `starting_plans` gives; fewer if not all bit widths are allowed."""
FOR_VECTORS = Theta(0.3, 4)
"""Of biases and the like, in plans that treat all weights alike: they are few, and matter more than their size."""
_QUANTILES = 4096

Floats = npt.NDArray[np.float64]


def starting_plans(
    sizes: Sequence[SizeModel], costs: Sequence[CostAt], weights: Mapping[str, Tensor], budget: float
) -> dict[str, tuple[Theta, ...]]:
    """Plans by name, each of about so many bytes in the groups.

    By the surfaces, and by powers of them; the same θ everywhere; and pruning of the smallest weights of the whole
    model, the last two at several bit widths.
    """
    plans = {}
    for exponent in _EXPONENTS:
        powers = [_power(cost, exponent) for cost in costs]
        plans[f"surfaces^{exponent:g}"] = plan_at(trade_off(sizes, powers), sizes, budget)
    for bits in _WIDTHS:
        if sizes[0].bits[0] <= bits <= sizes[0].bits[-1]:
            plans[f"uniform, {bits} bits"] = uniform_plan(sizes, bits, budget)
            plans[f"magnitude, {bits} bits"] = magnitude_plan(sizes, weights, bits, budget)
    return plans


def uniform_plan(sizes: Sequence[SizeModel], bits: int, budget: float) -> tuple[Theta, ...]:
    """The same θ for all tensors; vectors have `FOR_VECTORS`."""
    matrices = [size for size in sizes if not _is_vector(size)]
    left = budget - sum(size.bytes(FOR_VECTORS) for size in sizes if _is_vector(size))
    thetas = iter(fitted(matrices, [Theta(0.8, bits)] * len(matrices), left))
    return tuple(FOR_VECTORS if _is_vector(size) else next(thetas) for size in sizes)


def magnitude_plan(
    sizes: Sequence[SizeModel], weights: Mapping[str, Tensor], bits: int, budget: float
) -> tuple[Theta, ...]:
    """The smallest weights of the whole model pruned, the same bit width everywhere; vectors have `FOR_VECTORS`."""
    levels = [_magnitudes(size.group, weights) for size in sizes]
    low, high = 0.0, max(float(magnitudes[-1]) for magnitudes in levels)
    for _ in range(40):
        middle = (low + high) / 2
        if _bytes_at(sizes, levels, middle, bits) > budget:
            low = middle
        else:
            high = middle
    return _thetas_at(sizes, levels, high, bits)


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


def _is_vector(size: SizeModel) -> bool:
    return all(len(shape) <= 1 for shape in size.group.shapes)


def _power(cost: CostAt, exponent: float) -> CostAt:
    return lambda sparsities, bits: cost(sparsities, bits) ** exponent


def _magnitudes(group: Group, weights: Mapping[str, Tensor]) -> Floats:
    """Quantiles of the group's magnitudes, ascending."""
    values = np.sort(
        np.concatenate([weights[name].detach().abs().double().cpu().numpy().ravel() for name in group.tensors])
    )
    chosen = np.linspace(0, len(values) - 1, min(len(values), _QUANTILES)).round().astype(np.int64)
    found: Floats = values[chosen]
    return found


def _thetas_at(sizes: Sequence[SizeModel], levels: Sequence[Floats], threshold: float, bits: int) -> tuple[Theta, ...]:
    thetas = []
    for size, magnitudes in zip(sizes, levels, strict=True):
        if _is_vector(size):
            thetas.append(FOR_VECTORS)
            continue
        rate = float(np.searchsorted(magnitudes, threshold)) / len(magnitudes)
        thetas.append(Theta(min(rate, pruning_rate_of(size.highest)), bits))
    return tuple(thetas)


def _bytes_at(sizes: Sequence[SizeModel], levels: Sequence[Floats], threshold: float, bits: int) -> float:
    thetas = _thetas_at(sizes, levels, threshold, bits)
    return sum(size.bytes(theta) for size, theta in zip(sizes, thetas, strict=True))
