"""The kernels' shipped code, and the machine code that is kept of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clipq import archive
from clipq.archive import native
from clipq.archive.coder import code_tile
from clipq.archive.precompile import KERNELS

NAMES = ("decode_floats", "decode_tile", "encode_floats", "encode_tile")
NET = {
    "weight": np.random.default_rng(0).integers(-2, 3, (64, 32)).astype(np.float32),
    "bias": np.random.default_rng(0).standard_normal(64).astype(np.float32),
}
READ_AND_WRITE = """
import sys
sys.modules["numba"] = None  # importing it is an error
import numpy as np
from clipq import archive
from clipq.archive import native
made = []
compiled = native._compile
native._compile = lambda source: made.append(1) or compiled(source)
tensors = archive.Archive(sys.argv[1]).read()
assert archive.encode_file(tensors) == open(sys.argv[1], "rb").read()
print(len(made))
"""


def compiled_by_a_process(folder: Path, cache: Path) -> int:
    """How many kernels it had to compile to read a file, and to write it again."""
    (folder / "net.clipq").write_bytes(archive.encode_file(NET))
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", READ_AND_WRITE, str(folder / "net.clipq")]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_the_shipped_code_is_what_the_sources_give(tmp_path: Path) -> None:
    shipped = {path.stem: path.read_text() for path in KERNELS.glob("*.ll")}
    assert sorted(shipped) == list(NAMES)
    subprocess.run([sys.executable, "-m", "clipq.archive.precompile", str(tmp_path)], check=True)
    assert {path.stem: path.read_text() for path in tmp_path.glob("*.ll")} == shipped


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_code_needs_nothing_else(name: str) -> None:
    declared = [line for line in (KERNELS / f"{name}.ll").read_text().splitlines() if line.startswith("declare")]
    assert all("@llvm." in line for line in declared)


def test_without_numba_a_file_is_read_and_written_and_the_next_process_compiles_nothing(tmp_path: Path) -> None:
    assert [compiled_by_a_process(tmp_path, tmp_path / "cache") for _ in range(2)] == [4, 0]


def test_kept_machine_code_that_is_damaged_is_made_again(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    compiled_by_a_process(tmp_path, cache)
    kept = sorted(cache.glob("*.o"))
    kept[0].write_bytes(kept[0].read_bytes()[:-1])
    kept[1].write_bytes(b"")
    assert [compiled_by_a_process(tmp_path, cache) for _ in range(2)] == [2, 0]


def test_where_nothing_can_be_kept_every_process_compiles(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    assert [compiled_by_a_process(tmp_path, tmp_path / "cache") for _ in range(2)] == [4, 4]


def test_machine_code_is_kept_with_the_users_caches_if_not_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(native, "__file__", str(tmp_path / "package" / "native.py"))
    (tmp_path / "package").write_text("not a folder")
    code = native._machine_code("decode_tile")
    assert [path.name.partition("-")[0] for path in tmp_path.rglob("*.o")] == ["decode_tile"]
    monkeypatch.setattr(native, "_compile", lambda source: pytest.fail("it was compiled again"))
    assert native._machine_code("decode_tile") == code


def test_a_kernel_takes_the_arrays_that_it_is_made_for() -> None:
    with pytest.raises(TypeError, match="decode_tile takes contiguous 1-D arrays of uint8, not 1-D int64"):
        code_tile(True, np.zeros(4, np.int64), np.zeros(8, np.int32), 2, 1, 2, 0, 3, 1, 100, 250)
