"""What the ImageNet recipes cost: computed from the networks and recipes, without running them.

    python benchmarks/imagenet_costs.py

Writes the table of ``docs/imagenet.md``. Multiplications, and the activations that training keeps, are counted on
torch's meta device. A step of training counts as three forward passes, one forward and two back, and one more for the
uncompressed network where that is distilled from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clipq.models import build
from clipq.recipe import Recipe
from clipq.search.candidates import STARTING_PLANS
from clipq.search.groups import groups_of
from clipq.search.predict import EVALUATIONS, FINALISTS, SCREENING, WHOLE_PLANS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "imagenet.md"
MARK = "<!-- costs -->"
RECIPES = ("alexnet", "vgg16", "googlenet", "resnet18", "resnet50", "mobilenet-v2", "shufflenet-v2", "vit-s16")
TRAINING_IMAGES = 1_281_167
RESNET50_RATE = 2470
"""Training images a second on one A100 (80 GB), mixed precision: published by NVIDIA, DeepLearningExamples, ResNet-50
v1.5 for PyTorch, container 21.03. It is an assumption here: nothing of ours was measured on that machine."""
COPIES = {"sgd": 4, "adamw": 5}
"""float32 numbers a weight: what the network runs on, the full-precision weight, the gradient, the optimizer's."""


@dataclass(frozen=True)
class Network:
    """What one image costs.

    Attributes:
        operations: multiplications and additions of a forward pass.
        kept: bytes of float32 activations that the backward pass needs.
        groups: how many tensors the search looks at.
    """

    parameters: int
    operations: float
    kept: float
    groups: int


def measured(model: str) -> Network:
    """Of a library's network, at 224 × 224 pixels."""
    batch = 8
    with torch.device("meta"):
        network = build(model).train()
        inputs, targets = torch.empty(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.int64)
    own = {id(p) for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in own and not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.cross_entropy(network(inputs), targets)
    stored = sum(t.untyped_storage().nbytes() for t in kept.values())
    parameters = sum(p.numel() for p in network.parameters())
    return Network(parameters, counter.get_total_flops() / batch, stored / batch, len(groups_of(network, (), ())))


def costs(recipe: Recipe, network: Network, reference: Network) -> dict[str, float]:
    """Forward passes of one image each, GPU hours and bytes."""
    samples, step = recipe.search_samples, 3 * recipe.batch_size
    alone = samples * (1 + network.groups * (recipe.search_evaluations or EVALUATIONS))
    screened = (STARTING_PLANS + recipe.search_refinements) * (samples + SCREENING * recipe.search_steps * step)
    finalists = (FINALISTS + 1) * (samples + recipe.search_steps * step)
    prices = samples * (1 + network.groups)
    search = alone + samples * WHOLE_PLANS + screened + finalists + prices
    passes = 4 if recipe.distillation else 3
    training = passes * recipe.epochs * TRAINING_IMAGES * (1 - recipe.validation_fraction)
    slower = max(network.operations / reference.operations, network.kept / reference.kept)
    forwards_a_second = 3 * RESNET50_RATE / slower
    return {
        "search": search,
        "training": training,
        "search hours": search / forwards_a_second / 3600,
        "training hours": training / forwards_a_second / 3600,
        "memory": 4 * (COPIES[recipe.optimizer] + passes - 3) * network.parameters
        + recipe.batch_size * network.kept / 2,
    }


def row(name: str, reference: Network) -> str:
    recipe = Recipe.load(ROOT / "recipes" / "imagenet" / f"{name}.yaml")
    network = measured(recipe.model)
    found = costs(recipe, network, reference)
    cells: list[Any] = [
        f"{network.parameters / 1e6:.1f} M",
        f"{network.operations / 2e9:.2f}",
        f"{network.kept / 1e6:.0f}",
        network.groups,
        f"{found['search'] / 1e6:.1f} M",
        f"{found['training'] / 1e6:.0f} M",
        f"{found['search hours']:.1f} + {found['training hours']:.1f}",
        f"{found['memory'] / 1e9:.0f}",
    ]
    return f"| {name} | {' | '.join(map(str, cells))} |"


def main() -> None:
    reference = measured("torchvision/resnet50")
    lines = [
        "| recipe | weights | GMAC an image | MB kept an image | tensors | search | training | GPU hours | GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(row(name, reference) for name in RECIPES),
    ]
    before, _, after = PAGE.read_text().split(MARK)
    PAGE.write_text(f"{before}{MARK}\n\n" + "\n".join(lines) + f"\n\n{MARK}{after}")


if __name__ == "__main__":
    main()
