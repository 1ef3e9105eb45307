"""The networks of the recipes: the two LeNets for MNIST and the residual networks for CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import nn

from clipq.errors import RecipeError
from clipq.models.lenet import LeNet5, LeNet300100
from clipq.models.resnet import CifarResNet
from clipq.suggest import nearest

MODELS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "lenet-300-100": LeNet300100,
        "lenet-5": LeNet5,
        **{f"resnet-{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    }
)


def build(name: str) -> nn.Module:
    """Make the network of that name, newly initialised from torch's random generator.

    Raises:
        RecipeError: there is no network of that name.
    """
    if name not in MODELS:
        raise RecipeError(
            f"model {name!r} is not one of clipq's{nearest(name, MODELS)}; it has {', '.join(MODELS)}. "
            "A network of your own is named as 'file.py:function'"
        )
    return MODELS[name]()


__all__ = ["MODELS", "CifarResNet", "LeNet5", "LeNet300100", "build"]
