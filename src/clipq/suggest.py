"""The nearest valid name, for errors about a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str]) -> str:
    """A phrase to follow the wrong name in an error, such as " (did you mean 'mnist'?)"; empty if none is near."""
    matches = difflib.get_close_matches(name.lower(), list(valid), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
