"""Several processes agree without talking: clipq sends nothing, and the ranks stay equal bit for bit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.zoo import KINDS

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_two_ranks_end_with_equal_bits_whatever_their_hash_seed(tmp_path: Path) -> None:
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    environment |= {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.workers.data_parallel", str(tmp_path)],
            env=environment | {"RANK": str(rank), "PYTHONHASHSEED": str(17 + rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
    for number, kind in enumerate(KINDS):
        one, two = (torch.load(tmp_path / f"{number}.{rank}.pt", weights_only=True) for rank in range(2))
        for part in ("quantized", "full"):
            assert one[part].keys() == two[part].keys()
            for name in one[part]:
                assert torch.equal(one[part][name], two[part][name]), (kind, part, name)
