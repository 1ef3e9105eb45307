"""In-parallel training on the user's own optimizer (paper, section 3.2).

Nothing is wrapped. Between steps the model's own parameters hold the quantized weights; during
``optimizer.step()`` they hold the full-precision weights, so the gradient taken at the quantized weights
updates the full-precision ones: the paper's straight-through update, with whatever the optimizer does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from clipq.attached import AttachedOptimizer, Entry, check_state, state_of
from clipq.errors import AttachError, PlanError
from clipq.guard import guard
from clipq.operator.split import is_distributed
from clipq.plan import Plan, TensorPlan
from clipq.sharded import check_same_plan, reshard


def attach(model: nn.Module, optimizer: Optimizer | Iterable[Optimizer], plan: Plan) -> Attachment:
    """Prune and quantize the planned parameters in parallel with training (paper, section 3.2).

    From here on the model's planned parameters are quantized, at once and again after every
    ``optimizer.step()``. The full-precision weights live beside the optimizer; they are part of its
    ``state_dict()``, so a resume is exact. Weights that the user writes into a planned parameter between two
    steps (a checkpoint, say) become its full-precision weights.

    The network may be split over processes: after ``fully_shard`` (FSDP2), or with DTensor parameters placed as
    Shard or Replicate. All processes then attach with the same plan; the result is that of one process, bit for bit.

    Args:
        model: the network itself, or that network in DistributedDataParallel or ``torch.compile``.
        optimizer: the optimizer, or the optimizers, that hold the planned parameters. A planned parameter that
            needs no gradient may be in none: it is quantized once, and its full-precision weights are in the state of
            the first optimizer.
        plan: what to compress; see `Plan`.

    Raises:
        PlanError: the plan does not fit the model, or is another one than in another process that shares it.
        AttachError: the model is no module; a planned parameter is in no optimizer, in two, or attached already.
        WeightError: a planned parameter has NaN or Inf, or a dtype or placement that cannot be quantized.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(f"model is {model!r}; give the network, a torch.nn.Module")
    network = _unwrap(model)
    reshard(network)
    check_same_plan(network, plan)
    plan.check(network)
    optimizers = [_innermost(o) for o in ([optimizer] if isinstance(optimizer, Optimizer) else list(optimizer))]
    planned = [
        Entry(name, parameter, plan.tensors[name])
        for name, parameter in network.named_parameters(remove_duplicate=False)
        if name in plan.tensors
    ]
    owners = [_owner(entry, optimizers) for entry in planned]
    for entry in planned:
        guard.refuse_second(entry)

    frozen = [entry for entry, owner in zip(planned, owners, strict=True) if owner is None]
    states = []
    try:
        for entry in frozen:
            entry.quantize_once()
        for each in optimizers:
            entries = [entry for entry, owner in zip(planned, owners, strict=True) if owner is each]
            kept = frozen if each is optimizers[0] else []
            if entries or kept:
                states.append(AttachedOptimizer(each, entries, kept))
    except BaseException:
        for state in states:
            state.detach(keep_quantized=False)
        for entry in frozen:
            entry.restore()
        raise
    guard.add(states, frozen)
    return Attachment(plan, states, frozen)


class Attachment:
    """What `attach` gives back: the plan in force, and the way out."""

    def __init__(self, plan: Plan, optimizers: list[AttachedOptimizer], frozen: list[Entry]) -> None:
        self.plan = plan
        self._optimizers = optimizers
        self._frozen = frozen

    @property
    def full_precision(self) -> dict[str, Tensor]:
        """The full-precision weights by parameter name: the live tensors, not copies; do not write to them.

        DTensors where the parameters are.
        """
        return {
            entry.name: entry.full for state in self._optimizers for entry in state.entries if entry.full is not None
        }

    def replan(self, plan: Plan) -> None:
        """Go on under other pruning rates and bit widths: the parameters are quantized anew, at once.

        Args:
            plan: of the same tensors.

        Raises:
            PlanError: it names other tensors, or tensors of other shapes.
        """
        here, there = self.plan.tensors, plan.tensors
        different = [name for name in {**here, **there} if _shape(here.get(name)) != _shape(there.get(name))]
        if different:
            raise PlanError(
                f"a plan for an attachment has the tensors that were attached; this one differs in "
                f"{', '.join(different[:5])}{' and others' if len(different) > 5 else ''}: detach and attach again"
            )
        for state in self._optimizers:
            state.replan(plan)
        for entry in self._frozen:
            entry.restore()
            entry.tensor = plan.tensors[entry.name]
            entry.quantize_once()
        self.plan = plan

    def state_dict(self) -> dict[str, Any]:
        """The full-precision weights and the plan, as ``optimizer.state_dict()`` has them under `STATE_KEY`.

        For checkpoints that do not keep what they do not know of an optimizer's state, such as those of
        ``torch.distributed.checkpoint``: give it the attachment as one more object with state.

        Raises:
            WeightError: the last steps on a GPU left NaN or Inf in a weight.
        """
        for state in self._optimizers:
            state.check()
        return state_of([entry for state in self._optimizers for entry in state.kept])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the full-precision weights from a state; the parameters are quantized anew, at once.

        Raises:
            AttachError: the state was saved under another plan.
        """
        check_state(state, [entry for each in self._optimizers for entry in each.kept])
        for each in self._optimizers:
            each.load(state)

    def detach(self) -> None:
        """Give the plain optimizers back; the model keeps its quantized weights, the full-precision ones are dropped.

        Detaching twice is harmless.

        Raises:
            WeightError: the last steps on a GPU left NaN or Inf in a weight; all is detached even so.
        """
        guard.remove([*(e for state in self._optimizers for e in state.entries), *self._frozen])
        for state in self._optimizers:
            state.detach(keep_quantized=True)
        for state in self._optimizers:
            state.check()


def _shape(tensor: TensorPlan | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _unwrap(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel and ``torch.compile``, whose parameter names the plan has."""
    while True:
        compiled = getattr(model, "_orig_mod", None)  # not by its type: that would import the compiler
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(compiled, nn.Module):
            model = compiled
        else:
            return model


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose step hooks run: launchers wrap the user's in one with an ``optimizer`` attribute."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer):
        return _innermost(inner)
    if not isinstance(optimizer, Optimizer):
        raise AttachError(f"{optimizer!r} is not a torch optimizer; give the optimizer, or a list of optimizers")
    return optimizer


def _owner(entry: Entry, optimizers: list[Optimizer]) -> Optimizer | None:
    """The one optimizer that holds a planned parameter; None for a frozen parameter that is in none."""
    holders = [o for o in optimizers if any(p is entry.parameter for p in _parameters(o))]
    if len(holders) > 1:
        raise AttachError(f"{entry.name}: is in {len(holders)} of the optimizers; a planned parameter must be in one")
    if not holders and entry.parameter.requires_grad:
        hint = (
            " (make the optimizer after the model is split over processes)" if is_distributed(entry.parameter) else ""
        )
        raise AttachError(
            f"{entry.name}: is planned but in no optimizer{hint}; add it to one, leave it out of the plan, or freeze "
            f"it with requires_grad_(False) to have it quantized once"
        )
    return holders[0] if holders else None


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
