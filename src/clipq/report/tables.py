"""Rows of text as a table for a terminal, or for a page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from clipq.files import FileReport, TensorReport

TENSOR_COLUMNS = ("tensor", "shape", "p", "b", "density", "levels", "bytes", "bits each", "share")


def tensor_rows(file: FileReport) -> list[tuple[str, ...]]:
    """One row for each tensor of a file, and one for what is no tensor's."""
    rows = [_tensor_row(t, file) for t in file.tensors]
    overhead = file.overhead_bytes
    return [*rows, ("(the header)", "", "", "", "", "", f"{overhead:,}", "", _share(overhead, file))]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """For a terminal; all columns but the first are aligned right."""
    made = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in made.columns[1:]:
        column.justify = "right"
    for row in rows:
        made.add_row(*row)
    return made


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """For a page; all columns but the first are aligned right."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _tensor_row(t: TensorReport, file: FileReport) -> tuple[str, ...]:
    return (
        t.name,
        "×".join(map(str, t.shape)) or "scalar",
        "" if t.pruning_rate is None else f"{t.pruning_rate:g}",
        "" if t.bits is None else str(t.bits),
        f"{100 * t.density:.1f} %",
        "" if t.levels is None else str(t.levels),
        f"{t.bytes:,}" if t.tied_to is None else f"= {t.tied_to}",
        f"{t.bits_per_element:.2f}",
        _share(t.bytes, file),
    )


def _share(size: int, file: FileReport) -> str:
    return f"{100 * size / file.bytes:.1f} %"
