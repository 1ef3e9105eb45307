"""Which groups of a plan cost bytes without saving error, and which the other way round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FEWER = 0.8
"""A group's bytes, as a share of those it has, at which its price is measured."""
_SHARE, _TIMES = 0.02, 5.0

LOW = "costs bytes without saving error: could go lower at little loss"
HIGH = "saves bytes at a high price in error: more bytes here would pay"

Floats = npt.NDArray[np.float64]


def remarks(bytes_of: Sequence[float], prices: Sequence[float]) -> tuple[str | None, ...]:
    """For each group one of `LOW` and `HIGH`, or None.

    Named are groups whose price is five times below, or above, the median over all bytes; no group is called
    `LOW` that holds less than two per cent of the bytes.

    Args:
        prices: what the plan's cost rises by for each byte that is taken from the group; NaN if none can be.
    """
    sizes, price = np.array(bytes_of), np.array(prices)
    known = np.isfinite(price)
    usual = _median(price[known], sizes[known]) if known.any() else 0.0
    low = (price * _TIMES < usual) & (sizes > _SHARE * sizes.sum())
    high = price > max(usual, 0.0) * _TIMES
    return tuple(LOW if is_low else HIGH if is_high else None for is_low, is_high in zip(low, high, strict=True))


def _median(prices: Floats, bytes_of: Floats) -> float:
    order = np.argsort(prices)
    return float(prices[order][np.searchsorted(np.cumsum(bytes_of[order]), bytes_of.sum() / 2)])
