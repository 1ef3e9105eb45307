"""MobileNet-v1 for ImageNet: Howard et al., *MobileNets*, 2017, table 1, as TensorFlow trained it.

What TensorFlow does otherwise than torch: "same" padding is one-sided where the stride is 2, and batch norms have an
epsilon of 1e-3.
"""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

_WIDTHS = (32, 64, 128, 128, 256, 256, *(512,) * 6, 1024, 1024)  # before each of the 13 blocks, and at the end
_HALVING = (1, 3, 5, 11)  # the blocks of stride 2


class MobileNetV1(nn.Module):
    """MobileNet-v1 of a given width; 470,072 parameters at a quarter of the full one."""

    def __init__(self, width: float) -> None:
        super().__init__()
        channels = [round(width * full) for full in _WIDTHS]
        steps = list(itertools.pairwise(channels))
        self.conv1 = _Convolution(3, channels[0], 3, stride=2)
        self.dw = nn.ModuleList(
            _Convolution(n, n, 3, stride=2 if i in _HALVING else 1, groups=n) for i, (n, _) in enumerate(steps)
        )
        self.pw = nn.ModuleList(_Convolution(n, m, 1) for n, m in steps)
        self.fc = nn.Conv2d(channels[-1], 1000, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of shape (N, 1000) for images of shape (N, 3, 224, 224), pixels from -1 to 1."""
        x = self.conv1(x)
        for depthwise, pointwise in zip(self.dw, self.pw, strict=True):
            x = pointwise(depthwise(x))
        scores: Tensor = self.fc(x.mean((2, 3), keepdim=True)).flatten(1)
        return scores


class _Convolution(nn.Module):
    """A convolution with batch norm and ReLU6."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.padding = [0] * 4 if size == 1 else [1] * 4 if stride == 1 else [0, 1, 0, 1]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.bn(self.conv(F.pad(x, self.padding))))
