"""Compiled code is kept for the next process where that can be, and where it cannot things go on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.caching import CacheImpl

from clipq.jit import compiled

MODULE = """
import resource, sys
from clipq.jit import compiled

@compiled
def twice(x):
    return 2 * x

@compiled
def thrice(x):
    return 3 * x

if sys.argv[1] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
print(twice(21), thrice(14), sum(twice.stats.cache_hits.values()))
"""


def run(tmp_path: Path, disk: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "module.py").write_text(MODULE)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "module.py"), disk]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True)


def test_the_next_process_compiles_nothing(tmp_path: Path) -> None:
    assert [run(tmp_path, "free").stdout.split() for _ in range(2)] == [["42", "42", "0"], ["42", "42", "1"]]


def test_on_a_full_disk_it_is_compiled_anew_and_said_once(tmp_path: Path) -> None:
    for _ in range(2):
        result = run(tmp_path, "full")
        assert result.stdout.split() == ["42", "42", "0"]
        assert result.stderr.count("compiled code cannot be kept in") == 1
        assert "set NUMBA_CACHE_DIR to another folder" in result.stderr


def test_without_a_folder_to_keep_it_in_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])

    @compiled
    def twice(x: int) -> int:
        return 2 * x

    assert twice(21) == 42
