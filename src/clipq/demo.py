"""The demonstration: handwritten digits, a small convolutional network, nothing to download."""

from __future__ import annotations

from torch import nn

from clipq.recipe import Recipe


def network() -> nn.Module:
    """A convolutional network of 73,000 weights for 8x8 digits."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 120),
        nn.ReLU(),
        nn.Linear(120, 10),
    )


def recipe(seed: int = 0) -> Recipe:
    """Train that network from scratch, then compress it."""
    return Recipe.make(
        {
            "model": "clipq.demo:network",
            "data": "digits",
            "float_epochs": 15,
            "pruning_rate": 0.9,
            "bits": 3,
            "overrides": {"0.weight": {"pruning_rate": 0.3, "bits": 4}, "6.weight": {"pruning_rate": 0.95}},
            "epochs": 30,
            "batch_size": 64,
            "optimizer": "adam",
            "learning_rate": 2e-3,
            "seed": seed,
        }
    )
