"""The command line: one module per command; each parses, calls and prints."""

from clipq.cli.app import main

__all__ = ["main"]
