"""What came out of one compression run."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from clipq.files import FileReport, TensorReport
from clipq.finetune.score import Score
from clipq.finetune.watch import EpochRecord
from clipq.plan import Plan
from clipq.recipe import Recipe


@dataclass(frozen=True)
class RunReport:
    """A compression run: accuracies, bytes on disk, every tensor, every epoch.

    Attributes:
        part: what the accuracies were measured on, "test" or "validation".
        before, after: the float network, and the quantized one that was trained.
        reloaded: measured by a fresh process that loaded the file; equal to ``after``.
        file: the compressed file and every tensor in it.
        left_out: why a tensor was not compressed, by name.
    """

    recipe: Recipe
    part: str
    before: Score
    after: Score
    reloaded: Score
    file: FileReport
    left_out: dict[str, str]
    epochs: tuple[EpochRecord, ...]

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        plan: Plan,
        network: nn.Module,
        file: FileReport,
        *,
        part: str,
        before: Score,
        after: Score,
        reloaded: Score,
        epochs: Sequence[EpochRecord],
    ) -> RunReport:
        return cls(recipe, part, before, after, reloaded, file, plan.left_out(network), tuple(epochs))

    @property
    def ratio(self) -> float:
        """Bytes of the network as float32 over bytes of the file."""
        return self.file.float32_bytes / self.file.bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``report.json``."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "part": self.part,
            "accuracy": {
                "before": self.before.accuracy,
                "after": self.after.accuracy,
                "reloaded": self.reloaded.accuracy,
            },
            "scores": {
                "before": dataclasses.asdict(self.before),
                "after": dataclasses.asdict(self.after),
                "reloaded": dataclasses.asdict(self.reloaded),
            },
            "bytes": {"float32": self.file.float32_bytes, "file": self.file.bytes, "ratio": self.ratio},
            "tensors": [dataclasses.asdict(t) | {"left_out": self.left_out.get(t.name)} for t in self.file.tensors],
            "epochs": [dataclasses.asdict(e) for e in self.epochs],
            "versions": {"clipq": version("clipq"), "torch": torch.__version__, "python": platform.python_version()},
        }


_SUMMARY = ("", "top-1", "bytes", "ratio")
_TENSORS = ("tensor", "shape", "p", "b", "density", "levels", "bytes", "bits each", "share")


def to_table(report: RunReport) -> Group:
    """The report for a terminal."""
    tensors = Table(
        *_TENSORS, title="Every tensor of the file", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for row in _tensor_rows(report):
        tensors.add_row(*row)
    summary = Table(
        *_SUMMARY, title=f"{report.recipe.model} on {report.recipe.data}", title_justify="left", box=SIMPLE_HEAD
    )
    for row in _summary_rows(report):
        summary.add_row(*row)
    for table in (tensors, summary):
        for column in table.columns[1:]:
            column.justify = "right"
    return Group(tensors, *(Text(line) for line in _left_out_lines(report)), summary)


def to_markdown(report: RunReport) -> str:
    """The report as a page."""
    parts = [
        f"# {report.recipe.model} on {report.recipe.data}",
        _markdown_table(_SUMMARY, _summary_rows(report)),
        f"Top-1 in per cent on the {report.part} set ({report.after.count} samples), before and after compression, and "
        f"once more from the file as loaded by a fresh process. Bytes are the file's; the ratio is against the same "
        f"network in float32.",
        "## Every tensor",
        _markdown_table(_TENSORS, _tensor_rows(report)),
        *_left_out_lines(report),
        "## The recipe",
        "```yaml\n" + report.recipe.to_yaml() + "```",
    ]
    return "\n\n".join(parts) + "\n"


def _summary_rows(report: RunReport) -> list[tuple[str, ...]]:
    file = report.file
    return [
        ("float32", f"{report.before.accuracy:.2f} %", f"{file.float32_bytes:,}", "1×"),
        ("compressed", f"{report.after.accuracy:.2f} %", f"{file.bytes:,}", f"{report.ratio:.1f}×"),
        ("the file, reloaded", f"{report.reloaded.accuracy:.2f} %", "", ""),
    ]


def _tensor_rows(report: RunReport) -> list[tuple[str, ...]]:
    rows = [_tensor_row(t, report) for t in report.file.tensors]
    overhead = report.file.overhead_bytes
    share = f"{100 * overhead / report.file.bytes:.1f} %"
    return [*rows, ("(all names, shapes, …)", "", "", "", "", "", f"{overhead:,}", "", share)]


def _tensor_row(t: TensorReport, report: RunReport) -> tuple[str, ...]:
    return (
        t.name,
        "×".join(map(str, t.shape)) or "scalar",
        "" if t.pruning_rate is None else f"{t.pruning_rate:g}",
        "" if t.bits is None else str(t.bits),
        f"{100 * t.density:.1f} %",
        "" if t.levels is None else str(t.levels),
        f"{t.bytes:,}",
        f"{t.bits_per_element:.2f}",
        f"{100 * t.bytes / report.file.bytes:.1f} %",
    )


def _left_out_lines(report: RunReport) -> list[str]:
    """One line for each reason why tensors were not compressed, and one for each tied tensor."""
    reasons: dict[str, list[str]] = {}
    for name, reason in report.left_out.items():
        reasons.setdefault(reason, []).append(name)
    lines = [f"Not compressed ({reason}): {', '.join(names)}" for reason, names in reasons.items()]
    return lines + [f"{t.name} is {t.tied_to}, stored once" for t in report.file.tensors if t.tied_to]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
