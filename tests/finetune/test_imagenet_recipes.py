"""Every ImageNet recipe runs to its end on real photographs: search, training, and a file that gives the network back.

The networks have random weights, so accuracies mean nothing here; that the reloaded one is the same does.
"""

from __future__ import annotations

import importlib
import os
import runpy
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from clipq.files import load
from clipq.finetune.compress import compress
from clipq.finetune.network import load_weights
from clipq.finetune.watch import Silent
from clipq.models import build
from clipq.recipe import Recipe
from tests.data.pictures import write_shard

RECIPES = Path(__file__).parents[2] / "recipes" / "imagenet"
HEAVY = pytest.mark.skipif(
    not os.environ.get("CLIPQ_HEAVY"), reason="minutes of one core a network: run it with CLIPQ_HEAVY=1"
)
TINY = {
    "epochs": 1,
    "batch_size": 8,
    "validation_fraction": 0.25,
    "workers": 0,
    "warmup_epochs": 0,
    "precision": "32",
    "device": "cpu",
    "search_evaluations": 1,
    "search_refinements": 0,
    "search_samples": 8,
    "search_steps": 1,
}


@pytest.fixture
def coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search knows sizes from a few encodes of a few rows, and starts from few plans."""
    sizes, candidates = (importlib.import_module(f"clipq.search.{name}") for name in ("sizes", "candidates"))
    monkeypatch.setattr(sizes, "_SPARSITIES", (0.0, 1.5, 6.2))
    monkeypatch.setattr(sizes, "SAMPLE_ROWS_ELEMENTS", 2**12)
    monkeypatch.setattr(candidates, "_EXPONENTS", (1.0,))
    monkeypatch.setattr(candidates, "_WIDTHS", (3,))


@dataclass(frozen=True)
class Photographs:
    """Some of the photographs as an image folder, and as shards."""

    folder: Path
    number: int

    def described(self, data: str, kind: str, size: int) -> Path:
        """The recipe's data file, but for where the pictures lie, how many there are and how large."""
        values = yaml.safe_load((RECIPES.parents[1] / data).read_text())
        place = {"folder": "train", "shards": "shard-{0..1}.tar"}[kind]
        values |= {"train": place, "test": None, "classes": "classes.txt", "image_size": size, "resize": size}
        path = self.folder / f"{kind}-{size}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path


@pytest.fixture(scope="module")
def photographs(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Photographs:
    root = tmp_path_factory.mktemp("photographs")
    shutil.copy(real_data / "photos" / "classes.txt", root)
    chosen = sorted((real_data / "photos" / "val").glob("*/*.jpg"))[:32]
    for path in chosen:
        copy = root / "train" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    samples = [(path.parent.name, path.read_bytes()) for path in chosen]
    write_shard(root / "shard-0.tar", samples[:20], ending="jpg")
    write_shard(root / "shard-1.tar", samples[20:], ending="jpg")
    return Photographs(root, len(chosen))


def run(name: str, kind: str, size: int, photographs: Photographs, folder: Path) -> None:
    recipe = Recipe.load(RECIPES / f"{name}.yaml")
    safetensors.torch.save_file(build(recipe.model).state_dict(), folder / "weights.safetensors")
    data = photographs.described(recipe.data, kind, size)
    changes = {"weights": str(folder / "weights.safetensors"), "data": str(data), "data_root": str(photographs.folder)}
    report = compress(Recipe.load(RECIPES / f"{name}.yaml", changes | TINY), folder / "run", Silent())
    assert report.reloaded == report.after
    assert report.reloaded.count == photographs.number // 4
    assert report.file.bytes == (folder / "run" / "model.clipq").stat().st_size
    assert recipe.ratio is not None
    assert report.ratio >= recipe.ratio
    load(folder / "run" / "model.clipq", into=build(recipe.model))


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_recipe_is_whole(name: str) -> None:
    recipe = Recipe.load(RECIPES / f"{name}.yaml")
    assert recipe.targets().keys() == {"ratio"}
    assert recipe.weights is not None
    assert (RECIPES.parents[1] / recipe.data).is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("shufflenet-v2", "shards"),
        *(
            pytest.param(name, kind, marks=HEAVY)
            for name, kind in [
                ("mobilenet-v2", "folder"),
                ("resnet18", "shards"),
                ("googlenet", "folder"),
                ("resnet50", "shards"),
                ("vit-s16", "folder"),
                ("alexnet", "shards"),
                ("vgg16", "folder"),
            ]
        ),
    ],
)
def test_a_recipe_ends_with_a_file_that_gives_the_network_back(
    name: str, kind: str, photographs: Photographs, tmp_path: Path, vision: None, coarse_search: None
) -> None:
    run(name, kind, 224 if name == "vit-s16" else 64, photographs, tmp_path)


def test_weights_are_fetched_under_the_librarys_names(
    tmp_path: Path, vision: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    published = torchvision.models.googlenet(init_weights=False).state_dict()  # with the heads for training
    asked = []

    def get_state_dict(weights: object, *args: object, **kwargs: object) -> object:
        asked.append(str(weights))
        return published

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    fetch = runpy.run_path(str(RECIPES / "get_weights.py"))["fetch"]
    path = fetch("googlenet", tmp_path)
    recipe = Recipe.load(RECIPES / "googlenet.yaml")
    assert asked == ["GoogLeNet_Weights.IMAGENET1K_V1"]
    assert recipe.weights == f"weights/{path.name}"
    network = build(recipe.model)
    load_weights(network, path)
    assert all(torch.equal(tensor, published[name]) for name, tensor in network.state_dict().items())
