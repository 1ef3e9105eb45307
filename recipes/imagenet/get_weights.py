"""Fetch the trained weights of the ImageNet recipes from torchvision and timm, and keep them as safetensors.

    python recipes/imagenet/get_weights.py --to /data/imagenet/weights [resnet50 vit-s16 ...]

A file has the library's names: of the network, and of its weights. timm's come from the Hugging Face Hub and need
the package huggingface_hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import safetensors.torch

from clipq.recipe import Recipe

HERE = Path(__file__).parent
RECIPES = ("alexnet", "vgg16", "googlenet", "resnet18", "resnet50", "mobilenet-v2", "shufflenet-v2", "vit-s16")


def trained(model: str, weights: str) -> Any:
    """A library's network with the weights of that name."""
    library, _, network = model.partition("/")
    if library == "timm":
        import timm

        return timm.create_model(f"{network}.{weights}", pretrained=True)
    import torchvision

    return torchvision.models.get_model(network, weights=weights)


def fetch(name: str, folder: Path) -> Path:
    """Write one recipe's file of weights."""
    recipe = Recipe.load(HERE / f"{name}.yaml")
    assert recipe.weights is not None
    path = folder / Path(recipe.weights).name
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_model(trained(recipe.model, path.stem.partition(".")[2]), str(path))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("recipes", nargs="*", choices=[*RECIPES, []])
    arguments = parser.parse_args()
    for name in arguments.recipes or RECIPES:
        print(fetch(name, arguments.to))


if __name__ == "__main__":
    main()
