"""Read a file and print how much more memory that took, at most, than the decoded tensors."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np

from clipq import archive


def status(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def warm_up() -> None:
    """What takes memory once in a process: imports, compiled code, threads."""
    rng = np.random.default_rng(0)
    few, raw = rng.integers(0, 8, (64, 64)).astype(np.float32), rng.normal(size=2**19)
    with archive.Archive(archive.encode_file({"few": few, "raw": raw, "small": rng.normal(size=9)})) as file:
        file.read(threads=8)


def main(path: str, how: str) -> None:
    warm_up()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    with open(path, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        with archive.Archive({"path": path, "map": mapped, "file": opened, "url": f"file://{path}"}[how]) as file:
            arrays = file.read(threads=8)
            peak = status("VmHWM")
    mapped_bytes = Path(path).stat().st_size if how == "map" else 0  # pages of the file that the system may take back
    print(peak - before - sum(array.nbytes for array in arrays.values()) - mapped_bytes)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
