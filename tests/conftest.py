"""What tests of several rooms share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pooch
import pytest

PACKED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with ``mnist/``, ``cifar-10-batches-bin/`` and ``weights/``; the test is skipped if there is none.

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
        command = [sys.executable, str(unpack), "--to", str(folder), "mnist", "cifar10", "weights"]
        subprocess.run(command, check=True, capture_output=True)
    return folder
