"""What the commands share: consoles, exit codes, JSON output."""

from __future__ import annotations

import enum
import json
from typing import Any

from rich.console import Console

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
