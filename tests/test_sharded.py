"""Models that are split over processes (FSDP2, DTensors) have the bits of one process; real processes over gloo."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.processes import run_processes

pytestmark = pytest.mark.slow
WORKER = "tests.workers.sharded"


@pytest.mark.parametrize("number", [2, 4])
def test_processes_that_share_a_model(number: int, tmp_path: Path) -> None:
    run_processes(WORKER, [str(tmp_path)], number, seconds=280)


def test_triton_kernels(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    check = "triton_kernels_have_the_bits_of_one_process"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run_processes(WORKER, [str(tmp_path), check], 2, seconds=280, environment=environment)
