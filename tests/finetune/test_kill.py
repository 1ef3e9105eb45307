"""Whole runs, killed at random moments: what comes out is what comes of a run without a break, bit for bit.

Twenty moments are measured by ``benchmarks/kill.py``; here are a few.
"""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

import pytest

from tests.killing import Way, kill, result_of, run_whole

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds a process's children in /proc"),
]
LENGTH = ["--float-epochs", "2", "--epochs", "6"]


@pytest.mark.parametrize(("processes", "ways"), [(1, ["SIGKILL", "SIGTERM"]), (2, ["lost worker"])])
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(processes: int, ways: list[Way], tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    seconds = run_whole(tmp_path / "whole", processes, LENGTH)
    expected = result_of(tmp_path / "whole" / "run")
    for way in ways:
        folder = tmp_path / way.replace(" ", "-")
        folder.mkdir()
        death = kill(folder, processes, LENGTH, way, random.uniform(0.2, 0.8) * seconds)
        assert result_of(folder / "run") == expected, (way, death)
        if way == "SIGTERM" and "stopped after step" in death.left:
            assert death.code == 128 + signal.SIGTERM
            assert "the last good state is in run/checkpoints/" in death.left
