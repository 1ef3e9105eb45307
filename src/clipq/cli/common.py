"""What the commands share: consoles, exit codes, JSON output."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from clipq.errors import ArchiveError

console = Console()
errors = Console(stderr=True)


class ExitCode(enum.IntEnum):
    """What the exit status of a command means. 2 is a wrong command line, 130 an interrupt by the user."""

    OK = 0
    BAD_INPUT = 1
    DIFFERENT = 3  # a check was made and failed: a damaged file, tensors that differ


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
