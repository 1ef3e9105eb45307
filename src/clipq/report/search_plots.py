"""Plots of a search."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from clipq.search.record import Evaluation, SearchRecord
from clipq.search.sizes import sparsity

_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#1a73e8", "#e8710a", "#188038", "#d93025", "#9aa0a6"
_STAGES = ("base", "alone", "layerwise", "whole", "drop", "candidates", "refine", "finalists")
_COLOURS = dict(zip(_STAGES, (_GREY, _BLUE, _BLUE, _GREEN, _GREY, _ORANGE, "#8430ce", _RED), strict=True))
_MOST_NAMES = 40  # of groups that an axis can show
_RATES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)


def to_svg(figure: Figure) -> str:
    """As an element that a page can hold; text stays text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "clipq"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def plot_trade_off(found: SearchRecord) -> Figure | None:
    """Cost against bytes, predicted and measured, with the target and the chosen plan; None without a curve."""
    if not found.curve:
        return None
    figure, axes = _figure(9, 4.6)
    bytes_of, predicted = zip(*((p.bytes, p.predicted) for p in found.curve), strict=True)
    axes.plot(bytes_of, predicted, color=_BLUE, label="predicted")
    measured = [(p.bytes, p.measured) for p in found.curve if p.measured is not None]
    if measured:
        axes.plot(*zip(*measured, strict=True), "o", color=_GREEN, label="measured, no fine-tuning")
    axes.axhline(found.base_cost, color=_GREY, linestyle=":", label="full precision")
    if (wanted := found.target_bytes) is not None:
        axes.axvline(wanted, color=_RED, linestyle="--", linewidth=1, label=f"target: {wanted:,} bytes")
    after = ", after a few steps of fine-tuning" if found.recovered else ""
    axes.plot(found.bytes, found.cost, "*", color=_ORANGE, markersize=15, label=f"chosen plan{after}")
    costs = [*predicted, *(cost for _, cost in measured), found.cost, found.base_cost]
    axes.set(xscale="log", xlabel="bytes of the file", ylabel="cost")
    if min(costs) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_choices(found: SearchRecord) -> Figure:
    """p and b of every group, as bars."""
    rows = range(len(found.groups))
    figure = Figure(figsize=(9, 1.3 + 0.24 * len(rows)), layout="constrained")
    rates, widths = figure.subplots(1, 2, sharey=True)
    rates.barh(rows, [100 * g.pruning_rate for g in found.groups], color=_BLUE)
    rates.set(xlabel="p: weights pruned (%)", xlim=(0, 100))
    widths.barh(rows, [g.bits for g in found.groups], color=_ORANGE)
    widths.set(xlabel="b: bits of a surviving weight", xticks=range(max(g.bits for g in found.groups) + 1))
    rates.set_yticks(rows, [g.name for g in found.groups])
    rates.set_ylim(len(rows) - 0.4, -0.6)
    for axes in (rates, widths):
        axes.grid(axis="x", alpha=0.3)
    return figure


def plot_sensitivity(found: SearchRecord) -> Figure | None:
    """What each group adds alone to the cost: group by p, one map a bit width, with the chosen θ marked.

    From the surfaces; for a method that has none, the evaluations themselves.
    """
    tables: dict[int, list[tuple[int, Sequence[float], Sequence[float]]]] = {}
    row = {g.name: i for i, g in enumerate(found.groups)}
    for s in found.sensitivity:
        tables.setdefault(s.bits, []).append((row[s.group], s.pruning_rates, s.costs))
    points = [e for e in found.evaluations if e.stage in ("alone", "layerwise") and e.group is not None]
    bits = sorted(tables or {e.bits for e in points if e.bits is not None})
    if not bits:
        return None
    added = [max(c, 0.0) for s in found.sensitivity for c in s.costs] or [_added(found, e) for e in points]
    least, norm = _norm(added)
    columns = min(len(bits), 4)
    lines = math.ceil(len(bits) / columns)
    height = min(0.6 + 0.2 * len(row), 9)
    figure = Figure(figsize=(max(2.6 * columns + 2, 7), lines * height + 1), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    image = matplotlib.cm.ScalarMappable(norm, "viridis")
    for axes, b in zip(grid.flat, bits, strict=False):
        for i, rates, costs in tables.get(b, []):
            edges = _edges([sparsity(p) for p in rates])
            axes.pcolormesh(edges, [i - 0.5, i + 0.5], np.maximum(costs, least)[None], norm=norm, cmap="viridis")
        if not tables:
            shown = [e for e in points if e.bits == b and e.pruning_rate is not None]
            axes.scatter(
                [sparsity(e.pruning_rate or 0.0) for e in shown],
                [row[e.group or ""] for e in shown],
                c=[max(_added(found, e), least) for e in shown],
                norm=norm,
                cmap="viridis",
                s=28,
            )
        chosen = [(sparsity(g.pruning_rate), i) for i, g in enumerate(found.groups) if g.bits == b]
        if chosen:
            axes.plot(*zip(*chosen, strict=True), "*", color="white", markeredgecolor="black", markersize=11)
        axes.set(title=f"b = {b}", ylim=(len(row) - 0.5, -0.5), xlim=(-0.1, 6.3))
        axes.set_xticks([sparsity(p) for p in _RATES], [f"{p:g}" for p in _RATES], rotation=90, fontsize=8)
        axes.set_yticks(*_names(found))
    for axes in list(grid.flat)[len(bits) :]:
        axes.set_axis_off()
    figure.supxlabel("p (star: the θ that was chosen)", fontsize=10)
    figure.colorbar(image, ax=grid, label="cost added", shrink=0.9)
    return figure


def plot_convergence(found: SearchRecord) -> Figure:
    """What was minimised against the number of the evaluation, stages told apart, with the best so far."""
    figure, axes = _figure(9, 4)
    numbered = [(n, e) for n, e in enumerate(found.evaluations, start=1) if e.stage != "drop"]
    for stage in dict.fromkeys(e.stage for _, e in numbered):
        points = [(n, e.cost if e.objective is None else e.objective) for n, e in numbered if e.stage == stage]
        axes.plot(*zip(*points, strict=True), ".", color=_COLOURS[stage], label=_LABELS[stage])
    for run in _races(numbered):
        best = np.minimum.accumulate([e.cost if e.objective is None else e.objective for _, e in run])
        axes.step([n for n, _ in run], best, where="post", color="black", linewidth=1.2)
    axes.plot([], [], color="black", linewidth=1.2, label="best so far")
    layerwise = any(e.objective is not None for _, e in numbered)
    axes.set(xlabel="evaluation", ylabel="ε − λc" if layerwise else "cost")
    if all(e.cost > 0 and e.objective is None for _, e in numbered):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


_LABELS = {
    "base": "full precision",
    "alone": "one group alone",
    "layerwise": "layer by layer",
    "whole": "whole plans along the curve",
    "candidates": "candidates of the wanted size",
    "refine": "Bayesian refinement",
    "finalists": "the best of them, fine-tuned longer",
}


def _races(numbered: Sequence[tuple[int, Evaluation]]) -> list[list[tuple[int, Evaluation]]]:
    """Runs of evaluations that compete with each other: of one layer, or of whole plans fine-tuned alike."""
    races: dict[str, list[tuple[int, Evaluation]]] = {}
    for n, e in numbered:
        if e.stage == "layerwise":
            races.setdefault(f"layer {e.group}", []).append((n, e))
        elif e.stage in ("candidates", "refine"):
            races.setdefault("whole plans", []).append((n, e))
        elif e.stage == "finalists":
            races.setdefault("finalists", []).append((n, e))
    return list(races.values())


def _added(found: SearchRecord, e: Evaluation) -> float:
    return max(e.cost - found.base_cost, 0.0)


def _norm(added: Sequence[float]) -> tuple[float, LogNorm]:
    """Colours over the four decades below the highest cost added that is usual, and the least of them."""
    highest = max(float(np.quantile(added, 0.99)), 1e-9)
    return highest * 1e-4, LogNorm(highest * 1e-4, highest, clip=True)


def _edges(centres: Sequence[float]) -> npt.NDArray[np.float64]:
    middle = np.asarray(centres, dtype=np.float64)
    if len(middle) == 1:
        return np.array([middle[0] - 0.1, middle[0] + 0.1])
    between = (middle[1:] + middle[:-1]) / 2
    return np.concatenate([[2 * middle[0] - between[0]], between, [2 * middle[-1] - between[-1]]])


def _names(found: SearchRecord) -> tuple[list[int], list[str]]:
    step = math.ceil(len(found.groups) / _MOST_NAMES)
    rows = list(range(0, len(found.groups), step))
    return rows, [found.groups[i].name for i in rows]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
