"""One process of a training by the engine; the first one writes the network and the records to a file."""

from __future__ import annotations

import dataclasses
import json
import sys

import torch

from clipq import Plan
from clipq.data import load_data
from clipq.demo import network as make_network
from clipq.finetune.devices import make_fabric
from clipq.finetune.loop import fit
from clipq.finetune.watch import EpochRecord, Silent
from clipq.recipe import Recipe


class Keeping(Silent):
    def __init__(self) -> None:
        self.records: list[EpochRecord] = []

    def epoch(self, record: EpochRecord) -> None:
        self.records.append(record)


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
