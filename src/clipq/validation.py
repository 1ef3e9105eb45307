"""Turns what pydantic found wrong with a file into a message for the person who wrote the file."""

from __future__ import annotations

from collections.abc import Iterable

import pydantic

from clipq.suggest import nearest


def explain(error: pydantic.ValidationError, fields: Iterable[str]) -> str:
    """One indented line per finding: where, what value, what is accepted; an unknown field with the nearest name.

    Args:
        fields: all field names the file may have, for the suggestion.
    """
    lines = []
    for finding in error.errors(include_url=False):
        where = ".".join(str(part) for part in finding["loc"]) or "(whole file)"
        if finding["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            near = nearest(str(finding["loc"][-1]), fields) or f"; known are {', '.join(fields)}"
            lines.append(f"  {where}: unknown field{near}")
        else:
            message = finding["msg"].removeprefix("Value error, ")
            got = finding.get("input")
            shown = "" if isinstance(got, dict | list) or finding["type"] == "missing" else f" (got {got!r})"
            lines.append(f"  {where}: {message[0].lower()}{message[1:]}{shown}")
    return "\n".join(lines)
