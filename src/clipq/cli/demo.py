"""``clipq demo``: the main job with nothing downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipq.cli.common import console, print_json
from clipq.cli.progress import Progress
from clipq.report.run import to_table


def demo(
    out: Annotated[Path, typer.Option(help="The run folder; an earlier demo there is replaced.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the initial weights and the order of the data.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Train a small network on scikit-learn's digits, compress it, and show what came out.

    Example: `clipq demo`

    Needs no download and takes less than a minute on two cores.
    """
    from clipq import demo as subject
    from clipq.finetune.compress import compress
    from clipq.report.plots import plot_run

    with Progress(quiet=json) as progress:
        report = compress(subject.recipe(seed), out, progress, force=True)
    plot_run(report, out / "report.png")
    if json:
        print_json(report.to_dict())
    else:
        console.print(to_table(report))
        console.print(f"The plot is {out / 'report.png'}; the compressed network is {out / 'model.clipq'}")
