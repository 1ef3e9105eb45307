"""Writes the page of all commands, from the program itself, while the documentation is built."""

from __future__ import annotations

import mkdocs_gen_files
import typer.main
from typer.cli import get_docs_for_click
from typer.core import TyperGroup

from clipq.cli.app import app

program = typer.main.get_command(app)
assert isinstance(program, TyperGroup)
context = program.make_context("clipq", [], resilient_parsing=True)
page = get_docs_for_click(obj=program, ctx=context, name="clipq")
with mkdocs_gen_files.open("commands.md", "w") as file:
    file.write(page)
