"""Error against bytes on disk, of every method from the same pretrained weights, data and number of epochs.

    python -m benchmarks.frontier --data-root DIR [--seeds 3] [--methods clipq paper …] -- [lenet-300-100 lenet-5 …]

Bytes are those of the file, and the network that is measured is read back from it. Methods see training and validation
data; the test set is looked at once, at the end of a run. Every run is kept in
``benchmarks/results/frontier.json`` and not repeated. NNCodec, NNCF and coremltools run in environments of their own,
which are made in ``build`` when they are not there. Draws ``docs/frontier-NET.svg`` and ``.png`` and writes
the tables of ``docs/results.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import archive
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from timing import markdown_table, processor, read_json, replace_between, write_json

from benchmarks.frontier.bench import NETS, ROOT, Bench
from benchmarks.frontier.deep_compression import deep_compression
from benchmarks.frontier.others import coremltools, nncf, nncodec, qat
from benchmarks.frontier.ours import ours, paper
from benchmarks.frontier.variants import variant

METHODS: dict[str, tuple[str, Callable[[Bench, str, Path], Path]]] = {
    "clipq": ("clipq, everything on", ours),
    "paper": ("CLIP-Q as in the paper", paper),
    "deep-compression": ("Deep Compression", deep_compression),
    "qat": ("quantization-aware training", qat),
    "coremltools": ("coremltools, pruning and DKM", coremltools),
    "nncf": ("NNCF, pruning and 8 bits", nncf),
    "nncodec": ("NNCodec, no training", nncodec),
    "variants": ("clipq, changed in one thing", variant),
}
ENVIRONMENTS = {
    "nncf": (ROOT / "build" / "nncf", ["nncf==3.4.0"]),
    "coremltools": (ROOT / "build" / "coremltools", ["coremltools==9.0", "scikit-learn"]),
}
"""Of the methods that run in one of their own from beginning to end, and what is installed there."""
WITHOUT_SEEDS = ("nncodec",)
"""Methods in which nothing is drawn at random: one run says all."""
PRECISIONS = {"32": "float32", "bf16": "bfloat16"}
PAGE = ROOT / "docs" / "results.md"


def set_up(methods: list[str]) -> None:
    """Make the environments of the peers among the methods."""
    if "nncodec" in methods and not archive.ENVIRONMENT.exists():
        archive.set_up()
    for method, (folder, packages) in ENVIRONMENTS.items():
        if method in methods and not folder.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            install = [folder / "bin" / "pip", "install", "--quiet", "-c", "constraints.txt", "-e", ".", *packages]
            subprocess.run(install, check=True, cwd=ROOT)


def measured(net: str, method: str, setting: str, seed: int, data_root: str) -> dict[str, Any]:
    """`measure`, in the method's own environment if it has one."""
    if method not in ENVIRONMENTS:
        return measure(net, method, setting, seed, data_root)
    call = f"measure({net!r}, {method!r}, {setting!r}, {seed}, {data_root!r})"
    code = f"import json\nfrom benchmarks.frontier.__main__ import measure\nprint(json.dumps({call}))"
    command = [ENVIRONMENTS[method][0] / "bin" / "python", "-c", code]
    # NNCF compiles an extension when it is first used, and by itself waits a minute for it.
    variables = os.environ | {"NNCF_EXTENSION_LOAD_TIMEOUT": "0"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=variables)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(net: str, method: str, setting: str, seed: int, data_root: str) -> dict[str, Any]:
    """One run: what it costs to train, the bytes of its file, the errors of what the file gives back."""
    bench = Bench(net, seed, data_root)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = METHODS[method][1](bench, setting, Path(folder))
        size = path.stat().st_size
    return {
        "bytes": size,
        "validation_error": bench.error("validation"),
        "error": bench.error("test"),
        "seconds": round(time.monotonic() - started, 1),
        "precision": bench.recipe.precision,
        "processor": processor(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=list(NETS), metavar="NET", help=", ".join(NETS))
    parser.add_argument("--data-root", required=True, help="the folder with the data sets and weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    arguments = parser.parse_args()
    set_up(arguments.methods)
    results = read_json("frontier") or {"runs": {}, "float": {}}
    for net in arguments.nets:
        bench = Bench(net, 0, arguments.data_root)
        size = 4 * sum(tensor.numel() for tensor in bench.network.state_dict().values())
        found = {"bytes": size, "error": bench.error("test")}
        kept = results["float"].get(net, found)
        if bench.recipe.weights is None and abs(kept["error"] - found["error"]) > 1e-4:
            sys.exit(
                f"the float network of {net} has an error of {found['error']:.5f} here; the runs in frontier.json are "
                f"from one with {kept['error']:.5f}, and rows of two networks can't be compared. Bring that one's "
                f"build/frontier/{net}.pt, or take all {net} runs, and its entry in float, out of frontier.json"
            )
        results["float"][net] = found
        for seed in range(arguments.seeds):
            for method in arguments.methods:
                if seed and method in WITHOUT_SEEDS:
                    continue
                for setting in NETS[net].settings.get(method, ()):
                    key = f"{net} {method} {setting} {seed}"
                    if key not in results["runs"]:
                        results["runs"][key] = measured(net, method, setting, seed, arguments.data_root)
                        write_json("frontier", results)
                        print(key, results["runs"][key], flush=True)
    write_json("frontier", results)
    for net in results["float"]:
        draw(net, results)
    replace_between(PAGE, "frontier", "\n\n".join(section(net, results) for net in results["float"]))


def points(net: str, method: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    """A method's settings, each with the medians over its seeds."""
    found = []
    for setting in NETS[net].settings.get(method, ()):
        runs = [run for key, run in results["runs"].items() if key.startswith(f"{net} {method} {setting} ")]
        if runs:
            errors = sorted(run["error"] for run in runs)
            medians = {k: statistics.median(run[k] for run in runs) for k in ("bytes", "error", "validation_error")}
            found.append({"setting": setting, "errors": errors, **medians})
    return found


def section(net: str, results: dict[str, Any]) -> str:
    """One network's picture and tables."""
    plain = results["float"][net]
    in_float = f"In float32: {plain['bytes']:,} bytes, {plain['error']:.{NETS[net].digits}f} {NETS[net].unit}."
    in_float += f" {NETS[net].epochs} epochs each."
    found = ((key.split()[:2], run) for key, run in results["runs"].items())
    runs = [run for (of, method), run in found if of == net and method not in WITHOUT_SEEDS]
    made = Counter(f"{PRECISIONS[run['precision']]} on {run['processor']}" for run in runs).most_common()
    in_float += f" Trained in {', '.join(f'{how} ({count} runs)' for how, count in made)}."
    picture = f"![Error against bytes on disk, {net}](frontier-{net}.svg)"
    parts = [f"### {net}", picture, in_float, table(net, [m for m in METHODS if m != "variants"], results)]
    if points(net, "variants", results):
        parts += ["clipq, [changed in one thing](#what-was-tried):", table(net, ["variants"], results)]
    return "\n\n".join(parts)


def table(net: str, methods: list[str], results: dict[str, Any]) -> str:
    """A row for every setting of these methods."""
    plain, unit, digits = results["float"][net], NETS[net].unit, NETS[net].digits
    curve = [(point["bytes"], point["error"]) for point in points(net, "clipq", results)]
    compared = "clipq" in methods and bool(curve)
    rows = []
    for method in methods:
        title = METHODS[method][0]
        for point in points(net, method, results):
            errors = f"{point['errors'][0]:.{digits}f} to {point['errors'][-1]:.{digits}f}"
            row = [title, point["setting"], f"{point['bytes']:,.0f}", f"{plain['bytes'] / point['bytes']:.0f}×"]
            row += [f"{point[part]:.{digits}f}" for part in ("validation_error", "error")]
            row += [errors, str(len(point["errors"]))]
            if compared:
                row.append("" if method == "clipq" else of_clipq(curve, point["bytes"], point["error"]))
            rows.append(row)
    titles = ["method", "setting", "bytes", "smaller", f"validation error, {unit}", f"error, {unit}", "range", "seeds"]
    return markdown_table([*titles, "clipq at that error"] if compared else titles, rows)


def of_clipq(curve: list[tuple[float, float]], size: float, error: float) -> str:
    """The bytes clipq takes for a peer's error, by the lines drawn between its points, and how many that is fewer.

    Where its smallest file has less error, the bytes of that one, after a ≤; where none has so little, a dash.

    Args:
        curve: bytes and error of clipq's points, at least one; those that another point beats in both don't count.
        size: bytes of the peer's file.
        error: of the peer.
    """
    best: list[tuple[float, float]] = []
    for point in sorted(curve):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    sizes, errors = zip(*reversed(best), strict=True)
    if error < errors[0]:
        return "–"
    found = float(np.exp(np.interp(error, errors, np.log(sizes))))
    return f"{'≤ ' if error > errors[-1] else ''}{found:,.0f} ({100 * (found / size - 1):+.0f} %)"


def draw(net: str, results: dict[str, Any]) -> None:
    """The picture, as SVG and PNG."""
    plain = results["float"][net]
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "clipq"}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, (method, (title, _)) in enumerate(METHODS.items()):
            curve = sorted(points(net, method, results), key=lambda point: point["bytes"])
            if curve and method != "variants":
                x, y = [p["bytes"] for p in curve], [p["error"] for p in curve]
                low = [p["error"] - p["errors"][0] for p in curve]
                high = [p["errors"][-1] - p["error"] for p in curve]
                style = {"color": f"C{number}", "linewidth": 1.2}
                if method == "clipq":
                    style = {"color": "black", "linewidth": 2.5}
                if min(y) > NETS[net].shown[1]:
                    title += f": above, at {min(y):.{NETS[net].digits}f}"
                axes.errorbar(x, y, [low, high], marker="o", markersize=4, capsize=2, label=title, **style)
        axes.axhline(plain["error"], color="grey", linestyle=":", label="float32")
        axes.set(xscale="log", xlabel="bytes on disk", ylabel=f"test error, {NETS[net].unit}", title=net)
        axes.set_ylim(*NETS[net].shown)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2.5, 4, 6)))
        axes.xaxis.set_major_formatter(EngFormatter("B"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, fontsize=8)
        for ending, extra in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
            figure.savefig(ROOT / "docs" / f"frontier-{net}.{ending}", **extra)


if __name__ == "__main__":
    main()
