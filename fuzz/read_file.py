"""Fuzz the reader with atheris: structure-aware mutations, guided by coverage.

    python fuzz/read_file.py fuzz/corpus -max_total_time=60

The first folder gets the inputs that reach something new; further ones are read only.

Any exception but clipq's own, more than a second a megabyte, or memory beyond the limit, ends the run.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))
# Numba compiles these, and cannot read instrumented code.
KERNELS = [f"clipq.archive.{name}" for name in ("model", "floats", "rangecoder")]
with atheris.instrument_imports(include=["clipq.archive"], exclude=KERNELS):
    from tests.archive import mutations


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    return mutations.mutate(data, random.Random(seed))[:max_size]


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(mutations.seeds()):
        (folder / f"seed-{i}").write_bytes(seed)
        mutations.read_all(seed)  # compiles what compiling would else count as a hang
    limits = ["-rss_limit_mb=1500", "-timeout=2", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:]], mutations.read_all, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
