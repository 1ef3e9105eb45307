"""Small networks and costs to search plans for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from clipq.search.evaluator import Evaluate


def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def trained_classifier(steps: int = 150) -> nn.Module:
    """Sees digits; about 11,000 weights."""
    torch.manual_seed(0)
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10))
    return _trained(model, lambda: F.cross_entropy(model(x), y), steps)


def classification_loss(model: nn.Module) -> float:
    x, y = digits()
    model.eval()
    return float(F.cross_entropy(model(x[:500]), y[:500]))


def trained_regression() -> tuple[nn.Module, Evaluate]:
    torch.manual_seed(0)
    x = torch.randn(400, 12)
    y = torch.sin(x @ torch.randn(12, 3))
    model = nn.Sequential(nn.Linear(12, 80), nn.Tanh(), nn.Linear(80, 40), nn.Tanh(), nn.Linear(40, 3))
    _trained(model, lambda: F.mse_loss(model(x), y), 300)
    return model, lambda m: float(F.mse_loss(m(x), y))


def small_regression() -> tuple[nn.Module, Evaluate]:
    """A net of 500 weights that gives what it gave; not trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 8))
    x = torch.randn(64, 16)
    wanted = model(x).detach()
    return model, lambda m: float(F.mse_loss(m(x), wanted))


class LanguageModel(nn.Module):
    """Next-character prediction: an embedding, an LSTM, and the embedding again as the output layer."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, characters)
        self.head.weight = self.embedding.weight

    def forward(self, text: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(text))
        scores: Tensor = self.head(hidden)
        return scores


def trained_language_model() -> tuple[nn.Module, Evaluate]:
    torch.manual_seed(0)
    text = "pruning and quantization in parallel with fine tuning; " * 8
    known = sorted(set(text))
    codes = torch.tensor([known.index(c) for c in text])
    inputs, targets = codes[:-1].view(1, -1), codes[1:].view(1, -1)
    model = LanguageModel(len(known))

    def loss(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(inputs).flatten(0, 1), targets.flatten())

    _trained(model, lambda: loss(model), 80)
    return model, lambda m: float(loss(m))


def _trained(model: nn.Module, loss: object, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[operator]
        optimizer.step()
    return model.eval()
