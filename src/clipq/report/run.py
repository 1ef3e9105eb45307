"""What came out of one compression run."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Group
from rich.text import Text
from torch import nn

from clipq.files import FileReport
from clipq.finetune.score import Score
from clipq.finetune.watch import EpochRecord
from clipq.plan import Plan
from clipq.recipe import Recipe
from clipq.report.tables import TENSOR_COLUMNS, markdown, table, tensor_rows


@dataclass(frozen=True)
class ExactRest:
    """What came out before biases and norms were rounded to bfloat16."""

    score: Score
    bytes: int


@dataclass(frozen=True)
class Aim:
    """What the plan of a run was searched for.

    Attributes:
        target: as it was given.
        bytes: the most that the file may have: of the target, or what the search found to meet it.
        drop: points of validation accuracy lost, if the target is a drop.
    """

    target: Mapping[str, float | int | str]
    bytes: int
    drop: float | None = None

    def met_by(self, file_bytes: int) -> bool:
        """Whether a file, and the network in it, is what was asked for."""
        (_, wanted), *_ = self.target.items()
        return file_bytes <= self.bytes and (self.drop is None or self.drop <= float(wanted))


@dataclass(frozen=True)
class RunReport:
    """A compression run: accuracies, bytes on disk, every tensor, every epoch.

    Attributes:
        part: what the accuracies were measured on, "test" or "validation".
        before, after: the float network, and the quantized one that was trained.
        reloaded: measured by a fresh process that loaded the file; equal to ``after``.
        file: the compressed file and every tensor in it.
        left_out: why a tensor was not compressed, by name.
        exact: if the recipe rounds biases and norms to bfloat16, what came out without that.
        aim: what the plan was searched for, if it was.
    """

    recipe: Recipe
    part: str
    before: Score
    after: Score
    reloaded: Score
    file: FileReport
    left_out: dict[str, str]
    epochs: tuple[EpochRecord, ...]
    exact: ExactRest | None = None
    aim: Aim | None = None

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
        exact: ExactRest | None = None,
        aim: Aim | None = None,
    ) -> RunReport:
        return cls(recipe, part, before, after, reloaded, file, plan.left_out(network), tuple(epochs), exact, aim)

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
            "exact_rest": self.exact and {"accuracy": self.exact.score.accuracy, **dataclasses.asdict(self.exact)},
            "search": None
            if self.aim is None
            else dataclasses.asdict(self.aim) | {"met": self.aim.met_by(self.file.bytes)},
            "tensors": [dataclasses.asdict(t) | {"left_out": self.left_out.get(t.name)} for t in self.file.tensors],
            "epochs": [dataclasses.asdict(e) for e in self.epochs],
            "versions": {"clipq": version("clipq"), "torch": torch.__version__, "python": platform.python_version()},
        }


_SUMMARY = ("", "top-1", "bytes", "ratio")
_NAMES_SHOWN = 6


def to_table(report: RunReport) -> Group:
    """The report for a terminal."""
    return Group(
        table("Every tensor of the file", TENSOR_COLUMNS, tensor_rows(report.file)),
        *(Text(line) for line in _left_out_lines(report, most=_NAMES_SHOWN)),
        table(f"{report.recipe.model} on {report.recipe.data}", _SUMMARY, _summary_rows(report)),
        *([] if report.aim is None else [Text(aim_line(report.aim, report.file.bytes))]),
    )


def to_markdown(report: RunReport) -> str:
    """The report as a page."""
    parts = [
        f"# {report.recipe.model} on {report.recipe.data}",
        markdown(_SUMMARY, _summary_rows(report)),
        f"Top-1 in per cent on the {report.part} set ({report.after.count} labels), before and after compression, and "
        f"once more from the file as loaded by a fresh process. Bytes are the file's; the ratio is against the same "
        f"network in float32.",
        *_aim_section(report),
        "## Every tensor",
        markdown(TENSOR_COLUMNS, tensor_rows(report.file)),
        *_left_out_lines(report),
        "## The recipe",
        "```yaml\n" + report.recipe.to_yaml() + "```",
    ]
    return "\n\n".join(parts) + "\n"


def _summary_rows(report: RunReport) -> list[tuple[str, ...]]:
    file = report.file
    rounded = [
        (
            "with exact biases and norms",
            f"{exact.score.accuracy:.2f} %",
            f"{exact.bytes:,}",
            f"{file.float32_bytes / exact.bytes:.1f}×",
        )
        for exact in ([report.exact] if report.exact else [])
    ]
    return [
        ("float32", f"{report.before.accuracy:.2f} %", f"{file.float32_bytes:,}", "1×"),
        *rounded,
        ("compressed", f"{report.after.accuracy:.2f} %", f"{file.bytes:,}", f"{report.ratio:.1f}×"),
        ("the file, reloaded", f"{report.reloaded.accuracy:.2f} %", "", ""),
    ]


def _left_out_lines(report: RunReport, most: int | None = None) -> list[str]:
    """One line for each reason why tensors were not compressed, with the names of at most so many."""
    reasons: dict[str, list[str]] = {}
    for name, reason in report.left_out.items():
        reasons.setdefault(reason, []).append(name)
    lines = []
    for reason, names in reasons.items():
        rest = len(names[most:]) if most else 0
        shown = [*names[:most], f"and {rest} more, which report.md names"] if rest else names
        lines.append(f"Not compressed ({reason}): {', '.join(shown)}")
    return lines


def aim_line(aim: Aim, file_bytes: int) -> str:
    """What was asked for, and what came of it."""
    (name, value), *_ = aim.target.items()
    wanted = f"{name.replace('_', ' ')} {value}"
    size = (
        f"{file_bytes:,} bytes, {100 * (1 - file_bytes / aim.bytes):.2f} % below"
        if file_bytes <= aim.bytes
        else (f"{file_bytes:,} bytes, above")
    )
    lost = "" if aim.drop is None else f", and {aim.drop:.2f} points of validation accuracy are lost"
    verdict = "The target is met" if aim.met_by(file_bytes) else "The target is not met"
    return f"{verdict}: {wanted}, a file of at most {aim.bytes:,} bytes. The file has {size}{lost}."


def _aim_section(report: RunReport) -> list[str]:
    if report.aim is None:
        return []
    line = aim_line(report.aim, report.file.bytes)
    return ["## The target", f"{line} How the plan was found is in [search.html](search.html)."]
