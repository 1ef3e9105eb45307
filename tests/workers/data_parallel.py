"""One rank of a data-parallel training run; writes its parameters to the folder it is given."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn

import clipq
from clipq.finetune.processes import leave
from tests.zoo import KINDS, build, train_step


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for number, kind in enumerate(KINDS):
        model, _ = build(kind, seed=rank)  # each rank its own start: DistributedDataParallel makes them equal
        _, x = build(kind, seed=100 + rank)  # and its own data
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.01, foreach=bool(number % 2))
        attachment = clipq.attach(parallel, optimizer, clipq.Plan.uniform(model, pruning_rate=0.5, bits=2))
        for _ in range(4):
            train_step(parallel, optimizer, x)
        state = {"quantized": dict(model.named_parameters()), "full": attachment.full_precision}
        torch.save(state, f"{folder}/{number}.{rank}.pt")
    leave()


main(sys.argv[1])
