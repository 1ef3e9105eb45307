"""What a step minimises: cross-entropy on the labels, and on the outputs of the uncompressed network."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Network, inputs and labels → the loss (a scalar, the mean over the samples)."""


def cross_entropy(label_smoothing: float = 0.0) -> Objective:
    """The cross-entropy on the labels (nats a label); smoothing gives that share of each target to all classes."""

    def loss(network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(network(inputs), targets, label_smoothing=label_smoothing)

    return loss


def distillation_loss(outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
    """How far outputs are from a teacher's: T² KL(teacher / T ‖ outputs / T) of the softmax, in the mean over samples
    and positions.

    The factor T² keeps the size of the gradients (Hinton, Vinyals, Dean: Distilling the knowledge in a neural network,
    2015, section 2).

    Args:
        outputs, teacher_outputs: logits, shape (samples, classes), or (samples, classes, ...) for several positions.
        temperature: T > 0.
    """
    ours, theirs = (F.log_softmax(logits.float() / temperature, dim=1) for logits in (outputs, teacher_outputs))
    total = F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return temperature**2 * total / (ours.numel() // ours.shape[1])


class Distillation:
    """An objective: (1 - weight) cross-entropy on the labels + weight `distillation_loss` to a teacher.

    Args:
        teacher: the network before compression; a copy of it is made and put into evaluation mode.
        weight: 0 to 1.
        autocast: the arithmetic that the teacher runs in.
    """

    def __init__(
        self,
        teacher: nn.Module,
        weight: float,
        temperature: float,
        label_smoothing: float = 0.0,
        autocast: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self._teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self._weight = weight
        self._temperature = temperature
        self._label_smoothing = label_smoothing
        self._autocast = autocast

    def __call__(self, network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad(), self._autocast():
            teacher_outputs = self._teacher(inputs)
        outputs = network(inputs)
        labels = F.cross_entropy(outputs, targets, label_smoothing=self._label_smoothing)
        return (1 - self._weight) * labels + self._weight * distillation_loss(
            outputs, teacher_outputs, self._temperature
        )
