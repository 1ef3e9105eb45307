"""Real runs of ``clipq compress`` that are killed and gone on with, alone or of several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Way = Literal["SIGKILL", "SIGTERM", "lost worker"]
"""How a run dies: all its processes by SIGKILL, the one that was started by SIGTERM, or one of torchrun's workers."""
NET = """
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 10),
    )
"""
ARGUMENTS = [
    *(
        "--model",
        "net.py:net",
        "--data",
        "digits",
        "--optimizer",
        "adam",
        "--learning-rate",
        "0.004",
        "--clip-norm",
        "2",
    ),
    *("--pruning-rate", "0.7", "--bits", "3", "--accumulate", "2", "--ema", "0.9", "--distillation", "0.3"),
    *("--batch-norm-batches", "2", "--checkpoint-steps", "4"),
]


@dataclass(frozen=True)
class Death:
    """What happened to a run that was killed.

    Attributes:
        at: its last checkpoint then; "none" before the first, "report" if it had finished.
        seconds: it took to leave.
        code: its exit code then; None if torchrun went on by itself.
        left: the program's last words.
    """

    at: str
    seconds: float
    code: int | None
    left: str


def start(folder: Path, processes: int, *arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    (folder / "net.py").write_text(NET)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher = [*launcher, f"--max-restarts={restarts}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "clipq", "compress", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr.txt").open("a"),
        text=True,
    )


def run_whole(folder: Path, processes: int, length: list[str]) -> float:
    """A run without a break, in ``folder / "run"``; the seconds from its folder's beginning to its report."""
    process = start(folder, processes, *ARGUMENTS, *length, "--out", "run")
    began = wait_for(folder / "run" / "recipe.yaml", process)
    assert process.wait(600) == 0, (folder / "stderr.txt").read_text()
    return time.monotonic() - began


def kill(folder: Path, processes: int, length: list[str], way: Way, after: float) -> Death:
    """Start a run, kill it so many seconds after its folder began, and go on with it to the end."""
    restarts = 1 if way == "lost worker" else 0
    process = start(folder, processes, *ARGUMENTS, *length, "--out", "run", restarts=restarts)
    wait_for(folder / "run" / "recipe.yaml", process)
    time.sleep(after)
    at = last_checkpoint(folder / "run")
    began = time.monotonic()
    if way == "lost worker":
        for worker in children(process.pid)[-1:]:
            os.kill(worker, signal.SIGKILL)
        code, seconds = process.wait(600), 0.0
        assert code == 0, (folder / "stderr.txt").read_text()
        return Death(at, seconds, None, "")
    if way == "SIGTERM":
        process.terminate()
    else:
        for number in [process.pid, *children(process.pid)]:  # torchrun's workers outlive it otherwise
            os.kill(number, signal.SIGKILL)
    code = process.wait(120)
    left = (folder / "stderr.txt").read_text().strip().rpartition("\n")[2]
    seconds = time.monotonic() - began
    again = start(folder, processes, "--resume", "run")
    assert again.wait(600) == 0, (folder / "stderr.txt").read_text()
    return Death(at, seconds, code, left)


def result_of(run: Path) -> dict[str, Any]:
    """Everything that must not depend on whether a run was killed."""
    report = json.loads((run / "report.json").read_text())
    epochs = [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in report["epochs"]]
    files = {name: (run / name).read_bytes() for name in ("model.clipq", "plan.json", "weights.safetensors")}
    return {"scores": report["scores"], "epochs": epochs, "tensors": report["tensors"], **files}


def last_checkpoint(run: Path) -> str:
    if (run / "report.json").exists():
        return "report"
    folder = run / "checkpoints"
    names = [p.stem for p in folder.iterdir() if p.suffix == ".pt"] if folder.exists() else []
    return max(names, key=lambda name: (name.startswith("compress"), name), default="none")


def wait_for(path: Path, process: subprocess.Popen[str]) -> float:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, "the run ended before it began"
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)
    return time.monotonic()


def children(pid: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
