"""The error surfaces as tables: what each group adds to the cost over p, at each b."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipq.search.groups import Group
from clipq.search.record import Sensitivity
from clipq.search.sizes import pruning_rate_of
from clipq.search.surfaces import ErrorSurface

_SPARSITIES = np.linspace(0.0, 6.0, 25)


def sensitivities(groups: Sequence[Group], surfaces: Sequence[ErrorSurface]) -> tuple[Sensitivity, ...]:
    """Every group's surface at even steps of sparsity as far as it may be pruned, one table a bit width."""
    found = []
    for group, surface in zip(groups, surfaces, strict=True):
        sparsities = _SPARSITIES[surface.size.highest + 1e-9 >= _SPARSITIES]
        rates = tuple(round(pruning_rate_of(float(s)), 6) for s in sparsities)
        for bits in surface.size.bits:
            costs = tuple(float(f"{cost:.4g}") for cost in surface.cost_at(sparsities, bits))
            found.append(Sensitivity(group.name, bits, rates, costs))
    return tuple(found)
