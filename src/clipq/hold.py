"""Hold the file of a model in training at a size.

Fine-tuning moves the weights, and so the bytes that they take. The holder encodes the model now and then, and
multiplies the survivors of every planned tensor by one factor, so that the file comes out at the size asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from clipq import archive, files, sharded
from clipq.attach import Attachment
from clipq.plan import Plan, TensorPlan

SHORTFALL = 0.02
"""How far below the size a file may end, as a share of it."""
Finish = Callable[[Mapping[str, Tensor], Plan], Mapping[str, Tensor]]
"""What is done to a model's tensors at the end, before its file is written; the plan is what they are quantized by."""
_AIM = 1 - SHORTFALL / 4
_TRIES = 16


def file_bytes(
    model: nn.Module | Mapping[str, Tensor],
    plan: Plan,
    known: archive.EncodedTensors | None = None,
    finish: Finish | None = None,
) -> int:
    """The bytes of the file that `clipq.save` would write of a model.

    Of a model that is split over processes all of them must call it; one encodes, and all are told.

    Args:
        known: tensors encoded in earlier calls.
        finish: is applied before; the model stays as it is.
    """
    state = sharded.named_tensors(model)
    if sharded.is_split(state):
        return sharded.on_first_rank(state, lambda whole: file_bytes(whole, plan, known, finish))
    if finish is not None:
        state = finish(state, plan)
    planned = {name: archive.Planned(t.pruning_rate, t.bits) for name, t in plan.tensors.items()}
    return len(archive.encode_file(files.to_arrays(state), planned=planned, known=known))


class SizeHolder:
    """Keeps the plan of an attachment such that the model's file has a wanted size.

    Args:
        model: the network that is attached.
        attachment: its plan is replaced.
        bytes: the most that the file may have.
        finish: what will be done to the model's tensors before the file is written.

    Example:
        >>> attachment = clipq.attach(model, optimizer, plan)
        >>> holder = SizeHolder(model, attachment, 30_000)
        >>> train(model, optimizer, every=100, call=holder.adjust)
        >>> holder.finish()
    """

    def __init__(self, model: nn.Module, attachment: Attachment, bytes: int, finish: Finish | None = None) -> None:
        self._model = model
        self._finish = finish
        self._attachment = attachment
        self.bytes = bytes
        self._elasticity = 0.8  # how the file's logarithm follows the survivors'

    def adjust(self) -> int:
        """One correction towards the size, between two optimizer steps; the bytes of the file before it."""
        found = self._bytes()
        factor = min(max((_AIM * self.bytes / found) ** (1 / self._elasticity), 0.5), 2.0)
        self._attachment.replan(thinned(self._attachment.plan, factor))
        return found

    def finish(self) -> int:
        """Meet the size: never above it, and at most `SHORTFALL` below where the tensors' survivors allow.

        Returns:
            The bytes of the file. They are above the size only if even a single survivor a tensor is too many, and
            further below only if nothing is pruned any more, or tensors are so small that one weight is a step of
            more than that.
        """
        start = self._attachment.plan
        lowest, highest = -math.inf, math.inf  # logarithms of factors known to be too small, and too large
        factor, found = 0.0, self._bytes()
        best: tuple[int, Plan] | None = None
        for _ in range(_TRIES):
            if found <= self.bytes and (best is None or found > best[0]):
                best = found, self._attachment.plan
            if (1 - SHORTFALL / 2) * self.bytes <= found <= self.bytes:
                break
            if found > self.bytes:
                highest = factor
            else:
                lowest = factor
            step = math.log(_AIM * self.bytes / found) / self._elasticity
            wanted = factor + step
            if not lowest < wanted < highest:
                wanted = (lowest + highest) / 2
            if not math.isfinite(wanted) or abs(wanted - factor) < 1e-6:
                break
            plan = thinned(start, math.exp(wanted))
            if plan == self._attachment.plan:
                break  # every tensor is at its limit
            self._attachment.replan(plan)
            factor, found = wanted, self._bytes()
        if best is None:
            self._attachment.replan(thinned(start, 0.0))
            return self._bytes()
        if found != best[0]:
            self._attachment.replan(best[1])
        return best[0]

    def _bytes(self) -> int:
        return file_bytes(self._model, self._attachment.plan, finish=self._finish)


def thinned(plan: Plan, factor: float) -> Plan:
    """The plan with every tensor's survivors multiplied by a factor; at least one survives, at most all."""

    def changed(tensor: TensorPlan) -> TensorPlan:
        survivors = min(max((1 - tensor.pruning_rate) * factor, 1 / max(math.prod(tensor.shape), 2)), 1.0)
        return replace(tensor, pruning_rate=1 - survivors)

    return Plan({name: changed(tensor) for name, tensor in plan.tensors.items()})
