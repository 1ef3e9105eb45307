"""What a search is to reach."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from clipq.errors import SearchError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Target:
    """What a search is to reach: exactly one of four.

    Attributes:
        ratio: bytes of the model as float32 over bytes of its file; above 1.
        bytes: of the file; a number, or text such as "1MB" (10**6) or "512KiB" (2**10).
        max_drop: how much worse the compressed model may be, in the units of ``evaluate``; above 0.
        trade_off: λ of the paper, section 3.3: what taking away the whole model's bytes is worth, in the units of
            ``evaluate``; above 0.

    Raises:
        SearchError: none or several are given, or a value is out of range.
    """

    ratio: float | None = None
    bytes: int | str | None = None
    max_drop: float | None = None
    trade_off: float | None = None

    def __post_init__(self) -> None:
        given = self.given()
        if len(given) != 1:
            got = f"got {' and '.join(given)}" if given else "none is given"
            raise SearchError(f"a search has one target of ratio, bytes, max_drop and trade_off; {got}: give one")
        (name, value), least = next(iter(given.items())), 1 if self.ratio is not None else 0
        number = parse_bytes(value) if name == "bytes" else value
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise SearchError(f"{name} is {value!r}; give a finite number")
        if number <= least:
            raise SearchError(f"{name} is {value!r}; it must be above {least}")

    def given(self) -> dict[str, float | int | str]:
        """The one that is set."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def file_bytes(self, float32_bytes: int) -> int | None:
        """The most bytes that the file may have; None if that is not what is asked for."""
        if self.ratio is not None:
            return int(float32_bytes / self.ratio)
        return None if self.bytes is None else parse_bytes(self.bytes)


def parse_bytes(text: int | float | str) -> int:
    """A number of bytes from text such as "1MB", "512 KiB" or "30000".

    Raises:
        SearchError: it is no such text.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].lower() not in _UNITS:
        raise SearchError(
            f"{text!r} is no number of bytes; give one such as 30000, 500KB (500,000) or 1MiB (1,048,576)"
        )
    return int(float(match[1]) * _UNITS[match[2].lower()])
