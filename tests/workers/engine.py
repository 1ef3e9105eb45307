"""One process of a training by the engine; the first one writes the network and the records to a file."""

from __future__ import annotations

import dataclasses
import json
import sys

import torch
from torch import Tensor, nn

from clipq import Plan
from clipq.data import load_data
from clipq.finetune.devices import make_fabric
from clipq.finetune.loop import fit
from clipq.finetune.watch import EpochRecord, Silent
from clipq.recipe import Recipe


class Keeping(Silent):
    def __init__(self) -> None:
        self.records: list[EpochRecord] = []

    def epoch(self, record: EpochRecord) -> None:
        self.records.append(record)


class Residual(nn.Module):
    """A block with a sequence in it, as those of ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x)) + self.shortcut(x)


def make_network() -> nn.Module:
    first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
    return nn.Sequential(first, nn.Sequential(Residual()), nn.Flatten(), nn.Linear(256, 10))


def main(path: str, fields: str) -> None:
    recipe = Recipe.make({"model": "clipq.demo:network", "data": "digits", "float_epochs": 1} | json.loads(fields))
    fabric = make_fabric(recipe)
    torch.manual_seed(0)
    network = make_network()
    plan = Plan.uniform(network, pruning_rate=0.6, bits=3)
    watcher = Keeping()
    fit(fabric, network, load_data("digits"), recipe, plan, epochs=1, learning_rate=0.05, watcher=watcher)
    if fabric.global_rank == 0:
        records = [dataclasses.asdict(record) for record in watcher.records]
        torch.save({"state": network.state_dict(), "records": records}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
