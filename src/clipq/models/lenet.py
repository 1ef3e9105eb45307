"""The two LeNets of the compression literature, as in Caffe's model zoo, for MNIST images of 28 × 28.

Layer names are Caffe's (``conv1``, ``ip1``, …), so that its trained weights load as they are.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet300100(nn.Module):
    """784 → 300 → 100 → 10, fully connected with ReLU; 266,610 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.ip1 = nn.Linear(784, 300)
        self.ip2 = nn.Linear(300, 100)
        self.ip3 = nn.Linear(100, 10)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of shape (N, 10) for images of shape (N, 1, 28, 28) or (N, 784)."""
        hidden = F.relu(self.ip2(F.relu(self.ip1(x.flatten(1)))))
        scores: Tensor = self.ip3(hidden)
        return scores


class LeNet5(nn.Module):
    """Caffe's LeNet-5: 20 and 50 filters of 5 × 5, 500 hidden units; 430,500 weights and 580 biases.

    As in Caffe, the convolutions are followed by pooling alone; the one ReLU is on the hidden layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.ip1 = nn.Linear(800, 500)
        self.ip2 = nn.Linear(500, 10)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of shape (N, 10) for images of shape (N, 1, 28, 28)."""
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        scores: Tensor = self.ip2(F.relu(self.ip1(x.flatten(1))))
        return scores


def _initialise(net: nn.Module) -> None:
    """Caffe's "xavier" filler: uniform with variance 1 / fan-in; biases start at zero."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = (3 / module.weight[0].numel()) ** 0.5
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
