"""Evaluate a model with some tensors quantized, and leave it as it was."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clipq.errors import ClipqError, SearchError
from clipq.plan import Plan
from clipq.search.groups import Group, Theta, quantize_group
from clipq.search.prefix import PrefixCache

Evaluate = Callable[[nn.Module], float | Iterator[float]]
"""Gives the model's cost, lower is better: an error, a loss. It must leave the model's tensors as they are, and give
the same cost for the same tensors. A generator may yield lower bounds of the cost as it goes, and last the cost itself:
then an evaluation that can only lose is stopped."""

Recover = Callable[[nn.Module, Plan, int], Plan | None]
"""Fine-tunes the model for a few steps under a plan and leaves it quantized. Its last argument is the most bytes that
the file may have (`SizeHolder` keeps them); it gives the plan that it ended with, if that is another one."""


class Evaluator:
    """Runs ``evaluate`` on one model at any θ; between calls the model has its own full-precision weights.

    Args:
        model: used in place.
        evaluate: see `Evaluate`.
        memory: the most bytes of activations to keep between evaluations.
    """

    def __init__(self, model: nn.Module, evaluate: Evaluate, memory: int) -> None:
        self.model = model
        self.count = 0
        self._evaluate = evaluate
        self._memory = memory
        self._tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.weights = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        self._prefix: tuple[str, tuple[object, ...], PrefixCache] | None = None

    def restore(self) -> None:
        """Put the full-precision weights, and the buffers, back."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(self.weights[name])

    def at(
        self,
        groups: Sequence[Group],
        thetas: Sequence[Theta | None],
        *,
        changing: int | None = None,
        ceiling: float = math.inf,
    ) -> float:
        """The cost with each group at its θ; None leaves it in full precision.

        Args:
            changing: the group that the next evaluations differ in alone: what is computed before it is kept.
            ceiling: a cost that is as good as any higher one: a generator is stopped once its bound is above it.

        Raises:
            SearchError: ``evaluate`` raised, gave no finite number, or changed the model's tensors.
        """
        what = ", ".join(
            f"{g.name} at p={t.pruning_rate:.4g}, b={t.bits}" for g, t in zip(groups, thetas, strict=True) if t
        )
        with self._quantized(groups, thetas):
            if changing is None:
                return self._call(self._evaluate, what, ceiling)
            others = tuple(theta for i, theta in enumerate(thetas) if i != changing)
            with self._unchanged_before(groups[changing], others):
                return self._call(self._evaluate, what, ceiling)

    def recovered(self, plan: Plan, recover: Recover, file_bytes: int) -> tuple[float, Plan]:
        """The cost after ``recover`` under a plan, and the plan it ended with.

        Raises:
            SearchError: as in `at`; or ``recover`` raised.
        """
        with self._recovered(plan, recover, file_bytes) as ended:
            return self._call(self._evaluate, "the plan, after recover", math.inf), ended

    def of_plan(self, plan: Plan, recover: Recover | None, file_bytes: int) -> float:
        """The cost under a plan; after ``recover``, if there is one."""
        if recover is not None:
            return self.recovered(plan, recover, file_bytes)[0]
        groups, thetas = _single_groups(plan)
        return self.at(groups, thetas)

    def validated(
        self, validate: Evaluate | None, plan: Plan | None = None, recover: Recover | None = None, file_bytes: int = 0
    ) -> float:
        """What ``validate`` (or else ``evaluate``) gives for the model, or under a plan, after ``recover`` if any."""
        check = validate or self._evaluate
        if plan is None:
            return self._call(check, "", math.inf)
        if recover is not None:
            with self._recovered(plan, recover, file_bytes):
                return self._call(check, "the plan, after recover", math.inf)
        with self._quantized(*_single_groups(plan)):
            return self._call(check, "the plan", math.inf)

    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors, as they are now."""
        return dict(self._tensors)

    @contextmanager
    def _quantized(self, groups: Sequence[Group], thetas: Sequence[Theta | None]) -> Iterator[None]:
        try:
            with torch.no_grad():
                for group, theta in zip(groups, thetas, strict=True):
                    if theta is not None:
                        quantize_group(group, theta, self.weights, self._tensors)
            yield
        finally:
            self.restore()

    @contextmanager
    def _recovered(self, plan: Plan, recover: Recover, file_bytes: int) -> Iterator[Plan]:
        try:
            try:
                ended = recover(self.model, plan, file_bytes) or plan
            except ClipqError:
                raise
            except Exception as cause:
                raise SearchError(f"recover raised {type(cause).__name__}: {cause}") from cause
            yield ended
        finally:
            self.restore()

    def _call(self, evaluate: Evaluate, what: str, ceiling: float) -> float:
        self.count += 1
        what = what or "the model as it is"
        training = {name: module.training for name, module in self.model.named_modules()}
        versions = {name: (tensor, tensor._version) for name, tensor in self._live().items()}
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}  # torch's norms do not count
        try:
            with torch.no_grad():
                value = _value(evaluate(self.model), ceiling)
        except ClipqError:
            raise
        except Exception as cause:
            raise SearchError(f"evaluate raised {type(cause).__name__} for {what}: {cause}") from cause
        finally:
            for name, module in self.model.named_modules():
                module.training = training.get(name, module.training)
        now = self._live()
        changed = [n for n, (t, version) in versions.items() if now.get(n) is not t or version != t._version]
        changed += [name for name in now if name not in versions]
        changed += [n for n, was in buffers.items() if n in now and n not in changed and not torch.equal(was, now[n])]
        if changed:
            self._put_back(versions)
            raise SearchError(
                f"evaluate changed the model: {', '.join(changed[:5])}{' and others' if len(changed) > 5 else ''}. The "
                f"weights are restored; evaluate in eval mode, without training steps"
            )
        if not isinstance(value, int | float) or math.isnan(value):
            raise SearchError(
                f"evaluate gave {value!r} for {what}; it must give a number, lower for a better model. Give a large "
                f"finite number where the cost is not defined"
            )
        return float(value)

    def _put_back(self, tensors: Mapping[str, tuple[Tensor, int]]) -> None:
        """Parameters and buffers that were replaced by other objects."""
        for name, (tensor, _) in tensors.items():
            path, _, own = name.rpartition(".")
            module = self.model.get_submodule(path)
            (module._parameters if own in module._parameters else module._buffers)[own] = tensor  # type: ignore[assignment]

    def _live(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    @contextmanager
    def _unchanged_before(self, group: Group, others: tuple[object, ...]) -> Iterator[None]:
        """Within: modules that come before the group's are not computed again while all other groups stay the same."""
        if self._prefix is None or self._prefix[:2] != (group.name, others):
            self._prefix = (group.name, others, PrefixCache(self.model, group.tensors, self._memory))
        with self._prefix[2].active():
            yield


def _value(result: object, ceiling: float) -> object:
    """What an evaluation came to; of a generator the last value, or the first bound above the ceiling."""
    if not inspect.isgenerator(result):
        return result.item() if isinstance(result, Tensor) and result.numel() == 1 else result
    value: object = None
    for value in result:
        if isinstance(value, int | float) and value > ceiling:
            break
    result.close()
    return value


def _single_groups(plan: Plan) -> tuple[list[Group], list[Theta]]:
    groups = [Group(name, (name,), (tuple(t.shape),), math.prod(t.shape)) for name, t in plan.tensors.items()]
    return groups, [Theta(t.pruning_rate, t.bits) for t in plan.tensors.values()]
