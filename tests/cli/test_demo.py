"""The demonstration does what it promises: a far smaller file that loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_the_demo_ends_with_a_file_twenty_times_smaller_and_as_accurate(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "clipq", "demo"],
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "runs/demo/report.json").read_text())
    assert report["bytes"]["ratio"] >= 20
    assert report["bytes"]["file"] == (tmp_path / "runs/demo/model.clipq").stat().st_size
    assert report["accuracy"]["reloaded"] >= report["accuracy"]["before"] - 0.5
    assert (tmp_path / "runs/demo/report.png").read_bytes().startswith(b"\x89PNG")
    assert f"{report['bytes']['file']:,}" in result.stdout
    assert "…" not in result.stdout, "the tables fit into a terminal of 80 columns"
