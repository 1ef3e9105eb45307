"""Error against bytes on disk: every method from the same weights, data and epochs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the other benchmarks are scripts, which import each other by name
