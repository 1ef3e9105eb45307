"""Which groups of a plan cost bytes without saving error, and which the other way round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipq.search.allocate import CostAt, Floats, Table
from clipq.search.groups import Theta
from clipq.search.sizes import SizeModel, sparsity

_FEWER, _MORE = 0.8, 1.25
_SHARE, _TIMES = 0.02, 5.0

LOW = "costs bytes without saving error: could go lower at little loss"
HIGH = "saves bytes at a high price in error: more bytes here would pay"


def remarks(sizes: Sequence[SizeModel], costs: Sequence[CostAt], thetas: Sequence[Theta]) -> tuple[str | None, ...]:
    """For each group one of `LOW` and `HIGH`, or None.

    A group gains, for each byte, what it adds less to the cost, alone, with a quarter more bytes; it loses what it adds
    more with a fifth fewer. No group of a plan that is best by these costs gains more for a byte than another loses.
    Named are groups that lose less than a fifth of what the bytes of the others gain in the median, or gain more than
    five times what those lose, as far as they hold two per cent of the bytes, or of the cost.
    """
    bytes_of = np.array([size.bytes(theta) for size, theta in zip(sizes, thetas, strict=True)])
    cost_of = np.array([_cost(cost, theta) for cost, theta in zip(costs, thetas, strict=True)])
    tables = [Table.of(size, cost) for size, cost in zip(sizes, costs, strict=True)]
    fewer, more = (
        np.array([_least_cost(table, by * size) for table, size in zip(tables, bytes_of, strict=True)])
        for by in (_FEWER, _MORE)
    )
    loss = np.maximum(fewer - cost_of, 0) / ((1 - _FEWER) * bytes_of)
    gain = np.maximum(cost_of - more, 0) / ((_MORE - 1) * bytes_of)
    low = (loss * _TIMES < _elsewhere(gain, bytes_of)) & (bytes_of > _SHARE * bytes_of.sum())
    high = (gain > _elsewhere(loss, bytes_of) * _TIMES) & (cost_of > _SHARE * cost_of.sum())
    return tuple(LOW if is_low else HIGH if is_high else None for is_low, is_high in zip(low, high, strict=True))


def _cost(cost: CostAt, theta: Theta) -> float:
    return float(cost(np.array([sparsity(theta.pruning_rate)]), theta.bits)[0])


def _least_cost(table: Table, budget: float) -> float:
    """Within so many bytes; infinite if the group cannot be so small."""
    return float(table.cost[table.bytes <= budget].min(initial=np.inf))


def _elsewhere(prices: Floats, bytes_of: Floats) -> Floats:
    """For each group, the median over the bytes of the others; NaN if there are none."""
    others = [np.arange(len(prices)) != i for i in range(len(prices))]
    return np.array([_median(prices[of], bytes_of[of]) if of.any() else np.nan for of in others])


def _median(prices: Floats, bytes_of: Floats) -> float:
    order = np.argsort(prices)
    return float(prices[order][np.searchsorted(np.cumsum(bytes_of[order]), bytes_of.sum() / 2)])
