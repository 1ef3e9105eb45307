"""What the commands share: consoles, exit codes, JSON output."""

from __future__ import annotations

import enum
import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from clipq.errors import ArchiveError

console = Console()
errors = Console(stderr=True)


class ExitCode(enum.IntEnum):
    """What the exit status of a command means. 2 is a wrong command line, 130 an interrupt by the user, 143 the signal
    SIGTERM."""

    OK = 0
    BAD_INPUT = 1
    DIFFERENT = 3  # a check was made and failed: a damaged file, tensors that differ


def size(text: str) -> int:
    """A number of bytes as written on the command line: 1000000, 500MB, 2GiB."""
    found = re.fullmatch(r"(\d+) *(?:([KMGT])(i?)B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise typer.BadParameter(f"{text!r} is no size; write it as 1000000, 500MB or 2GiB")
    power = "KMGT".index(found[2].upper()) + 1 if found[2] else 0
    unit: int = (1024 if found[3] else 1000) ** power
    return int(found[1]) * unit


Limit = Annotated[
    int | None,
    typer.Option(
        parser=size,
        metavar="SIZE",
        help="The most that the decoded tensors may take, such as 8GiB.",
        show_default="1GiB, or 4096 times the file",
    ),
]


def print_json(value: Any) -> None:
    """Write a report for programs: one JSON value on standard output, nothing else."""
    print(json.dumps(value, indent=2))


def file_to_write(path: Path, force: bool) -> Path:
    """The path, unless something is there that must not be lost.

    Raises:
        ArchiveError: there is a file already, and ``force`` is not given.
    """
    if path.exists() and not force:
        raise ArchiveError(f"{path} is there already; give another name with --out, or --force to replace it")
    return path
