"""The tensors that a search chooses for: each alone, but all biases and other vectors as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from clipq.errors import SearchError
from clipq.operator import Quantizer, QuantizerEntry
from clipq.plan import Plan, TensorPlan

VECTORS = "(vectors)"


@dataclass(frozen=True)
class Theta:
    """θ of the paper: a pruning rate and a bit width."""

    pruning_rate: float
    bits: int


@dataclass(frozen=True)
class Group:
    """Tensors that share one θ.

    Attributes:
        name: of the one tensor, or `VECTORS`.
        tensors: their parameter names.
        shapes: of the tensors.
    """

    name: str
    tensors: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    size: int

    def entries(self, theta: Theta) -> list[QuantizerEntry]:
        return [QuantizerEntry(name, theta.pruning_rate, theta.bits) for name in self.tensors]

    def plan(self, theta: Theta) -> dict[str, TensorPlan]:
        return {
            name: TensorPlan(shape, theta.pruning_rate, theta.bits)
            for name, shape in zip(self.tensors, self.shapes, strict=True)
        }


def groups_of(model: nn.Module, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> tuple[Group, ...]:
    """What there is to choose for, in the model's order: what `Plan.uniform` would compress.

    Raises:
        PlanError: as `Plan.uniform` does.
        SearchError: a tensor has no elements.
    """
    plan = Plan.uniform(model, pruning_rate=0.0, bits=8, include=include, exclude=exclude)
    parameters = dict(model.named_parameters())
    groups: list[Group] = []
    vectors: list[str] = []
    for name, tensor in plan.tensors.items():
        if parameters[name].numel() == 0:
            raise SearchError(f"{name} has no elements: there is nothing to search for. Leave it out with exclude=")
        if len(tensor.shape) > 1:
            groups.append(_group(name, [name], parameters))
        else:
            vectors.append(name)
    if vectors:
        groups.append(_group(vectors[0] if len(vectors) == 1 else VECTORS, vectors, parameters))
    return tuple(groups)


def plan_of(groups: Sequence[Group], thetas: Sequence[Theta]) -> Plan:
    """The plan that gives every group its θ."""
    tensors: dict[str, TensorPlan] = {}
    for group, theta in zip(groups, thetas, strict=True):
        tensors |= group.plan(theta)
    return Plan(tensors)


def thetas_of(groups: Sequence[Group], plan: Plan) -> tuple[Theta, ...]:
    """The inverse of `plan_of`."""
    first = [plan.tensors[group.tensors[0]] for group in groups]
    return tuple(Theta(tensor.pruning_rate, tensor.bits) for tensor in first)


def quantize_group(group: Group, theta: Theta, weights: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
    """Write the quantized form of the group's weights to its tensors in ``out``."""
    quantizer = Quantizer(group.entries(theta))
    quantizer([weights[n] for n in group.tensors], [out[n] for n in group.tensors])
    quantizer.check()


def _group(name: str, tensors: list[str], parameters: Mapping[str, Tensor]) -> Group:
    shapes = tuple(tuple(parameters[t].shape) for t in tensors)
    return Group(name, tuple(tensors), shapes, sum(parameters[t].numel() for t in tensors))
