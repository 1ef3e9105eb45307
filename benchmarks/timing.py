"""What the timed benchmarks share: interleaved repeats, medians with their spread, the machine's name, JSON."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(
    actions: Mapping[str, Callable[[], object]], repeats: int, between: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds that each action took, one list of ``repeats`` values each; the actions take turns, after one warm-up.

    Args:
        between: called, untimed, before each action.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(repeats + 1):
        for name, action in actions.items():
            between()
            start = time.perf_counter()
            action()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and least of some measurements."""
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": quarters[1], "lower quartile": quarters[0], "upper quartile": quarters[2], "least": min(values)}


def ratios(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Spread of one action's times over another's in the same turn; under "of the least", the least over the least."""
    by_turn = [a / b for a, b in zip(values, others, strict=True)]
    return {**spread(by_turn), "of the least": min(values) / min(others)}


def machine() -> dict[str, Any]:
    """What a result was measured on."""
    return {"processor": processor(), "cores": torch.get_num_threads(), "torch": torch.__version__}


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what resource tells includes what the parent process held when it started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write_json(name: str, results: Mapping[str, Any]) -> None:
    """Write ``benchmarks/results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")


def read_json(name: str) -> dict[str, Any]:
    """What `write_json` wrote, or nothing."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def replace_between(page: Path, mark: str, text: str) -> None:
    """Put ``text`` between the two places of a page that say ``<!-- MARK -->``."""
    marker = f"<!-- {mark} -->"
    before, _, rest = page.read_text().partition(marker)
    _, found, after = rest.partition(marker)
    if not found:
        raise ValueError(f"{page.name} does not have two lines {marker}")
    page.write_text(f"{before}{marker}\n\n{text}\n\n{marker}{after}")
