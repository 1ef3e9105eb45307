"""In-parallel training on the user's own optimizer (paper, section 3.2).

Nothing is wrapped. Between steps the model's own parameters hold the quantized weights; during
``optimizer.step()`` they hold the full-precision weights, so the gradient taken at the quantized weights
updates the full-precision ones: the paper's straight-through update, with whatever the optimizer does.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from clipq.errors import AttachError, PlanError
from clipq.operator import Quantizer, QuantizerEntry
from clipq.operator.split import is_distributed, local_of, mark_written
from clipq.plan import Plan, TensorPlan
from clipq.sharded import check_same_plan, reshard

STATE_KEY = "clipq"
"""The key that `attach` adds to ``optimizer.state_dict()``: the full-precision weights and their plan."""


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
        AttachError: a planned parameter is in no optimizer, in two, or attached already.
        WeightError: a planned parameter has NaN or Inf, or a dtype or placement that cannot be quantized.
    """
    network = _unwrap(model)
    reshard(network)
    check_same_plan(network, plan)
    plan.check(network)
    optimizers = [_innermost(o) for o in ([optimizer] if isinstance(optimizer, Optimizer) else list(optimizer))]
    planned = [
        _Entry(name, parameter, plan.tensors[name])
        for name, parameter in network.named_parameters(remove_duplicate=False)
        if name in plan.tensors
    ]
    owners = [_owner(entry, optimizers) for entry in planned]
    for entry in planned:
        _guard.refuse_second(entry)

    frozen = [entry for entry, owner in zip(planned, owners, strict=True) if owner is None]
    states = []
    try:
        for entry in frozen:
            entry.quantize_once()
        for each in optimizers:
            entries = [entry for entry, owner in zip(planned, owners, strict=True) if owner is each]
            kept = frozen if each is optimizers[0] else []
            if entries or kept:
                states.append(_AttachedOptimizer(each, entries, kept))
    except BaseException:
        for state in states:
            state.detach(keep_quantized=False)
        for entry in frozen:
            entry.restore()
        raise
    _guard.add(states, frozen)
    return Attachment(plan, states, frozen)


class Attachment:
    """What `attach` gives back: the plan in force, and the way out."""

    def __init__(self, plan: Plan, optimizers: list[_AttachedOptimizer], frozen: list[_Entry]) -> None:
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
        return _state([entry for state in self._optimizers for entry in state.kept])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the full-precision weights from a state; the parameters are quantized anew, at once.

        Raises:
            AttachError: the state was saved under another plan.
        """
        _check_state(state, [entry for each in self._optimizers for entry in each.kept])
        for each in self._optimizers:
            each.load(state)

    def detach(self) -> None:
        """Give the plain optimizers back; the model keeps its quantized weights, the full-precision ones are dropped.

        Detaching twice is harmless.

        Raises:
            WeightError: the last steps on a GPU left NaN or Inf in a weight; all is detached even so.
        """
        _guard.remove([*(e for state in self._optimizers for e in state.entries), *self._frozen])
        for state in self._optimizers:
            state.detach(keep_quantized=True)
        for state in self._optimizers:
            state.check()


class _Entry:
    """One planned parameter, its full-precision weights, and how it was left after the last step."""

    def __init__(self, name: str, parameter: nn.Parameter, tensor: TensorPlan) -> None:
        self.name = name
        self.parameter = parameter
        self.tensor = tensor
        self.full: Tensor | None = None
        self.version: tuple[int, ...] = ()

    def quantize_once(self) -> None:
        self.full = self.parameter.detach().clone()
        quantizer = _quantizer([self])
        quantizer([self.full], [self.parameter])
        quantizer.check()

    def restore(self) -> None:
        if self.full is not None:
            self.parameter.detach().copy_(self.full)

    def follow_the_user(self, quantizer: Quantizer, place: int) -> None:
        """Take over what the user did to the parameter since the last step: moved it, or wrote new weights.

        Processes that the parameter is split over need not agree on whether it was written to.

        Args:
            quantizer: quantized the parameter last, as its entry ``place``.
        """
        parameter = self.parameter
        full = _full(self)
        if (parameter.shape, parameter.dtype) != (full.shape, full.dtype):
            raise AttachError(
                f"{self.name}: was {tuple(full.shape)} {full.dtype} when attached and is "
                f"{tuple(parameter.shape)} {parameter.dtype} now; detach before converting a model, and attach again"
            )
        if parameter.device == full.device and _version(parameter) == self.version:
            return
        # Most writes put back what was there (weights swapped for an average and back): those change nothing.
        was = full.clone()
        quantizer.recall(place, full, was)
        if parameter.device != full.device:
            self.full, was = full.to(parameter.device), was.to(parameter.device)
        here, kept, now = (local_of(tensor) for tensor in (was, _full(self), parameter))
        kept.copy_(torch.where(now != here, now, kept))


class _AttachedOptimizer:
    """The hooks on one optimizer, and the full-precision weights that they swap in and out.

    Args:
        entries: the optimizer's own.
        frozen: entries in no optimizer, whose full-precision weights go into this one's state; ``kept`` are both.
    """

    def __init__(self, optimizer: Optimizer, entries: list[_Entry], frozen: list[_Entry]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.entries = entries
        self.frozen = frozen
        self.kept = [*entries, *frozen]
        self._quantizer = _quantizer(entries)
        for entry in entries:
            entry.full = entry.parameter.detach().clone()
        self._handles: list[RemovableHandle] = []
        try:
            self._quantize()
            self.check()
        except BaseException:
            self._show_full_precision()
            raise
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
        ]

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, as long as it lives."""
        return self._optimizer()

    def detach(self, *, keep_quantized: bool) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if not keep_quantized:
            self._show_full_precision()
        for entry in self.entries:
            entry.full = None

    def replan(self, plan: Plan) -> None:
        self._follow_the_user()
        self.check()
        for entry in self.entries:
            entry.tensor = plan.tensors[entry.name]
        self._quantizer = _quantizer(self.entries)
        self._quantize()

    def check(self) -> None:
        """Raise `WeightError` if a weight had NaN or Inf in a step on a GPU; this waits for the device."""
        self._quantizer.check()

    @torch.no_grad()
    def _quantize(self) -> None:
        """Full-precision weights → quantized weights in the model."""
        self._quantizer([_full(e) for e in self.entries], [e.parameter for e in self.entries])
        for entry in self.entries:
            entry.version = _version(entry.parameter)

    @torch.no_grad()
    def _show_full_precision(self) -> None:
        _copy_all([_full(e) for e in self.entries], [e.parameter for e in self.entries])

    @torch.no_grad()
    def _take_full_precision(self) -> None:
        _copy_all([e.parameter for e in self.entries], [_full(e) for e in self.entries])

    @torch.no_grad()
    def _follow_the_user(self) -> None:
        for place, entry in enumerate(self.entries):
            entry.follow_the_user(self._quantizer, place)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for entry in self.entries:
            if id(entry.parameter) not in held:
                raise AttachError(
                    f"{entry.name}: is no longer in the {type(optimizer).__name__} that it was attached to; detach "
                    f"before changing an optimizer's parameters, and attach again"
                )
        self._follow_the_user()
        self._show_full_precision()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if callable(closure):
            rest = {name: value for name, value in kwargs.items() if name != "closure"}
            return (args[0], self._at_quantized(closure), *args[2:]), rest
        return None

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._take_full_precision()
        self._quantize()

    def _at_quantized(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, run on the quantized form of whatever weights the optimizer has got to."""

        def run() -> Any:
            self._take_full_precision()
            self._quantize()
            result = closure()  # if it raises, the model is left as it is between steps: quantized
            self._show_full_precision()
            return result

        return run

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self.check()
        state_dict[STATE_KEY] = _state(self.kept)

    def _load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Full-precision weights from a state; a state without them leaves the ones that are there."""
        if STATE_KEY in state_dict:
            _check_state(state_dict[STATE_KEY], self.kept)
            self.load(state_dict[STATE_KEY])

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """The full-precision weights of a state that `_check_state` found to fit."""
        for entry in self.kept:
            _full(entry).copy_(state["weights"][entry.name])
        for entry in self.frozen:
            entry.restore()
            entry.quantize_once()
        self._quantize()
        self.check()


def _state(entries: Iterable[_Entry]) -> dict[str, Any]:
    """What a checkpoint keeps."""
    return {
        "version": 1,
        "plan": {e.name: dataclasses.asdict(e.tensor) for e in entries},
        "weights": {e.name: _full(e) for e in entries},
    }


def _check_state(state: dict[str, Any], entries: Iterable[_Entry]) -> None:
    """Raise `AttachError` unless a state was saved with the plan of these entries."""
    mine = {e.name: dataclasses.asdict(e.tensor) for e in entries}
    if state.get("version") != 1:
        raise AttachError(
            f"the optimizer's state has clipq state of version {state.get('version')!r}; this clipq reads version 1: "
            f"use the clipq that wrote it"
        )
    theirs = state["plan"]
    differences = [
        f"{name}: {mine.get(name, 'not planned')} here, {theirs.get(name, 'not planned')} in the state"
        for name in [*mine, *(n for n in theirs if n not in mine)]
        if _plain(mine.get(name)) != _plain(theirs.get(name))
    ]
    if differences:
        raise AttachError(
            "the optimizer's state was saved under another plan:\n  "
            + "\n  ".join(differences)
            + f"\nAttach with the plan of the saved run, or delete {STATE_KEY!r} from the state to start from the "
            f"model's weights"
        )


class _Guard:
    """Knows every attached parameter, and stops any other optimizer from stepping it."""

    @dataclass(frozen=True)
    class _Owner:
        name: str
        optimizer: weakref.ref[Optimizer] | None  # None: the parameter was frozen

    def __init__(self) -> None:
        self._owners: MutableMapping[Tensor, _Guard._Owner] = WeakIdKeyDictionary()
        self._handle: RemovableHandle | None = None

    def refuse_second(self, entry: _Entry) -> None:
        owner = self._owners.get(entry.parameter)
        if owner is None:
            return
        living = owner.optimizer() if owner.optimizer is not None else None
        if living is not None or owner.optimizer is None:
            to_what = f"a {type(living).__name__}" if living is not None else "no optimizer, as a frozen parameter"
            raise AttachError(
                f"{entry.name}: is attached already, to {to_what}; call detach() on that attachment before "
                f"attaching again"
            )

    def add(self, states: list[_AttachedOptimizer], frozen: list[_Entry]) -> None:
        for state in states:
            for entry in state.entries:
                self._owners[entry.parameter] = self._Owner(entry.name, state._optimizer)
        for entry in frozen:
            self._owners[entry.parameter] = self._Owner(entry.name, None)
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._before_any_step)

    def remove(self, entries: Iterable[_Entry]) -> None:
        for entry in entries:
            self._owners.pop(entry.parameter, None)
        if not len(self._owners) and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _before_any_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owner = self._owners.get(parameter)
                if owner is None or (owner.optimizer is not None and owner.optimizer() is optimizer):
                    continue
                if owner.optimizer is None:
                    if parameter.grad is None:
                        continue
                    what = "was frozen when it was attached, and is now trained by"
                elif owner.optimizer() is None:
                    what = "was attached to an optimizer that is gone, and is now stepped by"
                else:
                    what = "is attached to another optimizer, and is now stepped by"
                raise AttachError(
                    f"{owner.name}: {what} a {type(optimizer).__name__} that clipq is not attached to; its quantized "
                    f"weights would be trained as if they were full-precision ones. Call detach() on the attachment, "
                    f"then attach the optimizer in use"
                )


_guard = _Guard()


def _full(entry: _Entry) -> Tensor:
    assert entry.full is not None
    return entry.full


def _quantizer(entries: Iterable[_Entry]) -> Quantizer:
    return Quantizer([QuantizerEntry(e.name, e.tensor.pruning_rate, e.tensor.bits) for e in entries])


def _copy_all(sources: list[Tensor], targets: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_([local_of(t) for t in targets], [local_of(t) for t in sources])
        mark_written(targets)


def _version(parameter: Tensor) -> tuple[int, ...]:
    """Counts the writes to a parameter; those to a DTensor, and those to the part of it that is here."""
    return (parameter._version, local_of(parameter)._version) if is_distributed(parameter) else (parameter._version,)


def _shape(tensor: TensorPlan | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _plain(tensor: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if tensor is None else {**tensor, "shape": tuple(tensor["shape"])}


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


def _owner(entry: _Entry, optimizers: list[Optimizer]) -> Optimizer | None:
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
