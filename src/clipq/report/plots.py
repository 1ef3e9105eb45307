"""Plots of what runs left on disk."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from clipq.report.run import RunReport

_PRUNED, _KEPT, _FLOAT = "#9aa0a6", "#1a73e8", "#e8710a"


def plot_run(report: RunReport, path: Path) -> None:
    """One run as a picture: accuracy and bytes epoch by epoch, and where the bytes of the file are."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    accuracy, share = figure.subplots(1, 2, width_ratios=(1.25, 1))
    figure.suptitle(
        f"{report.recipe.model} on {report.recipe.data}: {report.file.float32_bytes:,} → {report.file.bytes:,} bytes "
        f"({report.ratio:.1f}×), top-1 {report.before.accuracy:.2f} → {report.reloaded.accuracy:.2f} %"
    )

    epochs = range(1, len(report.epochs) + 1)
    for phase, colour, label in (("float", _FLOAT, "float training"), ("compress", _KEPT, "pruned and quantized")):
        points = [(n, e.validation_accuracy) for n, e in zip(epochs, report.epochs, strict=True) if e.phase == phase]
        if points:
            accuracy.plot(*zip(*points, strict=True), color=colour, marker=".", label=label)
    best = max(e.validation_accuracy for e in report.epochs)
    accuracy.set_ylim(bottom=max(min(e.validation_accuracy for e in report.epochs), best - 15) - 0.5)
    accuracy.set(xlabel="epoch", ylabel="top-1 on the validation set (%)")
    accuracy.legend(loc="lower right")
    accuracy.grid(alpha=0.3)

    tensors = [t for t in report.file.tensors if t.tied_to is None]
    names = [t.name for t in tensors] + ["the header"]
    sizes = [t.bytes for t in tensors] + [report.file.overhead_bytes]
    colours = [_KEPT if t.pruning_rate is not None else _PRUNED for t in tensors] + [_PRUNED]
    rows = range(len(names))
    share.barh(rows, sizes, color=colours)
    share.set_yticks(rows, names)
    share.invert_yaxis()
    share.set(xlabel="bytes in the file (blue: compressed by the plan)")
    share.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
