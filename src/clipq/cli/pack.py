"""``clipq pack`` and ``clipq unpack``: between ``.clipq`` and other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from clipq.cli.common import console, file_to_write, print_json
from clipq.cli.inspect import as_dict, show


def pack(
    model: Annotated[Path, typer.Argument(help="A .safetensors or .pt file of tensors.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The file to write.", show_default="MODEL.clipq")] = None,
    effort: Annotated[
        Literal["default", "max"], typer.Option(help="max gives the smallest file, and takes longer.")
    ] = "default",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Put a model that any tool has quantized into a .clipq file; every bit of it comes back.

    Example: `clipq pack model.safetensors`

    Tensors of few distinct values become small; the others are stored as they are.
    """
    from clipq.files import save
    from clipq.formats import read_state

    target = file_to_write(out or model.with_suffix(".clipq"), force)
    report = save(read_state(model), target, effort=effort)
    if json:
        print_json(as_dict(report))
    else:
        show(report, str(target))


def unpack(
    file: Annotated[Path, typer.Argument(help="A .clipq file.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The file to write.", show_default="FILE.safetensors")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Turn a .clipq file into a .safetensors file of plain tensors.

    Example: `clipq unpack model.clipq --out model.safetensors`
    """
    from clipq.files import load
    from clipq.formats import write_state

    target = file_to_write(out or file.with_suffix(".safetensors"), force)
    tensors = load(file)
    write_state(target, tensors)
    console.print(f"{len(tensors)} tensors, {target.stat().st_size:,} bytes: {target}", highlight=False)
