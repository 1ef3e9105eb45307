"""Pruning rates that rise to the plan's while training is young."""

from __future__ import annotations

import math
from dataclasses import replace

from clipq.plan import Plan, TensorPlan

STAGES = 100
"""In so many stages, or one a step: each new plan costs one more pass over the weights."""


class PruningRamp:
    """The plan in force at each step of a training that prunes little by little.

    The logarithm of a tensor's survivors, 1 - p, falls to that of the plan along a cubic, fast at first and ever slower
    (the schedule of Zhu & Gupta, *To prune, or not to prune*, 2017, there of p itself; the paper has none). The bit
    widths are the plan's from the start.

    Args:
        plan: where it ends.
        steps: after how many.
    """

    def __init__(self, plan: Plan, steps: int) -> None:
        self.steps = steps
        self._plan = plan
        self._every = max(-(-steps // STAGES), 1)

    def after(self, step: int) -> Plan | None:
        """The plan from here on, after so many steps; None if it is the one before still."""
        if step > self.steps or (step % self._every and step != self.steps):
            return None
        return self.at(step)

    def at(self, step: int) -> Plan:
        """The plan after so many steps."""
        share = 1 - (1 - min(step / self.steps, 1.0)) ** 3
        return Plan({name: _risen(tensor, share) for name, tensor in self._plan.tensors.items()})


def _risen(tensor: TensorPlan, share: float) -> TensorPlan:
    if share == 1:
        return tensor
    return replace(tensor, pruning_rate=-math.expm1(share * math.log1p(-tensor.pruning_rate)))
