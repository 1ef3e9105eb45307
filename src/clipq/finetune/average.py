"""A moving average of the weights, and batch-norm statistics estimated anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from clipq.attach import Attachment


class WeightAverage:
    """An exponential moving average of a network in training: of its full-precision weights where it is attached.

    After step t an entry is d·(itself) + (1 - d)·(the network's), with d = min(decay, (1 + t) / (10 + t)), so that the
    first steps are soon forgotten. Floating-point buffers are averaged alike; frozen parameters and whole numbers are
    copied.

    Args:
        attachment: the network's, if it is attached.
    """

    def __init__(self, network: nn.Module, decay: float, attachment: Attachment | None = None) -> None:
        self._network = network
        self._attachment = attachment
        self.decay = decay
        self.steps = 0
        still = {name for name, p in network.named_parameters(remove_duplicate=False) if not p.requires_grad}
        self._averaged = {n for n, t in network.state_dict().items() if t.is_floating_point() and n not in still}
        self.state = {name: tensor.detach().clone() for name, tensor in self._now().items()}

    def _now(self) -> dict[str, Tensor]:
        full = {} if self._attachment is None else self._attachment.full_precision
        return {name: full.get(name, tensor) for name, tensor in self._network.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Once an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, tensor in self._now().items():
            if name in self._averaged:
                self.state[name].lerp_(tensor, 1 - decay)
            else:
                self.state[name].copy_(tensor)

    @torch.no_grad()
    def give(self) -> None:
        """Make the average the network's weights; an attached network's full-precision ones, which are quantized."""
        for name, tensor in self._network.state_dict().items():
            tensor.copy_(self.state[name])
        if self._attachment is not None:
            self._attachment.replan(self._attachment.plan)

    @torch.no_grad()
    def take_buffers(self) -> None:
        """Make the network's buffers the average's."""
        for name, buffer in self._network.named_buffers():
            if name in self.state:
                self.state[name].copy_(buffer)

    def state_dict(self) -> dict[str, object]:
        return {"steps": self.steps, "state": self.state}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, object]) -> None:
        tensors = state["state"]
        assert isinstance(tensors, Mapping)
        assert isinstance(state["steps"], int)
        self.steps = state["steps"]
        for name, tensor in self.state.items():
            tensor.copy_(tensors[name])


def reestimate_batch_norm(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], count: int) -> None:
    """Estimate the running statistics of every batch norm anew, as the mean over some minibatches.

    Statistics gathered while the quantized weights still moved are stale at the end of training.

    Args:
        batches: pairs of inputs and labels; the first ``count`` are used.
    """
    device = next(network.parameters()).device
    update_bn((inputs for inputs, _ in itertools.islice(batches, count)), network, device)
