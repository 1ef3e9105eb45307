"""The processes of a run, and what they tell each other beside the gradients.

``torchrun`` starts them, one a device. They speak over gloo on a group of their own, which waits for a day: the first
process may search or evaluate for hours while the others wait.
"""

from __future__ import annotations

import datetime
import io
import os
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor, nn

from clipq.errors import RecipeError

T = TypeVar("T")
_PATIENCE = datetime.timedelta(days=1)
_TIME_TO_LET_GO = 0.1  # seconds
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def leave() -> None:
    """Leave the process group at the end of a process, if it is in one.

    A thread of gloo lets go of the tensors of the last exchange after it is over, for which it needs the interpreter's
    lock. A process that ends before that has happened is aborted by PyTorch: "terminate called without an active
    exception".
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(_TIME_TO_LET_GO)


class Processes:
    """The processes that train with one Fabric; get them by `Processes.of`.

    Attributes:
        rank: which one this is; the first, 0, alone writes files.
        count: how many there are.
    """

    _known: ClassVar[weakref.WeakKeyDictionary[Fabric, Processes]] = weakref.WeakKeyDictionary()

    def __init__(self, fabric: Fabric) -> None:
        self.rank = fabric.global_rank
        self.count = fabric.world_size
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.count > 1 else None

    @classmethod
    def of(cls, fabric: Fabric) -> Processes:
        """The processes of a Fabric; all of them must ask for the first time at the same point of the program."""
        if fabric not in cls._known:
            cls._known[fabric] = cls(fabric)
        return cls._known[fabric]

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share_of(self, batch_size: int) -> int:
        """This process's samples of a step.

        Raises:
            RecipeError: they cannot be shared equally.
        """
        if batch_size % self.count:
            raise RecipeError(
                f"batch_size is {batch_size}, the samples a step of all processes, and cannot be shared equally among "
                f"{self.count}; give a multiple of {self.count}"
            )
        return batch_size // self.count

    def agree(self, *values: int) -> list[int]:
        """The largest that any process gives, for each of a few whole numbers."""
        if self._group is None:
            return list(values)
        shared = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self._group)
        return shared.tolist()

    def gather(self, value: T) -> list[T]:
        """What every process gives, by rank."""
        if self._group is None:
            return [value]
        buffer = io.BytesIO()
        torch.save(value, buffer)  # tensors pickled by themselves do not always come back
        packed: list[Any] = [None] * self.count
        dist.all_gather_object(packed, buffer.getvalue(), group=self._group)
        return [torch.load(io.BytesIO(content), weights_only=False) for content in packed]

    def by_first(self, work: Callable[[], T]) -> T:
        """What the first process's work gives, or raises, in every process; the others wait."""
        if self._group is None:
            return work()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    @torch.no_grad()
    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Make tensors those of the first process."""
        for tensor in tensors if self._group is not None else ():
            shared = tensor.detach().cpu().contiguous()
            dist.broadcast(shared, src=0, group=self._group)
            tensor.detach().copy_(shared)

    @torch.no_grad()
    def average_buffers(self, network: nn.Module) -> None:
        """Make every floating-point buffer its mean over the processes, summed in the order of ranks."""
        buffers = [b for b in network.buffers() if b.is_floating_point()] if self._group is not None else []
        for buffer in buffers:
            total = torch.zeros_like(buffer, device="cpu")
            for part in self.gather(buffer.cpu()):
                total += part
            buffer.copy_(total / self.count)


def process_environment() -> dict[str, str]:
    """The environment for a process that is to run by itself: without what ``torchrun`` tells its workers."""
    return {k: v for k, v in os.environ.items() if k not in _TORCHRUN and not k.startswith("TORCHELASTIC_")}


def restarted() -> bool:
    """Whether ``torchrun`` has started this process anew after one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
