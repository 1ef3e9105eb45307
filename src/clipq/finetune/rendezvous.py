"""How the processes of torchrun find each other, again and again.

After a restart torchrun's store still has what the processes before wrote, and with it their addresses: one that reads
those tries to reach the dead. So the living agree on a name first, under which the store is empty.
"""

from __future__ import annotations

import datetime
import os
import time
import uuid

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

_TIMEOUT = datetime.timedelta(minutes=30)


def join(device: torch.device) -> None:
    """Make the default process group of torchrun's processes; one that is there is left as it is.

    Args:
        device: this process's; GPUs speak over NCCL, others over gloo.
    """
    if dist.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, count, False, _TIMEOUT)  # type: ignore[attr-defined]
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(agree_on_name(store, rank, count), store),
        rank=rank,
        world_size=count,
        timeout=_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )


def agree_on_name(store: Store, rank: int, count: int) -> str:
    """A new name that all living processes have, whatever dead ones wrote into the store.

    The others ask under names of their own, which only a living first process can answer; it goes on answering until
    all have acknowledged.

    Raises:
        TimeoutError: not all of them came.
    """
    own = uuid.uuid4().hex
    deadline = time.monotonic() + _TIMEOUT.total_seconds()
    if rank:
        store.set(f"clipq/question/{rank}", own)
        name: str = store.get(f"clipq/answer/{own}").decode()
        store.set(f"clipq/acknowledged/{name}/{rank}", "")
        return name
    missing = set(range(1, count))
    while missing:
        for other in list(missing):
            if store.check([f"clipq/acknowledged/{own}/{other}"]):
                missing.remove(other)
            elif store.check([f"clipq/question/{other}"]):
                store.set(f"clipq/answer/{store.get(f'clipq/question/{other}').decode()}", own)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(missing)} of {count} did not come within {_TIMEOUT}")
        time.sleep(0.02)
    return own
