"""What all methods share: the network, the data, one way to train, one way to measure."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipq.data import load_data
from clipq.data.named import DATA_ROOT_VARIABLE
from clipq.finetune.devices import make_fabric, slow_in_16_bits
from clipq.finetune.network import find_weights, load_weights, make_network
from clipq.finetune.optimization import make_optimizer
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
        shown: errors in the picture, lowest and highest.
        unit: of the error: per cent of the images, or bits a character.
        extras: further fields of the recipe for clipq with everything on.
    """

    recipe: str
    epochs: int
    learning_rate: float
    settings: dict[str, tuple[str, ...]]
    shown: tuple[float, float]
    unit: str = "%"
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def digits(self) -> int:
        """Of an error, behind the point, as it is shown."""
        return 2 if self.unit == "%" else 3


NETS = {
    "lenet-300-100": Net(
        "recipes/mnist/lenet-300-100.yaml",
        20,
        0.002,
        {
            "clipq": ("8500", "5300", "4300"),
            "paper": ("500", "2000", "8000"),
            "deep-compression": ("0.92,4", "0.95,3", "0.97,3"),
            "coremltools": ("0.9,2",),
            "qat": ("4", "3", "2"),
            "nncf": ("0.95",),
            "nncodec": ("-26", "-20", "-16"),
            "variants": (
                "5300,at-once",
                "4300,at-once",
                "4300,nothing",
                "4300,priced",
                "4300,frozen",
                "4300,distilled",
                "4300,split-by-error",
                "4300,without-outliers",
                "4300,k-means",
                "4300,plain-biases",
            ),
        },
        (0, 7.5),
    ),
    "lenet-5": Net(
        "recipes/mnist/lenet-5.yaml",
        20,
        0.002,
        {
            "clipq": ("8800", "6800", "4000", "2840", "2300"),
            "paper": ("500", "2000", "8000"),
            "deep-compression": ("0.95,4", "0.98,3"),
            "coremltools": ("0.9,2",),
            "qat": ("4", "3", "2"),
            "nncf": ("0.95",),
            "nncodec": ("-26", "-20", "-16"),
        },
        (0, 2.7),
    ),
    "resnet-20": Net(
        "recipes/cifar10/resnet-20.yaml",
        8,
        0.02,
        {
            "clipq": ("100000", "47000", "36000"),
            "paper": ("1000",),
            "deep-compression": ("0.8,3",),
            "coremltools": ("0.7,3",),
            "qat": ("4", "3", "2"),
            "nncf": ("0.7",),
            "nncodec": ("-26", "-20"),
            "variants": (
                "100000,plain-norms",
                "54000,plain-norms",
                "36000,plain-norms",
                "36000,distilled-more",
                "36000,shorter-ramp",
                "36000,both",
                "36000,equalized",
            ),
        },
        (11, 16),
        extras={
            "distillation": 0.5,
            "distillation_temperature": 4.0,
            "batch_norm_batches": 50,
            "fold_norms": True,
            "bfloat16_rest": True,
        },
    ),
    "characters": Net(
        "benchmarks/frontier/characters.yaml",
        6,
        0.002,
        {
            "clipq": ("110000", "80000", "50000"),
            "paper": ("100", "400"),
            "deep-compression": ("0.8,3",),
            "coremltools": ("0.7,3",),
            "qat": ("4", "3", "2"),
            "nncf": ("0.7",),
            "nncodec": ("-26", "-20"),
        },
        (2.3, 3.1),
        unit="bits a character",
    ),
}


class Bench:
    """One network and seed: the float network, whose weights every method starts from, and the data."""

    def __init__(self, name: str, seed: int, data_root: str) -> None:
        os.environ[DATA_ROOT_VARIABLE] = data_root
        self.net = NETS[name]
        changes: dict[str, Any] = {"seed": seed, "data_root": data_root, "epochs": self.net.epochs}
        changes |= {
            "learning_rate": self.net.learning_rate,
            "pruning_rate": None,
            "bits": None,
            "overrides": {},
            "pruning_ramp": 0.0,
        }
        if slow_in_16_bits():
            changes["precision"] = "32"
        self.recipe = Recipe.load(ROOT / self.net.recipe, changes)
        self.network: Any = make_network(self.recipe)
        if self.recipe.channels_last:
            self.network.to(memory_format=torch.channels_last)
        fraction = self.recipe.validation_fraction
        self.data = load_data(self.recipe.data, data_root, seed, validation_fraction=fraction)
        self.fabric = make_fabric(self.recipe)
        self.steps_per_epoch = self.data.batches("train", self.recipe.batch_size).total
        load_weights(self.network, self._trained(name) if self.recipe.weights is None else find_weights(self.recipe))

    def _trained(self, name: str) -> Path:
        """The weights of a network that comes without: trained the first time, and kept for all methods and seeds."""
        path = ROOT / "build" / "frontier" / f"{name}.pt"
        if not path.exists():
            self.train(self.network.parameters(), range(self.recipe.float_epochs))
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.network.state_dict(), path)
        return path

    def weights(self) -> dict[str, nn.Parameter]:
        """The weight tensors, without biases: all that the methods other than ours compress."""
        return {name: p for name, p in self.network.named_parameters() if p.dim() > 1}

    def float_state(self) -> dict[str, Tensor]:
        """All that a file has to keep: parameters, and the statistics of batch norms without their counters."""
        return {name: tensor for name, tensor in self.network.state_dict().items() if tensor.is_floating_point()}

    def train(
        self,
        parameters: Iterable[Tensor],
        epochs: range,
        *,
        after_backward: Callable[[], None] = lambda: None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Train with the recipe's optimizer and one cosine over these epochs, which are counted as in the whole run."""
        torch.manual_seed(self.recipe.seed)
        optimizer = make_optimizer(nn.ParameterList(parameters), self.recipe, self.net.learning_rate)
        steps = self.steps_per_epoch * len(epochs)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps)
        )
        self.network.train()
        for epoch in epochs:
            for inputs, targets in self.data.batches(
                "train", self.recipe.batch_size, self.recipe.seed, epoch, channels_last=self.recipe.channels_last
            ):
                self.network.zero_grad()
                with self.fabric.autocast():
                    loss = F.cross_entropy(self.network(inputs), targets)
                loss.backward()
                after_backward()
                optimizer.step()
                after_step()
                schedule.step()

    def error(self, part: Any) -> float:
        """Top-1 error in per cent; of a text, the loss in bits a character."""
        found = score(self.network, self.data.batches(part, 1000), self.fabric.device)
        return found.error if self.net.unit == "%" else found.loss / math.log(2)
