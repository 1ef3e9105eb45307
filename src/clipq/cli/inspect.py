"""``clipq inspect`` and ``clipq verify``: what is in a ``.clipq`` file, and whether it is whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipq.cli.common import ExitCode, Limit, console, errors, print_json

if TYPE_CHECKING:
    from clipq.files import FileReport


def inspect(
    file: Annotated[Path, typer.Argument(help="A .clipq file.", show_default=False)],
    limit: Limit = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show every tensor of a file: shape, p, b, density, levels, bytes, share; and the totals.

    Example: `clipq inspect model.clipq`
    """
    from clipq.archive import Archive
    from clipq.files import report

    with Archive(file, limit=limit) as archive:
        found = report(archive, archive.read())
    if json:
        print_json(as_dict(found))
    else:
        show(found, str(file))


def verify(
    file: Annotated[Path, typer.Argument(help="A .clipq file.", show_default=False)],
    limit: Limit = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Check a file whole: structure, checksums, every tensor decoded.

    Example: `clipq verify model.clipq`

    The exit code is 0 for a whole file, 3 for one with damaged tensors, and 1 for one that cannot be read at all.
    """
    from clipq.archive import Archive

    with Archive(file, limit=limit) as archive:
        whole, damaged = archive.salvage()
    if json:
        print_json({"whole": list(whole), "damaged": {name: str(error) for name, error in damaged.items()}})
    else:
        for name, error in damaged.items():
            errors.print(f"{name}: {error}", markup=False, highlight=False)
        console.print(f"{file}: {len(whole)} tensors whole, {len(damaged)} damaged", highlight=False)
    raise typer.Exit(ExitCode.DIFFERENT if damaged else ExitCode.OK)


def as_dict(report: FileReport) -> dict[str, Any]:
    """The report as plain values."""
    ratio = report.float32_bytes / report.bytes
    return dataclasses.asdict(report) | {"overhead_bytes": report.overhead_bytes, "ratio": ratio}


def show(report: FileReport, title: str) -> None:
    """The report for a person."""
    from clipq.report.tables import TENSOR_COLUMNS, table, tensor_rows

    console.print(table(title, TENSOR_COLUMNS, tensor_rows(report)))
    console.print(
        f"{report.bytes:,} bytes; {report.float32_bytes:,} as float32: {report.float32_bytes / report.bytes:.1f}×",
        highlight=False,
    )
