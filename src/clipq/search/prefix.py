"""Keep the activations before a changed layer, so that evaluations which differ in that layer do not repeat them.

While the cache is active, a module that was through before the layer was first reached gives back what it gave the
first time. A module that contains the layer is run, and so is everything after the layer. Of an output that goes only
into modules which are not run, the shape alone is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass
class _Output:
    tensor: Tensor
    version: int  # of the module's own output when it was given
    original: Tensor | None  # None where torch does not count versions
    written: bool = False  # what follows writes into it: every use needs a copy
    needed: bool = True  # other than by modules that are not run

    def nbytes(self) -> int:
        return self.tensor.nbytes if self.needed else 0

    def drop_unneeded(self) -> None:
        if not self.needed:
            self.tensor = self.tensor.new_zeros(()).expand(self.tensor.shape)


@dataclass
class _Run:
    """One run of the model: what the modules gave that ended before the layer, call by call."""

    first: nn.Module
    first_input: Tensor
    outputs: dict[nn.Module, list[_Output | None]] = field(default_factory=dict)  # None: this call is to be run

    def nbytes(self) -> int:
        kept = (output for outputs in self.outputs.values() for output in outputs if output)
        return self.first_input.nbytes + sum(output.nbytes() for output in kept)


class PrefixCache:
    """The activations before the modules that hold some parameters.

    The first evaluation under `active` records; the later ones use what was recorded. A run whose first module is
    given another input than in the record is computed.

    Args:
        model: the ``forward`` of its modules is replaced while the cache is active, on these instances only.
        parameters: names of the parameters that change.
        memory: the most bytes of activations to keep; what is beyond is computed again.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[str], memory: int) -> None:
        self._model = model
        self._memory = memory
        self._changed = [model.get_parameter(name) for name in parameters]
        self._runs: list[_Run] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Record, or use what was recorded, in the model's runs within."""
        if any(isinstance(m, torch.jit.ScriptModule) for m in self._model.modules()):
            yield  # a script's forward cannot be replaced
        elif self._runs is None:
            with _Recorder(self._model, self._changed, self._memory) as recorder, _Uses(self._changed, recorder):
                yield
            self._runs = recorder.runs
        else:
            with self._replaying(self._runs):
                yield

    def kept_bytes(self) -> int:
        """Of the activations, and of the inputs that they belong to."""
        return sum(run.nbytes() for run in self._runs or [])

    @contextmanager
    def _replaying(self, runs: list[_Run]) -> Iterator[None]:
        number = -1
        calls: dict[nn.Module, int] = defaultdict(int)
        same = True

        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal number, same
            number, same = number + 1, True
            calls.clear()

        def replayed(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal same
                if not 0 <= number < len(runs):
                    return forward(*args, **kwargs)
                record, n = runs[number], calls[module]
                calls[module] += 1
                if module is record.first and n == 0:
                    same = bool(args) and isinstance(args[0], Tensor) and _same(args[0], record.first_input)
                outputs = record.outputs.get(module, [])
                output = outputs[n] if same and n < len(outputs) else None
                if output is None:
                    return forward(*args, **kwargs)
                return output.tensor.clone() if output.written else output.tensor

            return run

        recorded = {module for record in runs for module in record.outputs}
        handle = self._model.register_forward_pre_hook(begin)
        for module in recorded:
            module.forward = replayed(module, module.forward)
        try:
            yield
        finally:
            handle.remove()
            for module in recorded:
                del module.forward


class _Uses(TorchFunctionMode):
    """Tells a recorder when one of some parameters is used."""

    def __init__(self, parameters: Sequence[Tensor], recorder: _Recorder) -> None:
        super().__init__()
        self._ids = {id(parameter) for parameter in parameters}
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        used = [id(tensor) for tensor in _tensors((args, kwargs))]
        self._recorder.reached |= any(of in self._ids for of in used)
        self._recorder.uses(used)
        return func(*args, **kwargs)


@dataclass
class _Call:
    """A module's call under way."""

    module: nn.Module
    began: int
    given: list[tuple[Tensor, int | Tensor]]  # each with its version, or what it held where torch counts none
    attributes: dict[str, Any]
    plain: bool = True  # gives an output and does nothing else

    @classmethod
    def of(cls, module: nn.Module, given: Iterator[Tensor], began: int) -> _Call:
        seen = [(t, t.clone() if t.is_inference() else t._version) for t in given]
        return cls(module, began, seen, dict(vars(module)))

    def ended(self, output: object) -> bool:
        """Whether its output can stand for the call."""
        now = vars(self.module)
        hooks = len(self.module._forward_hooks) + len(self.module._forward_pre_hooks)
        self.plain &= hooks == 2 and list(now) == list(self.attributes)  # two of them are ours
        self.plain &= all(now[name] is value for name, value in self.attributes.items())
        return (
            self.plain
            and isinstance(output, Tensor)
            and not any(_written(tensor, then) or _share(tensor, output) for tensor, then in self.given)
        )


class _Recorder:
    """Records, in each run of the model, the outputs of the modules that end before changed parameters are used.

    Attributes:
        reached: whether they have been used in this run.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor], memory: int) -> None:
        self._model, self._left = model, memory
        ids = {id(parameter) for parameter in parameters}
        # Extensions written in C++ are not seen when they use a tensor, but most are called by a module of their own.
        leaves = [module for module in model.modules() if not module._modules]
        self._changed = {module for module in leaves if any(id(p) in ids for p in module._parameters.values())}
        self._handles: list[Any] = []
        self._stack: list[_Call] = []
        self._entered = 0
        self._ended: list[tuple[nn.Module, int, Tensor | None, _Output | None]] = []
        self._given: dict[int, _Output] = {}  # by the id of the module's own output
        self._used: list[tuple[int, _Output]] = []  # and how many calls had begun then
        self.reached = False
        self.runs: list[_Run] = []

    def __enter__(self) -> _Recorder:
        for module in self._model.modules():
            self._handles.append(module.register_forward_pre_hook(_unseen(self._enter), with_kwargs=True))
            self._handles.append(module.register_forward_hook(_unseen(self._leave)))
        return self

    def __exit__(self, kind: type[BaseException] | None, *of: object) -> None:
        for handle in self._handles:
            handle.remove()
        if kind is not None:
            self.runs = []

    def uses(self, tensors: Sequence[int]) -> None:
        """Tensors with these ids are used by a function of torch."""
        self._used += [(self._entered, self._given[of]) for of in tensors if of in self._given]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self._model:
            self._stack, self._ended, self._entered, self.reached = [], [], 0, False
            self._given, self._used = {}, []
        elif not self._stack:
            return  # a part of the model, run alone
        self.reached |= module in self._changed
        if self.reached:
            self.uses([id(tensor) for tensor in _tensors((args, kwargs))])
        self._stack.append(_Call.of(module, _tensors((args, kwargs)), self._entered))
        self._entered += 1

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._stack:
            return
        call = self._stack.pop()
        stands = call.ended(output)
        if self._stack:
            self._stack[-1].plain &= call.plain
        if not stands and not module._modules:  # it will be run again
            self.uses([id(tensor) for tensor, _ in call.given])
        if module is self._model:
            self.uses([id(tensor) for tensor in _tensors(output)])
            self._end_of_run()
        elif not self.reached:
            first = args[0] if args and isinstance(args[0], Tensor) else None
            kept = None
            if stands:  # for its parts, too
                self._ended = [entry for entry in self._ended if entry[1] < call.began]
                self._used = [use for use in self._used if use[0] <= call.began]
                seen = None if output.is_inference() else output
                kept = _Output(output.detach().clone(), 0 if seen is None else seen._version, seen)
                self._given[id(output)] = kept
            self._ended.append((module, call.began, first, kept))

    def _end_of_run(self) -> None:
        """Keep the run if there is room for it; the runs are kept from the first one on."""
        ended, self._ended = self._ended, []
        if not self.reached or not ended or self._left <= 0:
            self._left = 0
            return
        first, _, first_input, _ = min(ended, key=lambda entry: entry[1])
        if first_input is None:
            self._left = 0
            return
        needed = {id(output) for _, output in self._used}
        run = _Run(first, first_input.detach().clone())
        for module, _, _, output in ended:
            if output is not None:
                output.needed = id(output) in needed
                output.drop_unneeded()
                output.written = output.original is None or output.original._version != output.version
                output.original = None  # only its version was wanted
            run.outputs.setdefault(module, []).append(output)
        self._left -= run.nbytes()
        if self._left >= 0:
            self.runs.append(run)


def _unseen(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook whose own uses of tensors are not seen."""

    def run(*args: Any) -> None:
        with torch._C.DisableTorchFunction():
            hook(*args)

    return run


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _written(tensor: Tensor, then: int | Tensor) -> bool:
    return not _same(tensor, then) if isinstance(then, Tensor) else tensor._version != then


def _share(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
