"""Ways to choose a plan, at equal bytes on disk and an equal number of evaluations.

    python benchmarks/search.py --data-root DIR [--seeds 3] [lenet-300-100 lenet-5 resnet-20]

For each network and seed, five ways choose pruning rates and bit widths for a file of the same size; each plan is
then fine-tuned for a few epochs, without a ramp, with the file held at the size. Shown are the top-1 errors on the test
set before and after fine-tuning. The ways see training and validation data only.

- default: `clipq search`.
- layerwise: the paper's search, with as many evaluations. Its λ is the first of a geometric series whose plan is no
  larger than the file; what room is left is filled by keeping more weights in every tensor alike.
- random: as many plans of the size as the default evaluates, drawn at random; the one of least loss.
- uniform: the same p in every weight tensor, at 2 and 3 bits; the best on the validation set after fine-tuning.
- magnitude: the smallest weights of the whole network pruned; bit width as for uniform.

For "saved", the default search is run for a file of 0.8 times the size. Biases are compressed by all; uniform and
magnitude give them p 0.3 and 4 bits. Every result is kept in ``benchmarks/results/search.json`` and not repeated.
Prints the table that docs/search.md shows.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipq.attach import attach
from clipq.data import Data, load_data
from clipq.finetune.devices import make_fabric
from clipq.finetune.loop import fit
from clipq.finetune.network import find_weights, load_weights, make_network
from clipq.finetune.score import score
from clipq.finetune.search import cross_entropy, search_batches, search_recipe
from clipq.finetune.watch import Silent
from clipq.hold import SizeHolder, file_bytes
from clipq.plan import Plan
from clipq.recipe import Recipe
from clipq.search import Target
from clipq.search.allocate import fitted
from clipq.search.candidates import magnitude_and_lamp, plan_by, uniform_plan
from clipq.search.evaluator import Evaluator
from clipq.search.groups import Theta, groups_of, plan_of
from clipq.search.settings import Silent as SilentSearch
from clipq.search.sizes import SizeModel, measure_sizes, pruning_rate_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "search.json"
NETS: dict[str, tuple[str, int, float, dict[str, Any]]] = {
    "lenet-300-100": ("recipes/mnist/lenet-300-100.yaml", 5000, 2000.0, {"epochs": 10, "learning_rate": 0.001}),
    "lenet-5": ("recipes/mnist/lenet-5.yaml", 5000, 2000.0, {"epochs": 6, "learning_rate": 0.001}),
    "resnet-20": ("recipes/cifar10/resnet-20.yaml", 60000, 100.0, {"epochs": 1}),
}
"""Recipe, bytes of the file, the first λ of the layerwise search, in points of error, and the fine-tuning; no ramp."""
BITS = (2, 3)


class Bench:
    """One network, one seed."""

    def __init__(self, net: str, seed: int, data_root: str) -> None:
        path, self.bytes, self.trade_off, training = NETS[net]
        changes = {
            "seed": seed,
            "data_root": data_root,
            "pruning_rate": None,
            "bits": None,
            "overrides": {},
            "pruning_ramp": 0.0,
            **training,
        }
        self.recipe = Recipe.load(ROOT / path, changes)
        self.network = make_network(self.recipe)
        load_weights(self.network, find_weights(self.recipe))
        self.weights = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        fraction = self.recipe.validation_fraction
        self.data: Data = load_data(self.recipe.data, data_root, seed, validation_fraction=fraction)
        self.fabric = make_fabric(self.recipe)
        self.groups = groups_of(self.network, self.recipe.include, self.recipe.exclude)
        self._sizes: list[SizeModel] | None = None

    @property
    def sizes(self) -> list[SizeModel]:
        if self._sizes is None:
            self._sizes = measure_sizes(self.groups, self.weights, range(2, 9), 0.998)
        return self._sizes

    def budget(self, size: int) -> float:
        """What the groups may take in a file of that size."""
        thetas = [Theta(0.5, 4)] * len(self.groups)
        predicted = sum(s.bytes(t) for s, t in zip(self.sizes, thetas, strict=True))
        with self.quantized(plan_of(self.groups, thetas)) as plan:
            return size - (file_bytes(self.network, plan) - predicted)

    def quantized(self, plan: Plan) -> Any:
        return _Quantized(self, plan)

    def error(self, part: Any) -> float:
        batches = self.data.batches(part, 256, channels_last=self.recipe.channels_last)
        return score(self.network, batches, self.fabric.device).error

    def measure(self, plan: Plan, size: int) -> dict[str, Any]:
        """Errors before and after fine-tuning with the file held at the size; bytes of the file."""
        optimizer = torch.optim.SGD(self.network.parameters(), lr=0.0)
        attachment = attach(self.network, optimizer, plan)
        before_bytes = SizeHolder(self.network, attachment, size).finish()
        plan = attachment.plan
        before = self.error("test")
        attachment.detach()
        self.network.load_state_dict(self.weights)
        started = time.monotonic()
        ended = fit(
            self.fabric,
            self.network,
            self.data,
            self.recipe,
            plan,
            epochs=self.recipe.epochs,
            learning_rate=self.recipe.learning_rate,
            watcher=Silent(),
            hold_bytes=size,
        )
        assert ended is not None
        result = {
            "error_before": before,
            "bytes_before": before_bytes,
            "error": self.error("test"),
            "validation_error": self.error("validation"),
            "bytes": file_bytes(self.network, ended),
            "fine_tuning_seconds": round(time.monotonic() - started, 1),
            "plan": {name: [round(t.pruning_rate, 5), t.bits] for name, t in ended.tensors.items()},
        }
        self.network.load_state_dict(self.weights)
        return result

    def searched(self, target: Target, **changes: Any) -> tuple[Plan, dict[str, Any]]:
        recipe = self.recipe.model_copy(update=changes)
        started = time.monotonic()
        record = search_recipe(self.fabric, self.network, self.data, recipe, target, None, SilentSearch())
        self.network.load_state_dict(self.weights)
        seconds = round(time.monotonic() - started, 1)
        return record.plan, {"search_seconds": seconds, "evaluations": len(record.evaluations)}


class _Quantized:
    def __init__(self, bench: Bench, plan: Plan) -> None:
        self._bench, self._plan = bench, plan

    def __enter__(self) -> Plan:
        optimizer = torch.optim.SGD(self._bench.network.parameters(), lr=0.0)
        attach(self._bench.network, optimizer, self._plan).detach()
        return self._plan

    def __exit__(self, *of: object) -> None:
        self._bench.network.load_state_dict(self._bench.weights)


def default(bench: Bench, size: int) -> dict[str, Any]:
    plan, about = bench.searched(Target(bytes=size))
    return about | bench.measure(plan, size)


def layerwise(bench: Bench, size: int, evaluations: int) -> dict[str, Any]:
    trade_off, spent = bench.trade_off, 0.0
    of_each = -(-evaluations // len(bench.groups))
    while True:
        target = Target(trade_off=trade_off)
        plan, about = bench.searched(target, search_method="layerwise", search_evaluations=of_each)
        spent += about["search_seconds"]
        with bench.quantized(plan):
            if file_bytes(bench.network, plan) <= size:
                break
        trade_off *= 2
    return about | {"trade_off": trade_off, "all_seconds": spent} | bench.measure(plan, size)


def random(bench: Bench, size: int, evaluations: int) -> dict[str, Any]:
    generator = np.random.default_rng(bench.recipe.seed)
    cost = cross_entropy(search_batches(bench.data, bench.recipe, bench.fabric.device))
    evaluator = Evaluator(bench.network, cost, 0)
    budget = bench.budget(size)
    started, best = time.monotonic(), (float("inf"), plan_of(bench.groups, [Theta(0.5, 4)] * len(bench.groups)))
    for _ in range(evaluations):
        thetas = [
            Theta(pruning_rate_of(float(generator.uniform(0, s.highest))), int(generator.integers(2, 9)))
            for s in bench.sizes
        ]
        thetas = fitted(bench.sizes, thetas, budget)
        best = min(best, (evaluator.at(bench.groups, thetas), plan_of(bench.groups, thetas)), key=lambda pair: pair[0])
    about = {"search_seconds": round(time.monotonic() - started, 1), "evaluations": evaluations}
    return about | bench.measure(best[1], size)


def best_of_bits(bench: Bench, size: int, plan_at: Callable[[int, float], Sequence[Theta]]) -> dict[str, Any]:
    budget = bench.budget(size)
    tried = [{"bits": b} | bench.measure(plan_of(bench.groups, plan_at(b, budget)), size) for b in BITS]
    return min(tried, key=lambda result: result["validation_error"])


def uniform(bench: Bench, size: int) -> dict[str, Any]:
    return best_of_bits(bench, size, lambda bits, budget: uniform_plan(bench.sizes, bits, budget))


def magnitude(bench: Bench, size: int) -> dict[str, Any]:
    scores = [magnitude_and_lamp(size.group, bench.weights)[0] for size in bench.sizes]
    return best_of_bits(bench, size, lambda bits, budget: plan_by(scores, bench.sizes, bits, budget))


METHODS = ("default", "layerwise", "random", "uniform", "magnitude", "default at 0.8")


def run(bench: Bench, method: str, evaluations: int) -> dict[str, Any]:
    if method in ("random", "layerwise"):
        return {"random": random, "layerwise": layerwise}[method](bench, bench.bytes, evaluations)
    if method == "default at 0.8":
        return default(bench, int(0.8 * bench.bytes))
    ways: dict[str, Callable[[Bench, int], dict[str, Any]]] = {
        "default": default,
        "uniform": uniform,
        "magnitude": magnitude,
    }
    return ways[method](bench, bench.bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=list(NETS), metavar="NET", help=", ".join(NETS))
    parser.add_argument("--data-root", required=True, help="the folder with the data sets and weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="a JSON file, to go on with")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {"runs": {}}
    results["made with"] = {"torch": torch.__version__, "cores": torch.get_num_threads(), "processor": _processor()}
    for seed in range(arguments.seeds):
        for net in arguments.nets:
            for method in arguments.methods:
                key = f"{net} | {method} | {seed}"
                if key in results["runs"]:
                    continue
                bench = Bench(net, seed, arguments.data_root)
                evaluations = results["runs"].get(f"{net} | default | {seed}", {}).get("evaluations", 100)
                results["runs"][key] = run(bench, method, evaluations)
                arguments.results.write_text(json.dumps(results, indent=1) + "\n")
                shown = {k: v for k, v in results["runs"][key].items() if k != "plan"}
                print(key, shown, flush=True)
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """Medians over the seeds."""
    lines = [
        "| network | bytes | way | evaluations | error before | error after | seeds |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for net in NETS:
        for method in METHODS:
            runs = [v for k, v in results["runs"].items() if k.startswith(f"{net} | {method} | ")]
            if runs:
                median = {k: statistics.median(r[k] for r in runs) for k in ("bytes", "error_before", "error")}
                evaluations = runs[0].get("evaluations", len(BITS))
                lines.append(
                    f"| {net} | {median['bytes']:,.0f} | {method} | {evaluations} | {median['error_before']:.2f} % | "
                    f"{median['error']:.2f} % | {len(runs)} |"
                )
    return "\n".join(lines)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
