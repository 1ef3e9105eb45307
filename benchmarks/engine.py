"""Do distillation and batch-norm re-estimation help? ResNet-20 on CIFAR-10, a short training at a hard plan.

    python benchmarks/engine.py --data-root data [--steps 100] [--seeds 2] [--out benchmarks/results/engine.json]

Accuracies are on the validation set.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from clipq.finetune.average import reestimate_batch_norm
from clipq.finetune.compress import make_plan, prepare
from clipq.finetune.loop import fit
from clipq.finetune.score import score
from clipq.finetune.watch import Silent
from clipq.recipe import Recipe

VARIANTS: dict[str, dict[str, Any]] = {
    "labels alone": {},
    "distillation, T = 1, weight 0.5": {"distillation": 0.5},
    "distillation, T = 4, weight 0.5": {"distillation": 0.5, "distillation_temperature": 4.0},
}
PLAN: dict[str, Any] = {"pruning_rate": 0.8, "bits": 2, "overrides": {}}
BATCHES = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine.json"))
    arguments = parser.parse_args()
    rows = []
    print("| seed | loss | statistics | top-1, % | seconds |\n|---|---|---|---|---|")
    for seed in range(arguments.seeds):
        for name, fields in VARIANTS.items():
            changes = {"data_root": arguments.data_root, "seed": seed, "limit_steps": arguments.steps, **PLAN, **fields}
            recipe = Recipe.load(Path(__file__).parents[1] / "recipes/cifar10/resnet-20.yaml", changes)
            fabric, network, data = prepare(recipe)
            plan, start = make_plan(network, recipe), time.monotonic()
            fit(fabric, network, data, recipe, plan, epochs=2, learning_rate=recipe.learning_rate, watcher=Silent())
            seconds = time.monotonic() - start
            for statistics in ("of the training", "estimated anew"):
                if statistics == "estimated anew":
                    batches = data.batches("train", recipe.batch_size, seed, 2, channels_last=recipe.channels_last)
                    reestimate_batch_norm(network, batches, BATCHES)
                batches = data.batches("validation", 500, channels_last=recipe.channels_last)
                found = score(network, batches, fabric.device).accuracy
                rows.append({"seed": seed, "loss": name, "statistics": statistics, "top-1": found, "seconds": seconds})
                print(f"| {seed} | {name} | {statistics} | {found:.2f} | {seconds:.0f} |", flush=True)
    setting = {"steps": arguments.steps, "plan": PLAN, "batches": BATCHES}
    arguments.out.write_text(json.dumps({**setting, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
