"""MobileNet-v1 (0.25, trained on ImageNet) on photographs with ImageNet labels, compressed without any training.

    python benchmarks/imagenet_photographs.py --data-root DIR

Half of the photographs serve the search of a plan and the batch norms' new statistics; accuracies are of the other half
alone, of the network that the file gives back. Writes ``benchmarks/results/imagenet_photographs.json``, and the table
and the plot of ``docs/imagenet.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import load_file
from timing import processor
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import clipq
from clipq.data import Data, load_data
from clipq.models import build
from clipq.search import Settings, Target, run_search

ROOT = Path(__file__).parents[1]
NAME = "mobilenet-v1-0.25"
WEIGHTS = "weights/imagenet_mobilenet_v1_0.25_224.safetensors"
DATA = ROOT / "recipes" / "imagenet" / "data" / "photographs.yaml"
RATIOS = (4, 6, 8)
SETTINGS = Settings(evaluations=4, refinements=2)
COST_BATCHES = 4  # of the half's eight: what one evaluation, and the norms in it, look at
SEED = 0
BATCH = 57  # the half makes eight batches of one size: they weigh the same in the new statistics
RESULTS = ROOT / "benchmarks" / "results" / "imagenet_photographs.json"
PAGE = ROOT / "docs" / "imagenet.md"
PLOT = ROOT / "docs" / "imagenet_photographs.svg"
MARK = "<!-- photographs -->"
Batches = list[tuple[Tensor, Tensor]]


def network(root: Path) -> nn.Module:
    made = build(NAME)
    made.load_state_dict(load_file(root / WEIGHTS), strict=False)  # the norms' step counters are not in the file
    return made.eval()


def quantize(model: nn.Module, plan: clipq.Plan) -> None:
    clipq.attach(model, torch.optim.SGD(model.parameters(), lr=0.0), plan).detach()


def re_estimate(model: nn.Module, batches: Batches) -> None:
    """Give the batch norms the statistics of the network as it now is."""
    update_bn(batches, model)


@torch.no_grad()
def right(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Whether the first, and whether one of the first five guesses is right; bool, of each photograph."""
    model.eval()
    guesses = torch.cat([model(inputs).topk(5).indices for inputs, _ in batches])
    hits = guesses == torch.cat([targets for _, targets in batches])[:, None]
    return hits[:, 0], hits.any(1)


def wilson(hits: Tensor, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927), in per cent."""
    n, p = len(hits), float(hits.float().mean())
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return 100 * (middle - reach), 100 * (middle + reach)


def difference(hits: Tensor, before: Tensor, z: float = 1.96) -> tuple[float, float]:
    """The change of a share on the same photographs and the reach of its 95 % confidence interval, in points."""
    change = hits.double() - before.double()
    return 100 * float(change.mean()), 100 * z * float(change.std(correction=0)) / math.sqrt(len(change))


def scores(guesses: tuple[Tensor, Tensor], before: Tensor) -> dict[str, Any]:
    first, five = guesses
    return {
        "top-1": 100 * float(first.float().mean()),
        "interval": wilson(first),
        "top-5": 100 * float(five.float().mean()),
        "change": difference(first, before),
    }


def of_plan(root: Path, plan: clipq.Plan, search: Batches, report: Batches, before: Tensor) -> dict[str, Any]:
    """Accuracy with the old statistics, then with new ones, saved and loaded into another network."""
    model = network(root)
    quantize(model, plan)
    old = scores(right(model, report), before)
    re_estimate(model, search)
    again = network(root)
    with tempfile.TemporaryDirectory() as folder:
        saved = clipq.save(model, Path(folder) / "model.clipq", plan=plan)
        clipq.load(Path(folder) / "model.clipq", into=again)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    result = scores(right(again, report), before)
    ratio = saved.float32_bytes / saved.bytes
    return {"bytes": saved.bytes, "ratio": ratio, "old statistics": old, "re-estimated": result}


def searched(root: Path, ratio: float, search: Batches, known: dict[str, float]) -> tuple[clipq.Plan, dict[str, Any]]:
    """A plan for that ratio; ``known`` costs, by the tensors' bytes, need no evaluation: all ratios share most."""
    model = network(root)

    def cost(model: nn.Module) -> float:
        key = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()
        if key not in known:
            with torch.no_grad():
                losses = [F.cross_entropy(model.eval()(x), y) for x, y in search[:COST_BATCHES]]
            known[key] = float(sum(losses)) / COST_BATCHES
        return known[key]

    def recover(model: nn.Module, plan: clipq.Plan, file_bytes: int) -> clipq.Plan:
        quantize(model, plan)
        re_estimate(model, search[:COST_BATCHES])
        return plan

    started = time.monotonic()
    found = run_search(model, cost, Target(ratio=ratio), settings=SETTINGS, recover=recover)
    seconds = round(time.monotonic() - started, 1)
    return found.plan, {"search seconds": seconds, "evaluations": len(found.evaluations)}


def halves(data: Data) -> tuple[Batches, Batches]:
    """The photographs for the search and those for the report."""
    return list(data.batches("validation", BATCH)), list(data.train.batches(BATCH))


def measure(root: Path) -> Iterator[dict[str, Any]]:
    """The results after each search."""
    data = load_data(str(DATA), root, SEED, validation_fraction=0.5, workers=1)
    search, report = halves(data)
    plain = network(root)
    before = right(plain, report)
    every = [torch.cat(hits) for hits in zip(right(plain, search), before, strict=True)]
    assert [round(100 * float(hits.float().mean()), 2) for hits in every] == [51.37, 78.70]
    old = scores(before, before[0])
    re_estimate(plain, search)
    results: dict[str, Any] = {
        "photographs": {"search": len(data.validation), "report": len(data.train)},
        "float32": {
            "bytes": 4 * sum(tensor.numel() for tensor in network(root).state_dict().values() if tensor.numel() > 1),
            "ratio": 1.0,
            "old statistics": old,
            "re-estimated": scores(right(plain, report), before[0]),
        },
        "searched": [],
        "uniform": [],
        "made with": f"torch {torch.__version__}, {torch.get_num_threads()} thread, {processor()}",
    }
    for bits in (8, 6, 5, 4):
        plan = clipq.Plan.uniform(plain, pruning_rate=0.0, bits=bits)
        results["uniform"].append({"bits": bits} | of_plan(root, plan, search, report, before[0]))
    yield results
    known: dict[str, float] = {}
    for ratio in RATIOS:
        plan, about = searched(root, ratio, search, known)
        row = {"asked": ratio} | about | of_plan(root, plan, search, report, before[0])
        results["searched"].append(row)
        yield results


def row_of(name: str, row: dict[str, Any]) -> str:
    """One line of the table."""
    old, new = row["old statistics"], row["re-estimated"]
    low, high = new["interval"]
    change, reach = new["change"]
    cells = [
        f"{row['bytes']:,}",
        f"{row['ratio']:.1f}×",
        f"{old['top-1']:.1f}",
        f"{new['top-1']:.1f} ({low:.1f} to {high:.1f})",
        f"{new['top-5']:.1f}",
        f"{change:+.1f} ± {reach:.1f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def table(results: dict[str, Any]) -> str:
    rows = [
        "| plan | bytes | smaller | top-1, old statistics | top-1, re-estimated (95 %) | top-5 | change (95 %) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        row_of("float32", results["float32"]),
        *(row_of(f"uniform, p = 0, {r['bits']} bits", r) for r in results["uniform"]),
        *(row_of(f"searched for {r['asked']}×", r) for r in results["searched"]),
    ]
    return "\n".join(rows)


def plot(results: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    low, high = results["float32"]["old statistics"]["interval"]
    axes.axhspan(low, high, color="#9aa0a6", alpha=0.2, label="float32 and its 95 % interval")
    axes.axhline(results["float32"]["old statistics"]["top-1"], color="#9aa0a6")
    for kind, colour in (("uniform", "#e8710a"), ("searched", "#1a73e8")):
        rows = results[kind]
        sizes = [row["bytes"] / 1000 for row in rows]
        new = [row["re-estimated"]["top-1"] for row in rows]
        reach = [row["re-estimated"]["change"][1] for row in rows]
        axes.errorbar(sizes, new, reach, color=colour, marker="o", capsize=3, label=f"{kind}, re-estimated norms")
        old = [row["old statistics"]["top-1"] for row in rows]
        axes.plot(sizes, old, color=colour, linestyle=":", marker=".", label=f"{kind}, old norms")
    axes.set(xlabel="kB of the file", ylabel="top-1 on the photographs (%)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)


def write_page(results: dict[str, Any]) -> None:
    before, _, after = PAGE.read_text().split(MARK)
    PAGE.write_text(f"{before}{MARK}\n\n{table(results)}\n\n{MARK}{after}")
    plot(results, PLOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--page-only", action="store_true", help="from the results that are there")
    arguments = parser.parse_args()
    if not arguments.page_only:
        for results in measure(arguments.data_root):
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    write_page(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
