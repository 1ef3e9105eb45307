"""Kill real runs at random moments and compare what comes out with a run without a break.

    python -m benchmarks.kill [--seed 0] [--out benchmarks/results/kill.json]

Prints a table of the moments, and writes it to the JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.killing import Way, kill, result_of, run_whole

MOMENTS: list[tuple[int, Way]] = [
    *[(1, "SIGKILL"), (2, "lost worker"), (1, "SIGTERM"), (2, "SIGKILL")] * 4,
    *[(1, "SIGKILL"), (2, "SIGTERM")] * 2,
]
LENGTH = ["--float-epochs", "20", "--epochs", "60"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kill.json"))
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    whole: dict[int, tuple[float, dict[str, object]]] = {}
    rows = []
    print("| processes | killed by | seconds into the run | last checkpoint | seconds to leave | equal |")
    print("|---|---|---|---|---|---|")
    for processes, way in MOMENTS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if processes not in whole:
                seconds = run_whole(folder, processes, LENGTH)
                whole[processes] = seconds, result_of(folder / "run")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            seconds, expected = whole[processes]
            after = moments.uniform(0, seconds)
            death = kill(folder, processes, LENGTH, way, after)
            equal = result_of(folder / "run") == expected
        leave = f"{death.seconds:.1f}" if way == "SIGTERM" else ""
        rows.append({"processes": processes, "way": way, "after": after, "equal": equal, **asdict(death)})
        print(f"| {processes} | {way} | {after:.1f} | {death.at} | {leave} | {'yes' if equal else 'NO'} |", flush=True)
        found = {"seed": arguments.seed, "length": LENGTH, "moments": rows}
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
