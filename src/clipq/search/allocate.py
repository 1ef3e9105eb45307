"""From surfaces to plans: the best θ of every group at every price of a byte, and plans of a wanted size.

For a price λ, the sum over the groups of cost and λ times bytes is least where each group's own sum is least. The
sweep over λ gives the trade-off curve, whose points are the plans of least predicted cost at their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipq.search.groups import Theta
from clipq.search.sizes import SizeModel, pruning_rate_of, sparsity

_GRID = 64
_PRICES = 160

Floats = npt.NDArray[np.float64]
CostAt = Callable[[Floats, int], Floats]
"""A group's cost at many sparsities and one bit width."""


@dataclass(frozen=True)
class Point:
    """One plan on a trade-off curve.

    Attributes:
        thetas: of the groups.
        bytes: of the groups, predicted.
        cost: the sum of what each group adds, predicted.
    """

    thetas: tuple[Theta, ...]
    bytes: float
    cost: float


def trade_off(sizes: Sequence[SizeModel], costs: Sequence[CostAt]) -> list[Point]:
    """The curve from the smallest plan to the largest."""
    tables = [_Table.of(size, cost) for size, cost in zip(sizes, costs, strict=True)]
    steepest = max(table.cost.max() for table in tables) / max(min(table.bytes.min() for table in tables), 1e-9)
    total = sum(table.bytes.max() for table in tables)
    flattest = max(min(table.cost.min() for table in tables), 1e-12) / total * 1e-3
    points: dict[tuple[Theta, ...], Point] = {}
    for price in np.geomspace(max(steepest, 10 * flattest), flattest, _PRICES):
        chosen = [int(np.argmin(table.cost + price * table.bytes)) for table in tables]
        thetas = tuple(table.thetas[i] for table, i in zip(tables, chosen, strict=True))
        points[thetas] = Point(
            thetas,
            sum(float(table.bytes[i]) for table, i in zip(tables, chosen, strict=True)),
            sum(float(table.cost[i]) for table, i in zip(tables, chosen, strict=True)),
        )
    curve: list[Point] = []
    for point in sorted(points.values(), key=lambda p: (p.bytes, p.cost)):
        if not curve or point.cost < curve[-1].cost:
            curve.append(point)
    return curve


def smallest(sizes: Sequence[SizeModel]) -> tuple[Theta, ...]:
    """The plan that takes the least bytes the search may go to."""
    return tuple(_extreme(size, min) for size in sizes)


def largest(sizes: Sequence[SizeModel]) -> tuple[Theta, ...]:
    """The plan that takes the most."""
    return tuple(_extreme(size, max) for size in sizes)


def plan_at(curve: Sequence[Point], sizes: Sequence[SizeModel], budget: float) -> tuple[Theta, ...]:
    """The curve's plan for a budget of bytes: the next larger one, its survivors thinned out to the budget."""
    for point in curve:
        if point.bytes >= budget:
            return fitted(sizes, point.thetas, budget)
    return curve[-1].thetas


def fitted(sizes: Sequence[SizeModel], thetas: Sequence[Theta], budget: float) -> tuple[Theta, ...]:
    """The plan with every group's survivors multiplied by one factor, so that the predicted bytes are the budget.

    If it is not large enough with all survivors kept, groups get more bits, the least ones first.
    """
    thetas = tuple(thetas)
    while _bytes(sizes, scaled(sizes, thetas, math.inf)) < budget:
        raised = _one_bit_more(sizes, thetas)
        if raised is None:
            return scaled(sizes, thetas, math.inf)
        thetas = raised
    low, high = -8.0, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        if _bytes(sizes, scaled(sizes, thetas, math.exp(middle))) > budget:
            high = middle
        else:
            low = middle
    return scaled(sizes, thetas, math.exp(low))


def scaled(sizes: Sequence[SizeModel], thetas: Sequence[Theta], factor: float) -> tuple[Theta, ...]:
    """The plan with every group's survivors multiplied by a factor, within what each group allows."""
    less = math.log(factor) if factor > 0 else -math.inf
    return tuple(
        Theta(pruning_rate_of(min(max(sparsity(t.pruning_rate) - less, 0.0), size.highest)), t.bits)
        for size, t in zip(sizes, thetas, strict=True)
    )


def _bytes(sizes: Sequence[SizeModel], thetas: Sequence[Theta]) -> float:
    return sum(size.bytes(theta) for size, theta in zip(sizes, thetas, strict=True))


def _one_bit_more(sizes: Sequence[SizeModel], thetas: Sequence[Theta]) -> tuple[Theta, ...] | None:
    can = [i for i, (size, t) in enumerate(zip(sizes, thetas, strict=True)) if t.bits < size.bits[-1]]
    if not can:
        return None
    chosen = min(can, key=lambda i: (thetas[i].bits, -sizes[i].group.size))
    more = Theta(thetas[chosen].pruning_rate, thetas[chosen].bits + 1)
    return (*thetas[:chosen], more, *thetas[chosen + 1 :])


def _extreme(size: SizeModel, pick: Callable[..., Theta]) -> Theta:
    corners = [Theta(pruning_rate_of(s), b) for b in size.bits for s in (0.0, size.highest)]
    return pick(corners, key=size.bytes)


@dataclass(frozen=True)
class _Table:
    """A group's θ on a grid, with their bytes and costs."""

    thetas: tuple[Theta, ...]
    bytes: Floats
    cost: Floats

    @classmethod
    def of(cls, size: SizeModel, cost: CostAt) -> _Table:
        sparsities = np.linspace(0.0, size.highest, _GRID)
        thetas = tuple(Theta(pruning_rate_of(float(s)), b) for b in size.bits for s in sparsities)
        return cls(
            thetas,
            np.concatenate([size.bytes_at(sparsities, b) for b in size.bits]),
            np.concatenate([cost(sparsities, b) for b in size.bits]),
        )
