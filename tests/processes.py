"""Processes of one process group, started as a launcher starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping


def run_processes(
    module: str, arguments: list[str], number: int, seconds: float, environment: Mapping[str, str] = os.environ
) -> None:
    """Run a module in so many processes with ranks; fails if one of them does, or if they take too long."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**environment, **shared, "RANK": str(rank), "PYTHONHASHSEED": str(17 + rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    try:
        for process in processes:
            _, stderr = process.communicate(timeout=seconds)
            assert process.returncode == 0, stderr
    finally:
        for process in processes:
            process.kill()
            process.communicate()
