"""``clipq diff``: which tensors of two files differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from clipq.cli.common import ExitCode, Limit, console, print_json


def diff(
    a: Annotated[Path, typer.Argument(help="A .clipq file, or any other that pack takes.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="The one to compare it with.", show_default=False)],
    limit: Limit = None,
    json: Annotated[bool, typer.Option("--json", help="Print the differences as JSON.")] = False,
) -> None:
    """Show which tensors of two files differ, and by how much.

    Example: `clipq diff before.safetensors after.clipq`

    Tensors are the same if name, dtype, shape and every bit are. The exit code is 0 if all are, and 3 if not.
    """
    from clipq.compare import differences
    from clipq.formats import read_state
    from clipq.report.tables import table

    left, right = read_state(a, limit=limit), read_state(b, limit=limit)
    found = differences(left, right)
    same = len(left) - sum(difference.a is not None for difference in found)
    if json:
        print_json({"same": same, "different": [dataclasses.asdict(difference) for difference in found]})
    else:
        if found:
            rows = [
                (
                    d.name,
                    d.what if d.what in ("only in A", "only in B", "values") else f"{d.a} → {d.b}",
                    "" if d.count is None else f"{d.count:,} of {d.elements:,}",
                    "" if d.max_abs is None else f"{d.max_abs:.3g}",
                    "" if d.relative is None else f"{d.relative:.3g}",
                    str(d.not_finite or ""),
                )
                for d in found
            ]
            columns = ("tensor", "differs in", "elements", "max |a − b|", "‖a − b‖ / ‖a‖", "not finite")
            console.print(table(f"A is {a}, B is {b}", columns, rows))
        console.print(f"{same} tensors are the same, {len(found)} differ", highlight=False)
    raise typer.Exit(ExitCode.DIFFERENT if found else ExitCode.OK)
