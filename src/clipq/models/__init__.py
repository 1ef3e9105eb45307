"""The networks of the recipes: LeNets for MNIST, residual networks for CIFAR-10; MobileNet and libraries' networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import nn

from clipq.errors import RecipeError
from clipq.models.lenet import LeNet5, LeNet300100
from clipq.models.libraries import LIBRARIES, build_from_library
from clipq.models.mobilenet import MobileNetV1
from clipq.models.resnet import CifarResNet
from clipq.suggest import nearest

MODELS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "lenet-300-100": LeNet300100,
        "lenet-5": LeNet5,
        **{f"resnet-{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
        "mobilenet-v1-0.25": partial(MobileNetV1, 0.25),
    }
)


def build(name: str) -> nn.Module:
    """Make the network of that name, newly initialised from torch's random generator.

    Args:
        name: one of clipq's, or a library's, such as ``torchvision/resnet50`` or ``timm/vit_small_patch16_224``.

    Raises:
        RecipeError: there is no network of that name, or its library is not installed.
    """
    if name.partition("/")[0] in LIBRARIES and "/" in name:
        return build_from_library(name)
    if name not in MODELS:
        raise RecipeError(
            f"model {name!r} is not one of clipq's{nearest(name, MODELS)}; it has {', '.join(MODELS)}. A library's is "
            f"named as 'torchvision/resnet50' or 'timm/vit_small_patch16_224', one of your own as 'file.py:function'"
        )
    return MODELS[name]()


__all__ = ["MODELS", "CifarResNet", "LeNet5", "LeNet300100", "MobileNetV1", "build"]
