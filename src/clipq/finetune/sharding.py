"""Weights that are split over the processes (FSDP2): which modules are units of it, whole tensors from parts and back.

Networks and states without split tensors go through unchanged.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


def shard(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split a network's parameters over the processes, in place: each block of its sequences is gathered by itself."""
    for module in network.modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            for block in module:
                if any(True for _ in block.parameters()) and not isinstance(block, nn.Sequential | nn.ModuleList):
                    fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(network, mesh=mesh["data_parallel"])
    return network


def gathered(state: Any) -> Any:
    """A state with every split tensor whole; all processes must ask at once."""
    return tree_map(lambda value: value.full_tensor() if isinstance(value, DTensor) else value, state)


def scattered(state: Any, like: Tensor) -> Any:
    """A state with every tensor of a split parameter's shape split as that is; the others stay whole."""
    if not isinstance(like, DTensor):
        return state

    def split(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != like.shape or isinstance(value, DTensor):
            return value
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    return tree_map(split, state)
