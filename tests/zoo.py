"""Small nets, one for each kind of module that clipq compresses, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Tied(nn.Module):
    """A language model in small: the embedding and the output layer share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(x)))).mean(1)


class ConvNet(nn.Module):
    """Convolution, transposed convolution, batch norm, and two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.norm(self.conv(x)))).mean((2, 3))
        return self.second(torch.tanh(self.first(x)))


class Over(nn.Module):
    """One module with a head behind it; ``call`` says how the module's output becomes (batch, features)."""

    def __init__(self, module: nn.Module, features: int, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module_under_test = module
        self.head = nn.Linear(features, 3)
        self._call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._call(self.module_under_test, x))


def _plain(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def _pooled(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).flatten(2).mean(2)


def _first_mean(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)[0].mean(1)


def _attention(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x, x, need_weights=False)[0].mean(1)


def _cross_attention(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x[..., :4], x[..., :4], need_weights=False)[0].mean(1)


def _twice(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x)


def _cell(module: nn.Module, x: Tensor) -> Tensor:
    out = module(x)
    return out[0] if isinstance(out, tuple) else out


def _mean(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).mean(1)


_KINDS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "Linear": lambda: (Over(nn.Linear(8, 6), 6, _plain), torch.randn(5, 8)),
    "Bilinear": lambda: (Over(nn.Bilinear(4, 4, 6), 6, _twice), torch.randn(5, 4)),
    "Conv1d": lambda: (Over(nn.Conv1d(3, 6, 3), 6, _pooled), torch.randn(5, 3, 9)),
    "Conv2d": lambda: (Over(nn.Conv2d(3, 6, 3), 6, _pooled), torch.randn(5, 3, 7, 7)),
    "Conv3d": lambda: (Over(nn.Conv3d(2, 6, 2), 6, _pooled), torch.randn(3, 2, 4, 4, 4)),
    "ConvTranspose1d": lambda: (Over(nn.ConvTranspose1d(3, 6, 3), 6, _pooled), torch.randn(5, 3, 5)),
    "ConvTranspose2d": lambda: (Over(nn.ConvTranspose2d(3, 6, 3), 6, _pooled), torch.randn(5, 3, 4, 4)),
    "ConvTranspose3d": lambda: (Over(nn.ConvTranspose3d(2, 6, 2), 6, _pooled), torch.randn(3, 2, 3, 3, 3)),
    "Embedding": lambda: (Over(nn.Embedding(20, 6), 6, _mean), torch.randint(0, 20, (5, 4))),
    "EmbeddingBag": lambda: (Over(nn.EmbeddingBag(20, 6), 6, _plain), torch.randint(0, 20, (5, 4))),
    "MultiheadAttention packed": lambda: (
        Over(nn.MultiheadAttention(8, 2, batch_first=True), 8, _attention),
        torch.randn(5, 4, 8),
    ),
    "MultiheadAttention separate": lambda: (
        Over(nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True), 8, _cross_attention),
        torch.randn(5, 4, 8),
    ),
    "RNN": lambda: (Over(nn.RNN(4, 6, batch_first=True), 6, _first_mean), torch.randn(5, 3, 4)),
    "LSTM": lambda: (
        Over(nn.LSTM(4, 6, batch_first=True, bidirectional=True, proj_size=3), 6, _first_mean),
        torch.randn(5, 3, 4),
    ),
    "GRU": lambda: (Over(nn.GRU(4, 6, num_layers=2, batch_first=True), 6, _first_mean), torch.randn(5, 3, 4)),
    "RNNCell": lambda: (Over(nn.RNNCell(4, 6), 6, _cell), torch.randn(5, 4)),
    "LSTMCell": lambda: (Over(nn.LSTMCell(4, 6), 6, _cell), torch.randn(5, 4)),
    "GRUCell": lambda: (Over(nn.GRUCell(4, 6), 6, _cell), torch.randn(5, 4)),
    "tied": lambda: (Tied(), torch.randint(0, 12, (5, 4))),
    "conv, transposed conv, tied linear": lambda: (ConvNet(), torch.randn(5, 2, 6, 6)),
    "bare Sequential": lambda: (nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 8)),
}

KINDS = list(_KINDS)


def build(kind: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A fresh net of one kind, with a batch of inputs; the same weights for the same seed."""
    torch.manual_seed(seed)
    return _KINDS[kind]()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """One step towards a fixed target that depends on the input's position only."""
    optimizer.zero_grad()
    out = model(x)
    target = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out - target).square().mean().backward()
    optimizer.step()
