"""Keeps any other optimizer from stepping an attached parameter."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from clipq.attached import AttachedOptimizer, Entry
from clipq.errors import AttachError


class Guard:
    """Knows every attached parameter, and stops any other optimizer from stepping it."""

    @dataclass(frozen=True)
    class _Owner:
        name: str
        optimizer: weakref.ref[Optimizer] | None  # None: the parameter was frozen

    def __init__(self) -> None:
        self._owners: MutableMapping[Tensor, Guard._Owner] = WeakIdKeyDictionary()
        self._handle: RemovableHandle | None = None

    def refuse_second(self, entry: Entry) -> None:
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

    def add(self, states: list[AttachedOptimizer], frozen: list[Entry]) -> None:
        for state in states:
            for entry in state.entries:
                self._owners[entry.parameter] = self._Owner(entry.name, state._optimizer)
        for entry in frozen:
            self._owners[entry.parameter] = self._Owner(entry.name, None)
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._before_any_step)

    def remove(self, entries: Iterable[Entry]) -> None:
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


guard = Guard()
