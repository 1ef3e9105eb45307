"""A label at every position of a sample: a small language model, through every part of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clipq.errors import DataError, RecipeError
from clipq.finetune.compress import compress
from clipq.finetune.losses import distillation_loss
from clipq.finetune.score import score
from clipq.finetune.watch import Silent
from clipq.recipe import Recipe

MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

TEXT = "pruning and quantization in parallel with fine tuning; " * 60
KNOWN = sorted(set(TEXT))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(KNOWN), 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.head = nn.Linear(32, len(KNOWN))
        self.head.weight = self.embedding.weight

    def forward(self, text):
        return self.head(self.lstm(self.embedding(text))[0]).transpose(1, 2)

class LastAxis(Model):
    def forward(self, text):
        return super().forward(text).transpose(1, 2)

def samples(start, stop, shift=0):
    codes = torch.tensor([KNOWN.index(c) for c in TEXT])[start:stop].unfold(0, 21, 7)
    return TensorDataset(codes[:, :-1], codes[:, 1:] + shift)

def data(): return samples(0, 2500), samples(2500, 3200)
def wrong(): return samples(0, 2500, 100), samples(2500, 3200, 100)
"""


def recipe(folder: Path, **fields: object) -> Recipe:
    (folder / "text.py").write_text(MODULE)
    known = {"model": f"{folder / 'text.py'}:Model", "data": f"{folder / 'text.py'}:data", "optimizer": "adam"}
    training = {"learning_rate": 0.01, "batch_size": 32, "float_epochs": 4, "epochs": 3}
    return Recipe.make(known | training | fields)


def test_a_language_model_is_searched_trained_and_comes_back(tmp_path: Path) -> None:
    search = {"search_evaluations": 3, "search_refinements": 0, "search_samples": 60, "search_steps": 4}
    others = {"distillation": 0.5, "distillation_temperature": 2.0, "label_smoothing": 0.1, "accumulate": 2}
    report = compress(recipe(tmp_path, ratio=6, **search, **others), tmp_path / "run", Silent())
    assert report.ratio >= 6
    assert report.reloaded == report.after
    assert report.after.count == 98 * 20  # every character of the validation set
    assert report.after.accuracy > 60
    assert json.loads((tmp_path / "run" / "report.json").read_text())["scores"]["after"]["count"] == 98 * 20


def test_a_score_counts_every_position() -> None:
    outputs = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(5, (6, 4), generator=torch.Generator().manual_seed(1))
    batches = [(outputs[:4], targets[:4]), (outputs[4:], targets[4:])]
    found = score(torch.nn.Identity(), batches, torch.device("cpu"))
    flat = outputs.transpose(1, 2).flatten(0, 1)
    assert (found.count, found.correct) == (24, int((flat.argmax(1) == targets.flatten()).sum()))
    assert found.loss == pytest.approx(float(F.cross_entropy(flat, targets.flatten())), rel=1e-6)


def test_distillation_is_the_mean_over_positions() -> None:
    outputs, teachers = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    flat = [logits.transpose(1, 2).flatten(0, 1) for logits in (outputs, teachers)]
    whole, expected = distillation_loss(outputs, teachers, 2.0), distillation_loss(*flat, 2.0)
    torch.testing.assert_close(whole, expected)


def test_scores_on_the_wrong_axis_and_labels_out_of_range_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"returns \(2, 20, \d+\) .* labels of \(2, 20\).*\(samples, classes, posi"):
        compress(recipe(tmp_path, model=f"{tmp_path / 'text.py'}:LastAxis"), tmp_path / "a", Silent())
    with pytest.raises(DataError, match=r"label \d+ at position 0, \(0,\) in the sample, is out of range"):
        compress(recipe(tmp_path, data=f"{tmp_path / 'text.py'}:wrong"), tmp_path / "b", Silent())
