"""Models whose tensors are split over processes: agreeing on a plan, and bringing tensors together for a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn

from clipq.errors import PlanError
from clipq.operator.split import is_distributed
from clipq.plan import Plan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Result = TypeVar("Result")


def reshard(model: nn.Module) -> None:
    """Have the parameters of `fully_shard` modules be the split ones, as they are outside forward and backward."""
    split_module = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)  # not imported for others
    if split_module is not None:
        for module in model.modules():
            if isinstance(module, split_module):
                module.reshard()


def check_same_plan(model: nn.Module, plan: Plan) -> None:
    """Compare the plans of all processes that a model's parameters are spread over; says nothing to others.

    All of those processes must call it. It does nothing for a model of plain tensors.

    Raises:
        PlanError: two of them have different plans; raised in all.
    """
    meshes = _meshes(model.parameters())
    if not meshes:
        return
    plans = {dist.get_rank(): {name: (t.pruning_rate, t.bits) for name, t in plan.tensors.items()}}
    for mesh in meshes:
        for group in mesh.get_all_groups():
            gathered: list[dict[int, Any]] = [{}] * dist.get_world_size(group)
            dist.all_gather_object(gathered, plans, group=group)
            plans = {rank: other for part in gathered for rank, other in part.items()}
    first, mine = min(plans.items())
    for rank, other in sorted(plans.items()):
        differences = [
            f"{name}: {_described(mine.get(name))} on rank {first}, {_described(other.get(name))} on rank {rank}"
            for name in {**mine, **other}
            if mine.get(name) != other.get(name)
        ]
        if differences:
            raise PlanError(
                "the processes that share the model's tensors have different plans:\n  "
                + "\n  ".join(differences[:10])
                + "\nGive every process the same plan"
            )


def is_split(tensors: Mapping[str, object]) -> bool:
    """Whether any of these tensors is spread over processes."""
    return any(is_distributed(tensor) for tensor in tensors.values())


def named_tensors(model: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A model's ``state_dict()``, with the parameters themselves, so that tied ones are one object."""
    return model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else model


def on_first_rank(tensors: Mapping[str, Tensor], work: Callable[[dict[str, Tensor]], Result]) -> Result:
    """Bring tensors together on the first process of their mesh, do something with them there, and tell all.

    One tensor at a time is whole in the other processes. All of them must call it.

    Args:
        work: is given the whole tensors, in main memory.

    Returns:
        What ``work`` returned, in every process.

    Raises:
        Exception: what ``work`` raised, in every process.
    """
    mesh = max(_meshes(tensors.values()), key=lambda mesh: mesh.size())
    is_first = not any(mesh.get_coordinate() or ())
    whole: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            full = tensor.full_tensor() if is_distributed(tensor) else tensor
            seen[id(tensor)] = full.detach().cpu() if is_first else full.new_empty(0)
        whole[name] = seen[id(tensor)]
    outcome: list[Any] = [None]
    if is_first:
        try:
            outcome = [(work(whole), None)]
        except Exception as error:
            outcome = [(None, error)]
    for group in mesh.get_all_groups():
        dist.broadcast_object_list(outcome, dist.get_global_rank(group, 0), group)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return cast(Result, result)


def like(target: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, split as another one is; all processes that share that one must call it."""
    if not is_distributed(target):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, target.device_mesh, target.placements)


def _meshes(tensors: Iterable[object]) -> list[DeviceMesh]:
    """The device meshes of tensors, each once, in their order."""
    return list(dict.fromkeys(tensor.device_mesh for tensor in tensors if is_distributed(tensor)))


def _described(planned: tuple[float, int] | None) -> str:
    return "not planned" if planned is None else f"pruning rate {planned[0]} and {planned[1]} bits"
