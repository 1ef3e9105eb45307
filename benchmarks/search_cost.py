"""What a default search on ResNet-50 costs, in forward passes of one image, next to an epoch of ImageNet.

    python benchmarks/search_cost.py

Nothing is trained: the number of evaluations is the search's own, and how much of the network runs after the kept
activations is measured, in floating point operations of convolutions and products, with the search's own cache on one
image. A backward pass counts as two forward passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clipq.recipe import Recipe
from clipq.search import Settings
from clipq.search.candidates import STARTING_PLANS
from clipq.search.evaluator import Evaluator
from clipq.search.groups import Theta, groups_of
from clipq.search.predict import EVALUATIONS, FINALISTS, SCREENING, WHOLE_PLANS
from clipq.search.target import parse_bytes

IMAGENET, VALIDATION = 1_281_167, 50_000
BATCH = 256
"""Of an evaluation."""


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_conv(inputs, width, 1),
            nn.ReLU(),
            *_conv(width, width, 3, stride),
            nn.ReLU(),
            *_conv(width, 4 * width, 1),
        )
        same = stride == 1 and inputs == 4 * width
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(inputs, 4 * width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x) + self.shortcut(x))


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)


def resnet50() -> nn.Module:
    blocks: list[nn.Module] = []
    inputs = 64
    for stage, n in enumerate((3, 4, 6, 3)):
        for i in range(n):
            blocks.append(Bottleneck(inputs, 64 << stage, 2 if i == 0 and stage else 1))
            inputs = 256 << stage
    stem = [*_conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)).eval()


@dataclass(frozen=True)
class GroupCost:
    """Of one group.

    Attributes:
        share: of the network's operations that run after the kept activations.
        kept: bytes of activations an image.
    """

    share: float
    kept: int


def group_costs(model: nn.Module, image: Tensor) -> list[GroupCost]:
    groups = groups_of(model)
    counter = FlopCounterMode(display=False)

    def evaluate(network: nn.Module) -> float:
        return float(network(image).square().mean())

    def counted(network: nn.Module) -> float:
        with counter:
            return evaluate(network)

    counted(model)
    everything = counter.get_total_flops()
    found = []
    for i in range(len(groups)):
        thetas: list[Theta | None] = [None] * len(groups)
        thetas[i] = Theta(0.5, 4)
        costs = iter((evaluate, counted))  # the hooks of the counter would keep the first from being recorded
        evaluator = Evaluator(model, lambda network, costs=costs: next(costs)(network), 2**40)  # type: ignore[misc]
        for _ in range(2):
            evaluator.at(groups, thetas, changing=i)
        found.append(GroupCost(counter.get_total_flops() / everything, evaluator.kept_bytes()))
    return found


def alone(costs: list[GroupCost], evaluations: int, samples: int, memory: int) -> float:
    """Image forwards of the evaluations of each group alone: the first of a group whole, the others after its cache."""
    total = 0.0
    for cost in costs:
        kept = min(memory // max(cost.kept * BATCH, 1) * BATCH, samples)
        total += samples + (evaluations - 1) * (kept * cost.share + samples - kept)
    return total


def main() -> None:
    fields = {name: field.default for name, field in Recipe.model_fields.items()}
    samples, steps, batch = fields["search_samples"], fields["search_steps"], fields["batch_size"]
    memory = parse_bytes(fields["search_memory"])
    torch.manual_seed(0)
    costs = group_costs(resnet50(), torch.randn(1, 3, 224, 224))
    screened, judged = STARTING_PLANS + Settings().refinements, FINALISTS + 1
    share = math.ceil(SCREENING * steps)
    rows = {
        f"{len(costs)} layers alone, {EVALUATIONS} times each": alone(costs, EVALUATIONS, samples, memory),
        "the model as it is, and whole plans along the curve": (1 + WHOLE_PLANS) * samples,
        f"{screened} plans of the wanted size, evaluated": screened * samples,
        f"the same, fine-tuned for {share} steps of {batch}": screened * share * batch * 3,
        f"{judged} of them, evaluated": judged * samples,
        f"the same, fine-tuned for {steps} steps": judged * steps * batch * 3,
        "the chosen plan, with fewer bytes in one layer": (len(costs) + 1) * samples,
        "the validation set, before and after": 2 * VALIDATION,
    }
    total = sum(rows.values())
    lines = ["| ResNet-50, 224 × 224 | image forwards | epochs of ImageNet |", "| --- | ---: | ---: |"]
    for name, forwards in (*rows.items(), ("in all", total)):
        lines.append(f"| {name} | {forwards:,.0f} | {forwards / (3 * IMAGENET):.2f} |")
    print("\n".join(lines))
    everything = alone([GroupCost(1.0, 0)] * len(costs), EVALUATIONS, samples, memory)
    unlimited = alone(costs, EVALUATIONS, samples, 2**60)
    print(f"\nthe layers alone: {everything:,.0f} without kept activations, {unlimited:,.0f} with all of them kept")


if __name__ == "__main__":
    main()
