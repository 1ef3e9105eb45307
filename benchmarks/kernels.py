"""The operator's own cost, against a copy of the tensor and against the reference in plain torch.

    python benchmarks/kernels.py [--scale-only | --marks-only]

Weights are normal and move between the calls, by about as much as a training step moves them. Everything that is
compared takes turns in one process; medians, middle half and least. (The name is not ``operator.py``, which would hide
Python's own module from every script in this folder.) Writes ``benchmarks/results/kernels.json``, and the tables and
the plot of ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from timing import (
    cores,
    interleaved,
    machine,
    markdown_table,
    peak_memory,
    ratios,
    read_json,
    replace_between,
    spread,
    write_json,
)
from torch import Tensor

from clipq.models import build
from clipq.operator import Quantizer, QuantizerEntry, clip_quantize, quantize

SEED = 0
PRUNING_RATE, BITS = 0.9, 3
LARGE = 9216 * 4096  # AlexNet's fc6
SIZES = [10**3, 10**4, 10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8]
DTYPES = (torch.bfloat16, torch.float16, torch.float64)
DOCS = Path(__file__).parents[1] / "docs"


class Weights:
    """Tensors with their quantizer, and a step of training: everything shrinks a little and takes a random step."""

    def __init__(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.weights = [torch.randn(tuple(s), generator=generator).mul_(0.02).to(dtype) for s in shapes]
        self.out = [torch.empty_like(w) for w in self.weights]
        self._steps = [torch.randn(w.shape, generator=generator).mul_(1e-5).to(dtype) for w in self.weights]
        self._quantizer = Quantizer([QuantizerEntry(str(i), PRUNING_RATE, BITS) for i in range(len(shapes))])

    def move(self) -> None:
        for weight, step in zip(self.weights, self._steps, strict=True):
            weight.mul_(1 - 1e-5).add_(step)

    def quantize(self) -> None:
        self._quantizer(self.weights, self.out)

    def copy(self) -> None:
        for target, weight in zip(self.out, self.weights, strict=True):
            target.copy_(weight)

    def quantize_from_nothing(self) -> list[Tensor]:
        return [quantize(w, PRUNING_RATE, BITS) for w in self.weights]

    def reference(self) -> list[Tensor]:
        return [clip_quantize(w, PRUNING_RATE, BITS).quantized for w in self.weights]


def marks(repeats: int) -> dict[str, Any]:
    """The operator on one large tensor, on many small ones, and on the other dtypes."""
    large = Weights([[LARGE]])
    actions: dict[str, Callable[[], object]] = {
        "copy": large.copy,
        "operator": large.quantize,
        "operator, threshold unknown": large.quantize_from_nothing,
    }
    for _ in range(3):
        large.quantize()
    seconds = interleaved(actions, repeats, large.move)
    reference = interleaved({"reference": large.reference, "operator": large.quantize}, 3, large.move)
    results: dict[str, Any] = {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "over the copy": ratios(seconds["operator"], seconds["copy"]),
        "threshold unknown over the copy": ratios(seconds["operator, threshold unknown"], seconds["copy"]),
        "reference over the operator": ratios(reference["reference"], reference["operator"]),
    }
    results["seconds"]["reference"] = spread(reference["reference"])

    for dtype in DTYPES:
        other = Weights([[LARGE]], dtype)
        seconds = interleaved({"float32": large.quantize, "other": other.quantize}, repeats, _both(large, other))
        name = str(dtype).removeprefix("torch.")
        results["seconds"][name] = spread(seconds["other"])
        results[f"{name} over float32"] = ratios(seconds["other"], seconds["float32"])

    shapes = [p.shape for p in build("resnet-110").parameters() if p.dim() > 1]
    many, one = Weights(shapes), Weights([[sum(s.numel() for s in shapes)]])
    seconds = interleaved({"many": many.quantize, "one": one.quantize}, 30 * repeats, _both(many, one))
    results["seconds"]["ResNet-110's tensors"] = spread(seconds["many"])
    results["seconds"]["one tensor of as many weights"] = spread(seconds["one"])
    results["many over one"] = ratios(seconds["many"], seconds["one"])
    results["temporary memory over the tensor"] = temporaries()
    return results


def _both(one: Weights, other: Weights) -> Callable[[], None]:
    def move() -> None:
        one.move()
        other.move()

    return move


def temporaries() -> float:
    """The most memory that the operator takes beyond weight and result, in parts of the tensor, in a fresh process."""
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import kernels; kernels.print_growth()"
    return float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


def print_growth() -> None:
    """Print how far the first calls on a large tensor raise the process' peak memory, in parts of the tensor."""
    warm = Weights([[10**6]])  # compiles, starts the threads
    warm.quantize()
    large = Weights([[LARGE]])
    large.out[0].zero_()
    before = peak_memory()
    filler = torch.ones(LARGE // 8)  # shows in full if the peak so far is what is in use now
    if peak_memory() - before < 0.9 * filler.nbytes:
        raise SystemExit("more memory was in use before than is now; cannot tell what the operator takes")
    before = peak_memory()
    for _ in range(3):
        large.quantize()
        large.move()
    print((peak_memory() - before) / large.weights[0].nbytes)


def scale(repeats: int) -> list[dict[str, Any]]:
    """Nanoseconds a weight of copy, operator and reference on one tensor, by its size."""
    points = []
    for size in SIZES:
        weights = Weights([[size]])
        inner = max(1, 10**5 // size)  # what is timed is not shorter than a fraction of a millisecond
        actions = {"copy": weights.copy, "operator": weights.quantize}
        enough = max(repeats, min(20 * repeats, 10**7 // size))
        seconds = interleaved({n: _repeated(a, inner) for n, a in actions.items()}, enough, weights.move)
        seconds |= interleaved({"reference": weights.reference}, 3 if size > 10**6 else repeats, weights.move)
        per_weight = {n: [s / size / (inner if n in actions else 1) * 1e9 for s in v] for n, v in seconds.items()}
        points.append({"weights": size, **{n: spread(v) for n, v in per_weight.items()}})
        print(json.dumps(points[-1]), flush=True)
    return points


def _repeated(action: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            action()

    return run


def plot(points: Sequence[dict[str, Any]], made: dict[str, Any], path: Path) -> None:
    """Time a weight by the size of the tensor, with the spread."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = [p["weights"] for p in points]
    looks = {
        "reference": ("#9aa0a6", "reference in plain torch"),
        "operator": ("#1a73e8", "clipq"),
        "copy": ("#e8710a", "copy of the tensor"),
    }
    for name, (colour, label) in looks.items():
        axes.plot(sizes, [p[name]["median"] for p in points], color=colour, marker=".", label=label)
        low, high = ([p[name][f"{side} quartile"] for p in points] for side in ("lower", "upper"))
        axes.fill_between(sizes, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="weights in the tensor", ylabel="ns a weight")
    axes.set_title(
        f"p = {PRUNING_RATE}, b = {BITS}, float32, {made['cores']} cores of {made['processor']}", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def marks_table(results: dict[str, Any]) -> str:
    """What is asked of the operator, and what was measured."""
    asked = {
        "over the copy": ("float32, times the copy", "at most 8"),
        "threshold unknown over the copy": ("the same from one call alone, times the copy", ""),
        "reference over the operator": ("the reference, times the operator", "at least 40"),
        "many over one": ("ResNet-110's 110 tensors, times one of as many weights", "at most 1.5"),
        **{f"{d} over float32": (f"{d}, times float32", "at most 2") for d in ("bfloat16", "float16", "float64")},
    }
    rows = []
    for key, (title, mark) in asked.items():
        r = results[key]
        middle = f"{r['lower quartile']:.2f} to {r['upper quartile']:.2f}"
        rows.append([title, f"{r['median']:.2f}", middle, f"{r['of the least']:.2f}", mark])
    memory = f"{results['temporary memory over the tensor']:.3f}"
    rows.append(["memory beyond weight and result, times the tensor", memory, "", "", "at most 0.25"])
    return markdown_table(["", "median", "middle half", "least / least", "asked"], rows)


def scale_table(points: Sequence[dict[str, Any]]) -> str:
    """The plot's numbers."""
    rows = []
    for p in points:
        medians = [f"{p[name]['median']:.2f}" for name in ("copy", "operator", "reference")]
        ratio = p["operator"]["median"] / p["copy"]["median"]
        rows.append([f"{p['weights']:,}", *medians, f"{ratio:.1f}", f"{p['operator']['least']:.2f}"])
    return markdown_table(["weights", "copy, ns a weight", "clipq", "reference", "clipq / copy", "clipq, least"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--marks-only", action="store_true")
    part.add_argument("--scale-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(cores())
    results = read_json("kernels")
    results["made with"] = {**machine(), "seed": SEED, "pruning rate": PRUNING_RATE, "bits": BITS}
    if not arguments.scale_only:
        results["marks"] = marks(arguments.repeats)
    if not arguments.marks_only:
        results["scale"] = scale(arguments.repeats)
    write_json("kernels", results)
    if "marks" in results:
        text = marks_table(results["marks"])
        print(text)
        replace_between(DOCS / "performance.md", "marks", text)
    if "scale" in results:
        plot(results["scale"], results["made with"], DOCS / "scaling.svg")
        replace_between(DOCS / "performance.md", "scale", scale_table(results["scale"]))


if __name__ == "__main__":
    main()
