"""``clipq pack`` and ``clipq unpack``: between ``.clipq`` and other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from clipq.cli.common import ExitCode, Limit, console, errors, file_to_write, print_json
from clipq.cli.inspect import as_dict, show


def pack(
    model: Annotated[
        Path,
        typer.Argument(
            help="A .safetensors, .pt, .npz, .npy or .onnx file, or a folder with config.json and weights.",
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="What to write.", show_default="MODEL.clipq; MODEL-clipq")] = None,
    effort: Annotated[
        Literal["default", "max"], typer.Option(help="max gives the smallest file, and takes longer.")
    ] = "default",
    bfloat16_rest: Annotated[
        bool, typer.Option("--bfloat16-rest", help="Round biases and norms to bfloat16: not exact, measure it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Put a model that any tool has quantized into a .clipq file; every bit of it comes back.

    Example: `clipq pack model.safetensors`

    Tensors of few distinct values become small; the others are stored as they are. Of a folder each file of weights
    becomes a .clipq file, and the other files are copied.
    """
    from clipq.files import save
    from clipq.folder import pack_folder
    from clipq.formats import read_metadata, read_state

    if model.is_dir():
        target = out or model.with_name(model.resolve().name + "-clipq")
        reports = pack_folder(model, target, effort=effort, bfloat16_rest=bfloat16_rest)
        if json:
            print_json({name: as_dict(report) for name, report in reports.items()})
            return
        for name, report in reports.items():
            show(report, str(target / name))
        return
    target = file_to_write(out or model.with_suffix(".clipq"), force)
    state = read_state(model)
    report = save(state, target, effort=effort, bfloat16_rest=bfloat16_rest, metadata=read_metadata(model))
    if json:
        print_json(as_dict(report))
    else:
        show(report, str(target))


def unpack(
    file: Annotated[Path, typer.Argument(help="A .clipq file, or a folder that pack made.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="The .safetensors or .npz file to write.", show_default="FILE.safetensors; FILE-unpacked"),
    ] = None,
    salvage: Annotated[
        bool, typer.Option("--salvage", help="Of a damaged file write the tensors that are whole, and name the others.")
    ] = False,
    limit: Limit = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Turn a .clipq file into a file of plain tensors.

    Example: `clipq unpack model.clipq --out model.safetensors`

    The exit code is 3 if `--salvage` found damage.
    """
    from clipq.archive import Archive
    from clipq.files import to_tensors
    from clipq.folder import unpack_folder
    from clipq.formats import write_state

    if file.is_dir():
        if salvage:
            raise typer.BadParameter("--salvage takes one file: give the damaged .clipq file of the folder")
        target = out or file.with_name(file.resolve().name + "-unpacked")
        for name, count in unpack_folder(file, target, limit=limit).items():
            console.print(f"{count} tensors: {target / name}", highlight=False)
        return
    target = file_to_write(out or file.with_suffix(".safetensors"), force)
    with Archive(file, limit=limit) as archive:
        arrays, damaged = archive.salvage() if salvage else (archive.read(), {})
        write_state(target, to_tensors(arrays), archive.metadata)
    for error in damaged.values():
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
    left_out = f", {len(damaged)} damaged and left out: {', '.join(damaged)}" if damaged else ""
    console.print(f"{len(arrays)} tensors, {target.stat().st_size:,} bytes: {target}{left_out}", highlight=False)
    raise typer.Exit(ExitCode.DIFFERENT if damaged else ExitCode.OK)
