"""Weights that are split over the processes (FSDP2): which modules are units of it, whole tensors from parts and back.

Networks and states without split tensors go through unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

_SEQUENCES = (nn.Sequential, nn.ModuleList)


def shard(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split a network's parameters over the processes, in place: each block of its sequences is gathered by itself."""
    for block in list(_blocks(network, sum(p.numel() for p in network.parameters()) // 2)):
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(network, mesh=mesh["data_parallel"])
    return network


def _blocks(module: nn.Module, most: int) -> Iterator[nn.Module]:
    """The outermost elements of sequences; what has more weights than ``most`` is a block only if nothing is in it."""
    for child in module.children():
        size = sum(p.numel() for p in child.parameters())
        is_block = isinstance(module, _SEQUENCES) and not isinstance(child, _SEQUENCES)
        if is_block and size and (size <= most or not any(True for _ in child.children())):
            yield child
        else:
            yield from _blocks(child, most)


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
