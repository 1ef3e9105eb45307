"""The hooks on an optimizer that swap full-precision and quantized weights around its steps."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from clipq.errors import AttachError
from clipq.operator import Quantizer, QuantizerEntry
from clipq.operator.split import is_distributed, local_of, mark_written
from clipq.plan import Plan, TensorPlan

STATE_KEY = "clipq"
"""The key that `attach` adds to ``optimizer.state_dict()``: the full-precision weights and their plan."""


class Entry:
    """One planned parameter, its full-precision weights, and how it was left after the last step."""

    def __init__(self, name: str, parameter: nn.Parameter, tensor: TensorPlan) -> None:
        self.name = name
        self.parameter = parameter
        self.tensor = tensor
        self.full: Tensor | None = None
        self.version: tuple[int, ...] = ()
        self._aside: Tensor | None = None

    def quantize_once(self) -> None:
        self.full = self.parameter.detach().clone()
        quantizer = _quantizer([self])
        quantizer([self.full], [self.parameter])
        quantizer.check()

    def restore(self) -> None:
        if self.full is not None:
            self.parameter.detach().copy_(self.full)

    def show(self) -> bool:
        """Give the parameter the memory of the full-precision weights, without a copy; False if that cannot be done.

        It cannot where others know the parameter by its memory: other processes, or a buffer that it is a piece of.
        """
        parameter, full = self.parameter, full_of(self)
        if not _has_its_own_memory(parameter) or parameter.stride() != full.stride():
            return False
        self._aside = parameter.data
        parameter.data = full
        return True

    def take(self) -> bool:
        """Undo `show`; False if the full-precision weights were copied instead."""
        if self._aside is None:
            return False
        parameter, full = self.parameter, full_of(self)
        if parameter.data_ptr() != full.data_ptr():  # an optimizer that gives its parameters new memory
            full.copy_(parameter)
        parameter.data, self._aside = self._aside, None
        return True

    def follow_the_user(self, quantizer: Quantizer, place: int) -> None:
        """Take over what the user did to the parameter since the last step: moved it, or wrote new weights.

        Processes that the parameter is split over need not agree on whether it was written to.

        Args:
            quantizer: quantized the parameter last, as its entry ``place``.
        """
        parameter = self.parameter
        full = full_of(self)
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
        here, kept, now = (local_of(tensor) for tensor in (was, full_of(self), parameter))
        kept.copy_(torch.where(now != here, now, kept))


class AttachedOptimizer:
    """The hooks on one optimizer, and the full-precision weights that they swap in and out.

    Args:
        entries: the optimizer's own.
        frozen: entries in no optimizer, whose full-precision weights go into this one's state; ``kept`` are both.
    """

    def __init__(self, optimizer: Optimizer, entries: list[Entry], frozen: list[Entry]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.entries = entries
        self.frozen = frozen
        self.kept = [*entries, *frozen]
        self._quantizer = _quantizer(entries)
        for entry in entries:
            entry.full = entry.parameter.detach().clone()
        self._handles: list[RemovableHandle] = []
        self._is_shown = False  # the parameters hold full-precision weights
        self._step: FrameType | None = None  # the call of the step that is under way, or that raised
        try:
            self._quantize()
            self.check()
        except BaseException:
            self._restore()
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
        try:
            if keep_quantized:
                self._end_step()
            else:
                self._restore()
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            for entry in self.entries:
                entry.full = None

    def replan(self, plan: Plan) -> None:
        self._end_step()
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
        self._quantizer([full_of(e) for e in self.entries], [e.parameter for e in self.entries])
        for entry in self.entries:
            entry.version = _version(entry.parameter)

    @torch.no_grad()
    def _restore(self) -> None:
        _copy_all([full_of(e) for e in self.entries], [e.parameter for e in self.entries])

    @torch.no_grad()
    def _show_full_precision(self) -> None:
        rest = [entry for entry in self.entries if not entry.show()]
        _copy_all([full_of(e) for e in rest], [e.parameter for e in rest])
        self._is_shown = True

    @torch.no_grad()
    def _take_full_precision(self) -> None:
        self._is_shown = False
        rest = [entry for entry in self.entries if not entry.take()]
        _copy_all([e.parameter for e in rest], [full_of(e) for e in rest])

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
        here = sys._getframe(1)
        if self._step is not None and self._step in _callers(here):
            return None  # an optimizer whose step calls that of its base class
        self._end_step()
        self._follow_the_user()
        self._show_full_precision()
        self._step = here
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if callable(closure):
            rest = {name: value for name, value in kwargs.items() if name != "closure"}
            return (args[0], self._at_quantized(closure), *args[2:]), rest
        return None

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._step is sys._getframe(1):
            self._end_step()

    def _end_step(self) -> None:
        """Quantize what a step made of the weights, also one that raised."""
        self._step = None
        if self._is_shown:
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
        state_dict[STATE_KEY] = state_of(self.kept)

    def _load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Full-precision weights from a state; a state without them leaves the ones that are there."""
        if STATE_KEY in state_dict:
            check_state(state_dict[STATE_KEY], self.kept)
            self.load(state_dict[STATE_KEY])

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """The full-precision weights of a state that `check_state` found to fit."""
        self._end_step()
        for entry in self.kept:
            full_of(entry).copy_(state["weights"][entry.name])
        for entry in self.frozen:
            entry.restore()
            entry.quantize_once()
        self._quantize()
        self.check()


def state_of(entries: Iterable[Entry]) -> dict[str, Any]:
    """What a checkpoint keeps."""
    return {
        "version": 1,
        "plan": {e.name: dataclasses.asdict(e.tensor) for e in entries},
        "weights": {e.name: full_of(e) for e in entries},
    }


def check_state(state: dict[str, Any], entries: Iterable[Entry]) -> None:
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


def full_of(entry: Entry) -> Tensor:
    assert entry.full is not None
    return entry.full


def _quantizer(entries: Iterable[Entry]) -> Quantizer:
    return Quantizer([QuantizerEntry(e.name, e.tensor.pruning_rate, e.tensor.bits) for e in entries])


def _copy_all(sources: list[Tensor], targets: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_([local_of(t) for t in targets], [local_of(t) for t in sources])
        mark_written(targets)


def _has_its_own_memory(parameter: Tensor) -> bool:
    """Whether nothing else can know the parameter by its memory, but for aliases that are looked at between steps."""
    if type(parameter.data) is not Tensor:
        return False
    storage = parameter.untyped_storage()
    is_shared = storage.device.type == "cpu" and storage.is_shared()
    return storage.nbytes() == parameter.numel() * parameter.itemsize and not is_shared


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _version(parameter: Tensor) -> tuple[int, ...]:
    """Counts the writes to a parameter; those to a DTensor, and those to the part of it that is here."""
    return (parameter._version, local_of(parameter)._version) if is_distributed(parameter) else (parameter._version,)


def _plain(tensor: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if tensor is None else {**tensor, "shape": tuple(tensor["shape"])}
