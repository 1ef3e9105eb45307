"""Evaluate a model with some tensors quantized, and leave it as it was."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clipq.errors import ClipqError, SearchError
from clipq.plan import Plan
from clipq.search.groups import Group, Theta, quantize_group
from clipq.search.prefix import PrefixCache
from clipq.search.state import ModelState, tensors_of

Evaluate = Callable[[nn.Module], float | Iterator[float]]
"""Gives the model's cost, lower is better: an error, a loss; a finite number. It must leave the model's tensors as they
are (or put back what they held), and give the same cost for the same tensors. A generator may yield lower bounds of the
cost as it goes, and last the cost itself: then an evaluation that can only lose is stopped."""

Recover = Callable[[nn.Module, Plan, int, float], Plan | None]
"""Fine-tunes the model for a few steps under a plan and leaves it quantized. Its further arguments are the most bytes
that the file may have (`SizeHolder` keeps them), and which share of its steps to take, above 0 and at most 1: less
where many plans are screened. It gives the plan that it ended with, of the same tensors, if that is another one."""


class Evaluator:
    """Runs ``evaluate`` on one model at any θ; between calls the model has its own full-precision weights.

    Args:
        model: used in place.
        evaluate: see `Evaluate`.
        memory: the most bytes of activations to keep between evaluations.
    """

    def __init__(self, model: nn.Module, evaluate: Evaluate, memory: int) -> None:
        self.model = model
        self._evaluate = evaluate
        self._memory = memory
        self._state = ModelState(model)
        self._tensors = tensors_of(model)
        self._prefix: tuple[str, tuple[object, ...], PrefixCache] | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The full-precision weights, and the buffers, by name."""
        return self._state.values

    def kept_bytes(self) -> int:
        """Of the activations that are kept now."""
        return 0 if self._prefix is None else self._prefix[2].kept_bytes()

    def restore(self) -> None:
        """Make the model what it was at first: its weights, buffers, modules and flags."""
        self._state.put_back(self._state.values)

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
            SearchError: ``evaluate`` raised, gave no finite number, or changed what the model's tensors hold.
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

    def of_plan(
        self,
        plan: Plan,
        recover: Recover | None,
        file_bytes: int,
        validate: Evaluate | None = None,
        *,
        share: float = 1.0,
    ) -> tuple[float, float | None, Plan]:
        """The cost under a plan, after ``recover`` if any; ``validate`` of the same weights; the plan it ended with.

        Args:
            share: of its steps that ``recover`` is to take.

        Raises:
            SearchError: as in `at`; or ``recover`` raised, replaced the model's tensors, or gave a plan of others.
        """
        what = "the plan" if recover is None else "the plan, after recover"
        with self._under(plan, recover, file_bytes, share) as ended:
            cost = self._call(self._evaluate, what, math.inf)
            score = None if validate is None else self._call(validate, what, math.inf, "validate")
        return cost, score, ended

    def validated(
        self, validate: Evaluate | None, plan: Plan | None = None, recover: Recover | None = None, file_bytes: int = 0
    ) -> float:
        """What ``validate`` (or else ``evaluate``) gives for the model, or under a plan, after ``recover`` if any."""
        check, name = (self._evaluate, "evaluate") if validate is None else (validate, "validate")
        with self._quantized((), ()) if plan is None else self._under(plan, recover, file_bytes, 1.0):
            return self._call(check, "" if plan is None else "the plan", math.inf, name)

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
    def _under(self, plan: Plan, recover: Recover | None, file_bytes: int, share: float) -> Iterator[Plan]:
        if recover is None:
            with self._quantized(*_single_groups(plan)):
                yield plan
            return
        try:
            try:
                ended = recover(self.model, plan, file_bytes, share)
            except ClipqError:
                raise
            except Exception as cause:
                raise SearchError(
                    f"recover raised {type(cause).__name__}: {cause}. The weights are restored; recover(model, plan, "
                    f"file_bytes, share) must train under any plan of the model"
                ) from cause
            self._check_own_tensors()
            yield plan if ended is None else _same_tensors(ended, plan)
        finally:
            self.restore()

    def _check_own_tensors(self) -> None:
        now = tensors_of(self.model)
        other = [name for name in {**self._tensors, **now} if now.get(name) is not self._tensors.get(name)]
        if other:
            raise SearchError(
                f"recover added, removed or replaced {_some(other)}. The model is restored; recover must train the "
                f"model's own parameters in place, and take off at the end whatever it put on"
            )

    def _call(self, evaluate: Evaluate, what: str, ceiling: float, name: str = "evaluate") -> float:
        what = what or "the model as it is"
        before = ModelState(self.model)
        try:
            with torch.no_grad():
                value = _value(evaluate(self.model), ceiling)
            changed = before.changed()
        except ClipqError:
            raise
        except Exception as cause:
            raise SearchError(
                f"{name} raised {type(cause).__name__} for {what}: {cause}. The weights are restored; {name}(model) "
                f"must give a number for any weights"
            ) from cause
        finally:
            before.put_back()
        if changed:
            raise SearchError(
                f"{name} changed the model: {_some(changed)}. The weights are restored; evaluate in eval mode, without "
                f"training steps"
            )
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise SearchError(
                f"{name} gave {value!r} for {what}; it must give a finite number, lower for a better model. Give a "
                f"large number where the cost is not defined"
            )
        return float(value)

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
        if isinstance(value, numbers.Real) and ceiling < float(value) < math.inf:
            break
    result.close()
    return value


def _same_tensors(ended: object, plan: Plan) -> Plan:
    """The plan that ``recover`` ended with, if it is one for the same tensors; raises `SearchError` if not."""
    if not isinstance(ended, Plan):
        raise SearchError(f"recover gave {ended!r}; it must give the clipq.Plan that it ended with, or None")
    shapes = [{name: tensor.shape for name, tensor in of.tensors.items()} for of in (plan, ended)]
    other = [name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)]
    if other:
        raise SearchError(
            f"recover gave a plan that differs in {_some(other)}; it may change pruning rates and bit widths, but "
            f"must keep the tensors and shapes of the plan that it was given"
        )
    return ended


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{' and others' if len(names) > 5 else ''}"


def _single_groups(plan: Plan) -> tuple[list[Group], list[Theta]]:
    groups = [Group(name, (name,), (tuple(t.shape),), math.prod(t.shape)) for name, t in plan.tensors.items()]
    return groups, [Theta(t.pruning_rate, t.bits) for t in plan.tensors.values()]
