"""Weights that are split over the processes (FSDP2): which modules are units of it, whole tensors from parts and back.

Networks and states without split tensors go through unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


def is_sharded(network: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in network.parameters())


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


class WholeState(Mapping[str, Tensor]):
    """The tensors of a network in training, each gathered when it is asked for."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def __getitem__(self, name: str) -> Tensor:
        whole: Tensor = gathered(self._network.state_dict()[name])
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._network.state_dict())

    def __len__(self) -> int:
        return len(self._network.state_dict())
