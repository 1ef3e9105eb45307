"""One of several processes that search a plan together.

    python search.py STORAGE OUT SECONDS [CHANGE]

SECONDS is how long each evaluation takes at least; every evaluation is a line of OUT.log, the record of the search goes
to OUT. CHANGE "model" makes the model another one, "target" the target.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

from clipq import Target
from clipq.search import Settings, run_search


def main() -> None:
    storage, out, seconds, *change = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(1 if "model" in change else 0)
    model = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 20))
    x = torch.randn(200, 40)
    with torch.no_grad():
        wanted = model(x)

    def cost(network: nn.Module) -> float:
        time.sleep(float(seconds))
        with open(f"{out}.log", "a") as log:
            log.write("evaluation\n")
        return float((network(x) - wanted).square().mean())

    target = Target(ratio=9 if "target" in change else 8)
    settings = Settings(evaluations=4, refinements=10)
    Path(out).write_text(run_search(model, cost, target, settings=settings, storage=storage).to_json())


if __name__ == "__main__":
    main()
