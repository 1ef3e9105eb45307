"""What tests of several rooms share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pooch
import pytest

PACKED = Path(__file__).resolve().parents[2] / "shared" / "data"
CPU_TORCHVISION = Path(__file__).parent / "cpu_torchvision"
declared = runpy.run_path(str(CPU_TORCHVISION / "sitecustomize.py"))

# A shell ignores SIGINT for what a script of it starts in the background, and so would all programs that are tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def vision(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision, in this process and in those it starts; the test is skipped without it."""
    pytest.importorskip("torchvision", reason="needs torchvision: pip install 'clipq[vision]'")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(CPU_TORCHVISION), *filter(None, [os.environ.get("PYTHONPATH")])])
    )


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real data, ``mnist/`` and its neighbours; the test is skipped if there is none.

    It is CLIPQ_DATA if that is set. Otherwise ``../shared/data`` beside the checkout is unpacked into the user's
    cache folder, once for all runs.
    """
    if os.environ.get("CLIPQ_DATA"):
        return Path(os.environ["CLIPQ_DATA"])
    unpack = PACKED / "unpack.py"
    if not unpack.exists():
        pytest.skip("no real data: set CLIPQ_DATA to its folder, or put shared/data beside the checkout")
    version = hashlib.sha256(unpack.read_bytes()).hexdigest()[:12]
    folder = Path(pooch.os_cache("clipq")) / f"tests-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes that run side by side wait for the first one
        command = [sys.executable, str(unpack), "--to", str(folder), "mnist", "cifar10", "photos", "weights"]
        subprocess.run(command, check=True, capture_output=True)
    return folder
