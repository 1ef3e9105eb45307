"""What all methods share: the network, the data, one way to train, one way to measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipq.data import load_data
from clipq.finetune.devices import make_fabric
from clipq.finetune.network import find_weights, load_weights, make_network
from clipq.finetune.score import score
from clipq.recipe import Recipe

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Net:
    """One network of the bench.

    Attributes:
        recipe: for model, weights, data, batch size and optimizer; what it says of p and b is not used.
        epochs: of training after the float network, for every method alike.
        learning_rate: the highest, of a cosine that falls to zero.
        settings: of each method, what its points on the curve are made with.
    """

    recipe: str
    epochs: int
    learning_rate: float
    settings: dict[str, tuple[str, ...]]


NETS = {
    "lenet-300-100": Net(
        "recipes/mnist/lenet-300-100.yaml",
        20,
        0.002,
        {
            "clipq": ("8500", "5300", "4300"),
            "at-once": ("5300", "4300"),
            "paper": ("500", "2000", "8000"),
            "deep-compression": ("0.92,4", "0.95,3", "0.97,3"),
            "qat": ("4", "3", "2"),
            "nncf": ("0.9", "0.95"),
            "nncodec": ("-26", "-20", "-16"),
        },
    ),
    "lenet-5": Net(
        "recipes/mnist/lenet-5.yaml",
        12,
        0.002,
        {
            "clipq": ("6800", "4000", "2840"),
            "at-once": ("4000",),
            "paper": ("500", "2000", "8000"),
            "deep-compression": ("0.95,4", "0.98,3"),
            "qat": ("3", "2"),
            "nncf": ("0.9", "0.95"),
            "nncodec": ("-26", "-20", "-16"),
        },
    ),
}


class Bench:
    """One network and seed: the float network, whose weights every method starts from, and the data."""

    def __init__(self, name: str, seed: int, data_root: str) -> None:
        self.net = NETS[name]
        changes: dict[str, Any] = {"seed": seed, "data_root": data_root, "epochs": self.net.epochs}
        changes |= {
            "learning_rate": self.net.learning_rate,
            "pruning_rate": None,
            "bits": None,
            "overrides": {},
            "pruning_ramp": 0.0,
        }
        self.recipe = Recipe.load(ROOT / self.net.recipe, changes)
        self.network: Any = make_network(self.recipe)
        load_weights(self.network, find_weights(self.recipe))
        fraction = self.recipe.validation_fraction
        self.data = load_data(self.recipe.data, data_root, seed, validation_fraction=fraction)
        self.fabric = make_fabric(self.recipe)
        self.steps_per_epoch = self.data.batches("train", self.recipe.batch_size).total

    def weights(self) -> dict[str, nn.Parameter]:
        """The weight tensors, without biases: all that the methods other than ours compress."""
        return {name: p for name, p in self.network.named_parameters() if p.dim() > 1}

    def train(
        self,
        parameters: Iterable[Tensor],
        epochs: range,
        *,
        after_backward: Callable[[], None] = lambda: None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Train the network with Adam and one cosine over these epochs, which are counted as in the whole run."""
        torch.manual_seed(self.recipe.seed)
        optimizer = torch.optim.Adam(parameters, lr=self.net.learning_rate)
        steps = self.steps_per_epoch * len(epochs)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps)
        )
        self.network.train()
        for epoch in epochs:
            for inputs, targets in self.data.batches("train", self.recipe.batch_size, self.recipe.seed, epoch):
                self.network.zero_grad()
                F.cross_entropy(self.network(inputs), targets).backward()
                after_backward()
                optimizer.step()
                after_step()
                schedule.step()

    def error(self, part: Any) -> float:
        """Top-1, in per cent."""
        return score(self.network, self.data.batches(part, 1000), self.fabric.device).error
