"""The ``clipq`` program: its commands, and what becomes of an error."""

from __future__ import annotations

import _thread
import sys
import threading
from typing import TYPE_CHECKING

import typer

from clipq.cli.bench_data import bench_data
from clipq.cli.common import ExitCode, errors
from clipq.cli.compress import COMMAND as COMPRESS
from clipq.cli.demo import demo
from clipq.cli.diff import diff
from clipq.cli.evaluate import evaluate
from clipq.cli.inspect import inspect, verify
from clipq.cli.pack import pack, unpack
from clipq.cli.search import COMMAND as SEARCH
from clipq.errors import ClipqError, Interrupted

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

app = typer.Typer(
    name="clipq",
    help="Smaller neural networks at the same accuracy: CLIP-Q compression for PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

app.command("compress", no_args_is_help=True)(COMPRESS)
app.command("search", no_args_is_help=True)(SEARCH)
app.command("evaluate")(evaluate)
app.command("bench-data")(bench_data)
app.command("demo")(demo)
app.command("pack")(pack)
app.command("unpack")(unpack)
app.command("diff")(diff)
app.command("inspect")(inspect)
app.command("verify")(verify)


def main() -> None:
    """Run the command line; an error of clipq's own becomes one message and a non-zero exit code."""
    sys.unraisablehook = _interrupt_again
    try:
        app(prog_name="clipq")
    except Interrupted as interrupted:
        errors.print(str(interrupted), markup=False, highlight=False, soft_wrap=True)
        sys.exit(128 + interrupted.signal)
    except ClipqError as error:
        errors.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(ExitCode.BAD_INPUT)


def _interrupt_again(dropped: UnraisableHookArgs) -> None:
    """Python drops what is raised in a destructor or a callback of a weak reference: give an interrupt anew, later."""
    if dropped.exc_type is KeyboardInterrupt:
        again = threading.Timer(0.1, _thread.interrupt_main)
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(dropped)
