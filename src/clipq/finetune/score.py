"""How good a network is on a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Score:
    """Top-1 accuracy and mean cross-entropy (nats) on ``count`` labels: one a sample, or one a position of a sample."""

    correct: int
    count: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Per cent."""
        return 100 * self.correct / self.count

    @property
    def error(self) -> float:
        """Per cent."""
        return 100 * (self.count - self.correct) / self.count

    @classmethod
    def together(cls, scores: Sequence[Score]) -> Score:
        """The score on the samples of several together; one of them must have samples."""
        if len(scores) == 1:
            return scores[0]
        count = sum(s.count for s in scores)
        return cls(sum(s.correct for s in scores), count, sum(s.loss * s.count for s in scores) / count)


@torch.no_grad()
def score(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Score:
    """Evaluate a network in float32; its training mode is kept.

    Args:
        batches: pairs of inputs and class labels: int64, shape (B,) or (B, ...). The network's outputs are logits of
            shape (B, classes) or (B, classes, ...).
    """
    training = network.training
    network.eval()
    correct, count, loss = 0, 0, 0.0
    try:
        for inputs, targets in batches:
            outputs = network(inputs.to(device))
            targets = targets.to(device)
            correct += int((outputs.argmax(1) == targets).sum())
            loss += float(F.cross_entropy(outputs.float(), targets, reduction="sum"))
            count += targets.numel()
    finally:
        network.train(training)
    return Score(correct, count, loss / max(count, 1))
