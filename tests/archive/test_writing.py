"""Writing is all or nothing: whatever stops it, what was there before is still whole."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clipq import archive
from clipq.archive import writer
from clipq.errors import ArchiveError

OLD = archive.encode_file({"w": np.zeros(10)})
NEW = archive.encode_file({"w": np.random.default_rng(0).normal(size=200_000)})
# Where the writer dies: at which call of which function, and whether the new file is in place by then.
DEATHS = [("open", 1, False), ("fsync", 1, False), ("chmod", 1, False), ("replace", 1, False)]
DEATHS += [("open", 2, True), ("fsync", 2, True)]  # those of the folder, after the rename


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "model.clipq"
    path.write_bytes(OLD)
    return path


@pytest.mark.parametrize(("call", "nth", "in_place"), DEATHS)
def test_dying_at_a_system_call_leaves_one_whole_file(call: str, nth: int, in_place: bool, target: Path) -> None:
    child = os.fork()
    if child == 0:
        calls, real = 0, getattr(os, call)

        def die(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        setattr(os, call, die)
        writer.write_file(target, NEW)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"os.{call} was not called"
    assert target.read_bytes() == (NEW if in_place else OLD)


def test_being_killed_at_any_moment_leaves_one_whole_file(target: Path) -> None:
    rng, seen = random.Random(0), set()
    for _ in range(200):
        child = os.fork()
        if child == 0:
            while True:
                writer.write_file(target, NEW)
                writer.write_file(target, OLD)
        time.sleep(rng.random() / 50)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        content = target.read_bytes()
        assert content in (OLD, NEW)
        seen.add(len(content))
    assert len(seen) == 2


@pytest.fixture
def small_files() -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(NEW) // 2, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
def test_running_out_of_space_leaves_the_old_file_and_nothing_else(target: Path) -> None:
    with pytest.raises(ArchiveError, match=r"model\.clipq cannot be written.*bytes free"):
        archive.write_file(target, NEW)
    assert target.read_bytes() == OLD
    assert os.listdir(target.parent) == ["model.clipq"]


def test_the_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="cannot be written"):
        archive.write_file(tmp_path / "none" / "m.clipq", OLD)


def test_an_old_files_permissions_are_kept(target: Path) -> None:
    target.chmod(0o640)
    archive.write_file(target, NEW)
    assert target.stat().st_mode & 0o777 == 0o640
