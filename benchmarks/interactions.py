"""How layers interact: how well the sum of what each adds alone predicts a whole plan, and what of the search pays.

    python benchmarks/interactions.py --data-root DIR [--seeds 3] [lenet-300-100 lenet-5]

The default search runs with parts of it switched off; each plan is then fine-tuned as the recipe says, with the file
held at the same size. The parts: candidates besides the surfaces' own plan (powers of the surfaces, uniform, global
magnitude, LAMP, ERK), refinement around the best one, and a few steps of fine-tuning inside an evaluation. The law
between whole plans and sums does not move a plan of a given size; it is judged by its predictions: each measured plan
along the curve is predicted from the law that the other measured plans give.

Every result is kept in ``benchmarks/results/interactions.json`` and not repeated. Prints the tables of docs/search.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from search import Bench

from clipq.finetune.search import search_recipe
from clipq.search import SearchRecord, Target, predict
from clipq.search.candidates import families
from clipq.search.predict import Interaction
from clipq.search.settings import Silent

RESULTS = Path(__file__).parent / "results" / "interactions.json"
NETS = ("lenet-300-100", "lenet-5")
PARTS: dict[str, tuple[bool, dict[str, int]]] = {
    "surfaces alone": (False, {"search_refinements": 0, "search_steps": 0}),
    "candidates": (True, {"search_refinements": 0, "search_steps": 0}),
    "candidates, refinement": (True, {"search_steps": 0}),
    "candidates, fine-tuning": (True, {"search_refinements": 0}),
    "refinement, fine-tuning": (False, {}),
    "all": (True, {}),
}
"""What is switched on; whether other candidates are, and changes of the recipe."""


def run(bench: Bench, part: str) -> dict[str, Any]:
    others, changes = PARTS[part]
    recipe = bench.recipe.model_copy(update=changes)
    started = time.monotonic()
    with nullcontext() if others else mock.patch.object(predict, "families", _own_plan):
        record = search_recipe(
            bench.fabric, bench.network, bench.data, recipe, Target(bytes=bench.bytes), None, Silent()
        )
    bench.network.load_state_dict(bench.weights)
    about = {"search_seconds": round(time.monotonic() - started, 1), "evaluations": len(record.evaluations)}
    return about | {"law": law(record)} | bench.measure(record.plan, bench.bytes)


def _own_plan(*arguments: Any) -> dict[str, Any]:
    """The one that the surfaces give."""
    return dict(list(families(*arguments).items())[:1])


def law(record: SearchRecord) -> list[dict[str, float]]:
    """What whole plans along the curve add to the cost: measured, the sum of the groups alone, and the law's value.

    Plans that add next to nothing are left out, as the search does.
    """
    assert record.interaction is not None
    a, b = record.interaction
    plans = [(p, p.measured - record.base_cost) for p in record.curve if p.measured is not None]
    most = max(whole for _, whole in plans)
    measured = [(p, whole) for p, whole in plans if whole > predict.NEGLIGIBLE * most]
    whole = [w for _, w in measured]
    sums = [math.exp((math.log(p.predicted - record.base_cost) - a) / b) for p, _ in measured]
    return [
        {"bytes": p.bytes, "measured": w, "sum": s, "law": _without(i, sums, whole).whole(s)}
        for i, ((p, w), s) in enumerate(zip(measured, sums, strict=True))
    ]


def _without(i: int, sums: Sequence[float], whole: Sequence[float]) -> Interaction:
    return Interaction.fit([*sums[:i], *sums[i + 1 :]], [*whole[:i], *whole[i + 1 :]], 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=list(NETS), metavar="NET", help=", ".join(NETS))
    parser.add_argument("--data-root", required=True, help="the folder with the data sets and weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=NUMBER", help="change the recipe, to try it out")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    changes = {name: int(value) for name, _, value in (text.partition("=") for text in arguments.set)}
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    for seed in range(arguments.seeds):
        for net in arguments.nets:
            for part in PARTS:
                key = f"{net} | {part} | {seed}"
                if key not in results:
                    bench = Bench(net, seed, arguments.data_root)
                    bench.recipe = bench.recipe.model_copy(update=changes)
                    results[key] = run(bench, part)
                    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
                    print(key, {k: v for k, v in results[key].items() if k not in ("plan", "law")}, flush=True)
    print(parts_table(results), laws_table(results), sep="\n\n")


def parts_table(results: dict[str, Any]) -> str:
    """Medians over the seeds."""
    lines = [
        "| network | bytes | parts | evaluations | error before | error after | search | seeds |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for net in NETS:
        for part in PARTS:
            if runs := [v for k, v in results.items() if k.startswith(f"{net} | {part} | ")]:
                median = {
                    k: statistics.median(r[k] for r in runs)
                    for k in ("bytes", "evaluations", "error_before", "error", "search_seconds")
                }
                lines.append(
                    f"| {net} | {median['bytes']:,.0f} | {part} | {median['evaluations']:.0f} | "
                    f"{median['error_before']:.2f} % | {median['error']:.2f} % | {median['search_seconds']:.0f} s | "
                    f"{len(runs)} |"
                )
    return "\n".join(lines)


def laws_table(results: dict[str, Any]) -> str:
    """By what factor predictions of whole plans are off, in the median and at most."""
    lines = ["| network | plans | sum of the groups alone | law |", "| --- | ---: | ---: | ---: |"]
    for net in NETS:
        points = [p for k, v in results.items() if k.startswith(f"{net} | all | ") for p in v["law"]]
        if points:
            off = {by: sorted(math.exp(abs(math.log(p[by] / p["measured"]))) for p in points) for by in ("sum", "law")}
            shown = [f"{statistics.median(f):.2f}, at most {f[-1]:.1f}" for f in off.values()]
            lines.append(f"| {net} | {len(points)} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
