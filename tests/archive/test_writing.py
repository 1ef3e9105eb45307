"""Writing is all or nothing: whatever stops it, what was there before is still whole."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
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
EFFORTS: tuple[archive.Effort, ...] = ("default", "max")
TRACEME, RESUME_TO_SYSTEM_CALL = 0, 24  # of ptrace
PTRACE = ctypes.CDLL(None).ptrace
PTRACE.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "model.clipq"
    path.write_bytes(OLD)
    return path


def write_until_stop(target: Path, stop: int) -> bool:
    """Write a file in a process of its own that is killed at the given one of its system calls' starts and ends.

    Returns:
        Whether it was killed, and not through before.
    """
    child = os.fork()
    if child == 0:
        PTRACE(TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        writer.write_file(target, NEW)
        os._exit(0)
    os.waitpid(child, 0)
    for _ in range(stop + 1):
        PTRACE(RESUME_TO_SYSTEM_CALL, child, None, None)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="system calls are stopped at as Linux does it")
def test_dying_before_or_after_any_system_call_leaves_one_whole_file(target: Path) -> None:
    stop, seen = 0, []
    while write_until_stop(target, stop):
        content = target.read_bytes()
        assert content in (OLD, NEW), f"stop {stop}"
        seen.append(content == NEW)
        for file in target.parent.iterdir():
            if file != target:
                file.unlink()
        target.write_bytes(OLD)
        stop += 1
    assert stop > 20
    assert seen == sorted(seen), "once it is there, the new file stays"
    assert {False, True} == set(seen)


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


@pytest.mark.skipif(shutil.which("unshare") is None, reason="a full disk is made with unshare")
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    room = len(NEW) // 2
    script = f"""
import pathlib
from clipq import archive, errors
target = pathlib.Path({str(tmp_path / "m.clipq")!r})
archive.write_file(target, b"old")
try:
    archive.write_file(target, bytes({len(NEW)}))
except errors.ArchiveError as error:
    print(error, target.read_bytes(), [path.name for path in target.parent.iterdir()])
"""
    mount = f'mount -t tmpfs -o size={room} none "$1" && exec "$2" -c "$3"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, script]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unshare" in result.stderr or "mount" in result.stderr:
        pytest.skip(f"no small disk can be mounted here: {result.stderr.strip()}")
    assert "No space left on device; nothing there was changed" in result.stdout
    assert result.stdout.endswith("b'old' ['m.clipq']\n")


def test_the_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="cannot be written"):
        archive.write_file(tmp_path / "none" / "m.clipq", OLD)


def test_an_old_files_permissions_are_kept(target: Path) -> None:
    target.chmod(0o640)
    archive.write_file(target, NEW)
    assert target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("most_bytes", [0, 2000, 2**20])
def test_tensors_that_were_encoded_before_change_no_byte(most_bytes: int) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, writer.Array] = {
        "codes": rng.integers(0, 5, (60, 400)).astype(np.float32),
        "alike": rng.integers(0, 5, (400, 60)).astype(np.float32),
        "raw": rng.normal(size=30_000).astype(np.float32),
        "small": rng.normal(size=7).astype(np.float16),
        "empty": np.zeros((0, 3), np.float32),
    }
    tensors["alike"][:] = tensors["codes"].reshape(400, 60)
    known = archive.EncodedTensors(most_bytes)
    for _ in range(12):
        for effort in EFFORTS:
            again = archive.encode_file(tensors, effort=effort, known=known)
            assert again == archive.encode_file(tensors, effort=effort)
        changed = tensors[str(rng.choice(["codes", "raw", "small"]))]
        changed.reshape(-1)[int(rng.integers(changed.size))] += 1


@pytest.mark.slow
def test_the_largest_effort_takes_no_more_where_the_first_tile_is_unlike_the_others() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (4096, 1024))
    centre = np.repeat(rng.integers(-8, 8, 64), 16)[:, None]
    codes[:1024] = np.clip(centre + rng.integers(-1, 2, (1024, 1024)), -8, 7)
    default, most = (archive.encoded_size(codes.astype(np.float32), effort) for effort in EFFORTS)
    assert most <= default


def test_a_tensor_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    encode = writer._encode_tensor
    monkeypatch.setattr(writer, "_encode_tensor", lambda *arguments: calls.append(1) or encode(*arguments))
    known = archive.EncodedTensors()
    tensors = {name: np.full((4, 5), float(i)) for i, name in enumerate("abc")}
    for _ in range(3):
        archive.encode_file(tensors, known=known)
    assert len(calls) == 3
    archive.encode_file(tensors | {"b": np.zeros((2, 2))}, known=known)
    assert len(calls) == 4
