"""Tensors that are split over processes (``torch.distributed.tensor.DTensor``), as the operator sees them.

The operator needs counts and sums of the whole tensor. Both are of integers, so it does not matter which process has
which elements, nor in what order they are added up, only that each element is in one process of a group: a shard along
any dimension, of any length, even empty.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from clipq.errors import WeightError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Reduction:
    """Adds up over the processes that a tensor is split over.

    Attributes:
        groups: the process groups, one for each dimension of the mesh that the tensor is split along.
        device: where they can communicate.
    """

    groups: tuple[Any, ...]
    device: torch.device

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all processes; all of them must call it, with tensors of one shape and dtype."""
        return self._all_reduce(numbers, torch.distributed.ReduceOp.SUM)

    def max(self, numbers: Tensor) -> Tensor:
        """The maximum over all processes, likewise."""
        return self._all_reduce(numbers, torch.distributed.ReduceOp.MAX)

    def _all_reduce(self, numbers: Tensor, operation: Any) -> Tensor:
        result = numbers.to(self.device, copy=True)
        for group in self.groups:
            torch.distributed.all_reduce(result, operation, group=group)
        return result.to(numbers.device)


class Part(NamedTuple):
    """What this process has of a tensor.

    Attributes:
        local: the elements that are here.
        total: the number of elements in all processes.
        reduction: None if everything is here.
    """

    local: Tensor
    total: int
    reduction: Reduction | None


def is_distributed(tensor: object) -> TypeGuard[DTensor]:
    """Whether this is a DTensor; does not import what makes one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """The elements of a tensor that are in this process, in the same memory; call it without gradients."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def part_of(tensor: Tensor, name: str) -> Part:
    """What this process has of a tensor; call it without gradients.

    Raises:
        WeightError: the tensor is placed in a way that leaves its values unknown here, such as Partial.
    """
    if not is_distributed(tensor):
        return Part(tensor, tensor.numel(), None)
    for placement in tensor.placements:
        if not placement.is_shard() and not placement.is_replicate():
            raise WeightError(
                f"{name}: is a DTensor placed as {placement}; accepted are Shard(dim) and Replicate(). Redistribute it "
                f"first, or leave it out of the plan"
            )
    mesh = tensor.device_mesh
    split = [dim for dim, placement in enumerate(tensor.placements) if placement.is_shard() and mesh.size(dim) > 1]
    groups = tuple(mesh.get_group(dim) for dim in split)
    local = tensor.to_local()
    if not groups:
        return Part(local, tensor.numel(), None)
    device = local.device if local.device.type == mesh.device_type else _current(mesh.device_type)
    return Part(local, tensor.numel(), Reduction(groups, device))


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd, and whoever looks at versions, that something wrote to the local parts of these."""
    written = [tensor for tensor in tensors if is_distributed(tensor)]
    if written:
        torch.autograd.graph.increment_version(written)


def _current(device_type: str) -> torch.device:
    return torch.device(device_type, torch.get_device_module(device_type).current_device())
