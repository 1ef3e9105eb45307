"""clipq with one thing changed: what was tried beyond the paper, under the same search, size and training.

A change is one of the recipe; or a rule in place of the operator while the network is trained, when the search for the
plan is that of `ours`; or what the network is to begin with. In plain torch: the error and the bytes count here, not
the time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import clipq.attached
from benchmarks.frontier.bench import Bench
from benchmarks.frontier.ours import RAMP, compressed
from clipq.finetune.training import SETTLED
from clipq.operator import Quantizer, QuantizerEntry
from clipq.search import Target

Rule = Callable[[Tensor, QuantizerEntry], Tensor]
"""Gives the quantized form of a weight tensor, float32, of the same shape."""
PRICE = 0.05
"""Of a bit, in mean squares of a tensor's survivors."""
OUTLIERS = 0.02
"""Share of a sign's survivors that lie beyond the last interval."""
FACTOR = 4.0
"""The most by which equalizing changes a channel against the median one of its layer: channels of noise stay small."""
CORRECTIONS = 150
"""At least so many plans a training has on its way to the last; a tensor is quantized once more for each."""
RECIPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "at-once": {"pruning_ramp": 0.0},
    "distilled": {"distillation": 0.7, "distillation_temperature": 4.0},
    "distilled-more": {"distillation": 0.9},
    "shorter-ramp": {"pruning_ramp": 0.3},
    "both": {"distillation": 0.9, "pruning_ramp": 0.3},
    "plain-biases": {"include": ()},
    "plain-norms": {"fold_norms": False, "bfloat16_rest": False},
}


def variant(bench: Bench, setting: str, folder: Path) -> Path:
    """`ours`, changed in one thing.

    Args:
        setting: "bytes,change".
    """
    size, change = setting.split(",")
    rule: Rule | None = RULES.get(change)
    if change == "frozen":
        rule = Frozen(math.ceil(SETTLED * bench.steps_per_epoch * bench.net.epochs) + CORRECTIONS)
    if change == "equalized":
        equalize(bench.network)
    recipe = {"pruning_ramp": RAMP, **bench.net.extras, **RECIPES.get(change, {})}
    operator = nullcontext() if rule is None else mock.patch.object(clipq.attached, "Quantizer", changed(rule))
    return compressed(bench, folder, Target(bytes=int(size)), int(size), training=operator, **recipe)


def changed(rule: Rule) -> Callable[[Sequence[QuantizerEntry]], Quantizer]:
    """What makes quantizers of another rule."""
    return lambda entries: Changed(entries, rule)


class Changed(Quantizer):
    """The operator with another rule."""

    def __init__(self, entries: Sequence[QuantizerEntry], rule: Rule) -> None:
        super().__init__(entries)
        self._rule = rule

    @torch.no_grad()
    def __call__(self, weights: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        for i, (weight, target) in enumerate(zip(weights, out, strict=True)):
            self.recall(i, weight, target)

    @torch.no_grad()
    def recall(self, i: int, weight: Tensor, out: Tensor) -> None:
        out.copy_(self._rule(weight, self.entries[i]))


class Side:
    """The survivors of one sign, by magnitude, and where they are."""

    def __init__(self, weight: Tensor, sign: int, pruning_rate: float) -> None:
        magnitude = sign * weight
        of_sign = magnitude[magnitude > 0]
        k = math.floor(pruning_rate * len(of_sign) + 0.5)
        self.threshold = of_sign.kthvalue(k).values if k else of_sign.new_zeros(())
        self.where = magnitude > self.threshold
        self.sign, self.kept = sign, magnitude[self.where]
        self.end = self.kept.max() if len(self.kept) else self.threshold

    def intervals(self, n: int) -> Tensor:
        """The interval, 0 innermost, of every survivor; of equal width, up to ``end``."""
        position = (self.kept - self.threshold) * (n / (self.end - self.threshold))
        return position.clamp(max=n - 1).long()


def split(bits: int, sides: Sequence[Side]) -> list[int]:
    """As clipq splits the intervals: alike, and one more to the longer side; of one, to the side that gains more."""
    n = 2**bits - 1
    if not all(len(side.kept) for side in sides):
        return [n if len(side.kept) else 0 for side in sides]
    merits = [side.end - side.threshold for side in sides]
    if bits == 1:
        merits = [side.kept.double().sum() ** 2 / len(side.kept) for side in sides]
    first = n - n // 2 if merits[0] >= merits[1] else n // 2
    return [first, n - first]


def means(values: Tensor, slots: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The mean of the values in each slot, and how many they are."""
    counts = torch.bincount(slots, minlength=n)
    return torch.bincount(slots, values.double(), minlength=n) / counts.clamp(min=1), counts


def squared_error(side: Side, n: int) -> float:
    """What quantizing one side to the means of n intervals costs."""
    if n == 0 or not len(side.kept):
        return float(side.kept.double().square().sum())
    slots = side.intervals(n)
    return float((side.kept - means(side.kept, slots, n)[0][slots]).square().sum())


def quantized(weight: Tensor, sides: Sequence[Side], levels: Sequence[Tensor]) -> Tensor:
    """The tensor with these levels at the places of the survivors."""
    made = torch.zeros_like(weight)
    for side, level in zip(sides, levels, strict=True):
        made[side.where] = side.sign * level.float()
    return made


def sides_of(weight: Tensor, entry: QuantizerEntry) -> list[Side]:
    return [Side(weight, sign, entry.pruning_rate) for sign in (1, -1)]


def in_intervals(weight: Tensor, sides: Sequence[Side], split_: Sequence[int]) -> Tensor:
    """The means of the intervals."""
    levels = []
    for side, n in zip(sides, split_, strict=True):
        slots = side.intervals(max(n, 1))
        levels.append(means(side.kept, slots, n)[0][slots] if n else torch.zeros_like(side.kept))
    return quantized(weight, sides, levels)


def unchanged(weight: Tensor, entry: QuantizerEntry) -> Tensor:
    """The operator as clipq has it, but for the last bits of a mean."""
    sides = sides_of(weight, entry)
    return in_intervals(weight, sides, split(entry.bits, sides))


def split_by_error(weight: Tensor, entry: QuantizerEntry) -> Tensor:
    """As many intervals on either side as lose least in squares, one at least where weights are left."""
    sides, n = sides_of(weight, entry), 2**entry.bits - 1
    least = [min(1, len(side.kept)) for side in sides]
    choices = range(least[0], n - least[1] + 1) or range(n + 1)
    first = min(choices, key=lambda k: squared_error(sides[0], k) + squared_error(sides[1], n - k))
    return in_intervals(weight, sides, (first, n - first))


def without_outliers(weight: Tensor, entry: QuantizerEntry) -> Tensor:
    """Ranges end where all but a few survivors lie; those few belong to the outermost interval."""
    sides = sides_of(weight, entry)
    split_ = split(entry.bits, sides)
    for side in sides:
        if len(side.kept) > 1:
            inner = side.kept.kthvalue(math.ceil((1 - OUTLIERS) * len(side.kept))).values
            side.end = inner if inner > side.threshold else side.end
    return in_intervals(weight, sides, split_)


def k_means(weight: Tensor, entry: QuantizerEntry) -> Tensor:
    """The survivors of either side shared by k-means (ten rounds of Lloyd's), from the intervals on."""
    sides = sides_of(weight, entry)
    levels = []
    for side, n in zip(sides, split(entry.bits, sides), strict=True):
        if n == 0 or not len(side.kept):
            levels.append(torch.zeros_like(side.kept))
            continue
        slots = side.intervals(n)
        for _ in range(10):
            centers, counts = means(side.kept, slots, n)
            centers = centers[counts > 0]
            slots = torch.bucketize(side.kept.double(), (centers[1:] + centers[:-1]) / 2)
        levels.append(means(side.kept, slots, n)[0][slots])
    return quantized(weight, sides, levels)


def priced(weight: Tensor, entry: QuantizerEntry) -> Tensor:
    """Survivors take the level, or zero, of least squared error plus the price of its bits, by how frequent it is."""
    plain = unchanged(weight, entry)
    levels, slots, counts = plain.unique(return_inverse=True, return_counts=True)
    kept = plain != 0
    if not kept.any():
        return plain
    bits = -(counts / weight.numel()).log2()
    price = PRICE * weight[kept].square().mean() * bits
    cost = (weight[kept][:, None] - levels).square() + price
    slots[kept] = cost.argmin(1)
    return at_means(weight, levels, slots)


def at_means(weight: Tensor, levels: Tensor, codes: Tensor) -> Tensor:
    """Every weight at the mean of those with its code; zero where the level of the code was zero."""
    made = means(weight.flatten(), codes.flatten(), len(levels))[0].float()
    made[levels == 0] = 0
    return made[codes]


class Frozen:
    """Codes that stay as they are from a step on, while the levels go on learning as means of their weights.

    Other plans change nothing from there on: full-precision weights that no assignment follows drift apart.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._calls: Counter[str] = Counter()
        self._codes: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, weight: Tensor, entry: QuantizerEntry) -> Tensor:
        self._calls[entry.name] += 1
        if self._calls[entry.name] <= self._step:
            return unchanged(weight, entry)
        if entry.name not in self._codes:
            self._codes[entry.name] = unchanged(weight, entry).unique(return_inverse=True)
        levels, codes = self._codes[entry.name]
        return at_means(weight, levels, codes)


@torch.no_grad()
def equalize(network: nn.Module) -> int:
    """Give the output channels of convolutions weights of one size where a batch norm follows, which undoes it.

    A scale a channel, in effect, that the norm has in it and the file has not: levels and thresholds of a layer are
    shared by channels alike in size. In evaluation the network is the same, and a layer's mean square stays.

    Returns:
        How many convolutions there were: those whose norm is the next module that the network has.
    """
    found = 0
    for convolution, norm in pairwise(network.modules()):
        if not (isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
            continue
        assert convolution.bias is None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight, before = convolution.weight, norm.running_var + norm.eps
        size = weight.square().mean((1, 2, 3)).sqrt()
        factor = (size.median() / size).clamp(1 / FACTOR, FACTOR)
        scaled = weight * factor[:, None, None, None]
        factor *= (weight.square().mean() / scaled.square().mean()).sqrt()
        weight *= factor[:, None, None, None]
        norm.running_mean *= factor
        norm.running_var *= factor.square()
        norm.weight *= ((norm.running_var + norm.eps) / before).sqrt() / factor
        found += 1
    return found


RULES: dict[str, Rule] = {
    "split-by-error": split_by_error,
    "without-outliers": without_outliers,
    "k-means": k_means,
    "priced": priced,
}
