"""Networks of torchvision and timm, by the libraries' own names."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from clipq.errors import RecipeError
from clipq.suggest import nearest

LIBRARIES = ("torchvision", "timm")
# As its trained weights want it, and without the heads that only training from scratch uses.
_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"torchvision/googlenet": {"aux_logits": False, "transform_input": True, "init_weights": True}}
)


def build_from_library(name: str) -> nn.Module:
    """Make a library's network of 1000 classes, newly initialised from torch's random generator.

    Args:
        name: ``LIBRARY/NETWORK``.

    Raises:
        RecipeError: the library is not installed, or has no such network.
    """
    library, _, network = name.partition("/")
    known, make = _functions(library)
    if network not in known:
        raise RecipeError(f"model {name!r}: {library} has no network {network!r}{nearest(network, known)}")
    made: nn.Module = make(network, **_OPTIONS.get(name, {}))
    return made


def _functions(library: str) -> tuple[list[str], Any]:
    try:
        if library == "timm":
            timm = importlib.import_module("timm")
            return timm.list_models(), timm.create_model
        models = importlib.import_module("torchvision.models")
        return models.list_models(models), lambda network, **options: models.get_model(network, weights=None, **options)
    except (ImportError, RuntimeError) as error:
        raise RecipeError(
            f"{library}'s networks need {library}, which cannot be imported ({error}). Install it with "
            "pip install 'clipq[vision]', in the build that goes with your torch"
        ) from error
