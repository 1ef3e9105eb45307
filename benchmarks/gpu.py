"""The operator on a GPU, beside the copy of the same bytes; ResNet-50's plan and its training step.

    python benchmarks/gpu.py [--tests]

Times are of CUDA events, medians over repeats with the quartiles, what is compared in turns. ``--tests`` first runs
every test marked ``gpu``, and gives it a line of the table. Weights and images are random, seed 0. Writes
``benchmarks/results/gpu.json``; ends with 1 if a mark is missed or a test fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import clipq
from clipq.operator import Quantizer, QuantizerEntry

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
DEVICE = "cuda"
FC6 = 37_748_736
"""Weights of AlexNet's fc6."""
DRIFT = 1e-4
"""How much the weights change from call to call, relative, as in training."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", action="store_true", help="run the tests marked gpu first")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and torch sees none", file=sys.stderr)
        return 1
    import triton

    rows: list[dict[str, Any]] = []
    if arguments.tests:
        rows.append(tests())
    torch.manual_seed(0)
    rows += [one_tensor(dtype, 0.9, 3) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    rows += [one_tensor(torch.float32, 0.0, 8), *plan_and_step()]
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    RESULTS.write_text(json.dumps({"machine": machine, "seed": 0, "rows": rows}, indent=2) + "\n")
    print(f"\n{machine}\n")
    print(f"{'what':<44} {'median':>10} {'quartiles':>17} {'compared with':>24} {'ratio':>7} {'mark':>12}")
    for row in rows:
        met = {True: "met", False: "MISSED", None: ""}[row["met"]]
        quartiles = "–".join(f"{q:.3f}" for q in row["quartiles"])
        print(
            f"{row['what']:<44} {row['median']:>10.3f} {quartiles:>17} {row['beside']:>24} {row['ratio']:>7.3f} "
            f"{row['mark']:>5} {met:>6}"
        )
    return int(any(row["met"] is False for row in rows))


def tests() -> dict[str, Any]:
    """Every test that needs a GPU, as one row; a failure or an empty run misses the mark."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--noconftest"]
    path = [str(ROOT / "src"), str(ROOT)]
    run = subprocess.run(
        [*command, "-o", f"pythonpath={' '.join(path)}", "tests/operator/test_gpu.py"], cwd=ROOT, check=False
    )
    return row("tests marked gpu: exit code", [float(run.returncode)], "0", run.returncode, "0", run.returncode == 0)


def one_tensor(dtype: torch.dtype, pruning_rate: float, bits: int) -> dict[str, Any]:
    """One tensor of fc6's size, drifting between calls, beside its copy."""
    weight = (torch.randn(FC6, device=DEVICE) * 0.01).to(dtype)
    out = torch.empty_like(weight)
    quantize = Quantizer([QuantizerEntry("fc6", pruning_rate, bits)])
    times = in_turns(
        {"operator": lambda: quantize([weight], [out]), "copy": lambda: out.copy_(weight)},
        between=lambda: drift([weight]),
    )
    ratio = statistics.median(times["operator"]) / statistics.median(times["copy"])
    marked = dtype == torch.float32 and pruning_rate == 0.9
    return row(
        f"37.7 M {str(dtype).removeprefix('torch.')}, p {pruning_rate}, b {bits}: ms",
        times["operator"],
        f"copy {statistics.median(times['copy']):.3f} ms",
        ratio,
        "<= 5" if marked else "",
        ratio <= 5 if marked else None,
    )


def plan_and_step() -> list[dict[str, Any]]:
    """All tensors of ResNet-50 in one call, and its training step with and without `attach`."""
    from torchvision.models import resnet50

    plain, attached = (resnet50().to(DEVICE, memory_format=torch.channels_last) for _ in range(2))
    plan = clipq.Plan.uniform(attached, pruning_rate=0.7, bits=4)
    weights = [plain.get_parameter(name).detach().clone() for name in plan.tensors]
    out = [torch.empty_like(w) for w in weights]
    quantize = Quantizer([QuantizerEntry(name, 0.7, 4) for name in plan.tensors])
    times = in_turns({"plan": lambda: quantize(weights, out)}, between=lambda: drift(weights))["plan"]
    median = statistics.median(times)
    rows = [row(f"ResNet-50, {len(weights)} tensors, p 0.7, b 4: ms", times, "", median, "<= 1", median <= 1)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantize(weights, out)
    times = in_turns({"graph": graph.replay}, between=lambda: drift(weights))["graph"]
    rows.append(row("the same, as a CUDA graph: ms", times, "", statistics.median(times), "", None))

    images = torch.randn(256, 3, 224, 224, device=DEVICE).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (256,), device=DEVICE)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (plain, attached)]
    attachment = clipq.attach(attached, optimizers[1], plan)
    steps = in_turns(
        {
            "plain": lambda: train(plain, optimizers[0], images, labels),
            "attached": lambda: train(attached, optimizers[1], images, labels),
        },
        repeats=30,
    )
    attachment.detach()
    ratio = statistics.median(steps["attached"]) / statistics.median(steps["plain"])
    beside = f"plain {statistics.median(steps['plain']):.2f} ms"
    rows.append(row("ResNet-50 step, 256, bf16: ms", steps["attached"], beside, ratio, "<= 1.03", ratio <= 1.03))
    return rows


def train(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def drift(weights: list[Tensor]) -> None:
    for weight in weights:
        weight.mul_(1 + DRIFT * (2 * torch.rand((), device=DEVICE) - 1))


def in_turns(
    work: dict[str, Callable[[], Any]], between: Callable[[], Any] = lambda: None, repeats: int = 100
) -> dict[str, list[float]]:
    """Milliseconds of each, repeated in turns after a tenth as many to warm up; the device is idle before each."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for i in range(repeats + max(repeats // 10, 5)):
        for name, run in work.items():
            between()
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if i >= max(repeats // 10, 5):
                times[name].append(start.elapsed_time(end))
    return times


def row(what: str, times: list[float], beside: str, ratio: float, mark: str, met: bool | None) -> dict[str, Any]:
    quartiles = statistics.quantiles(times, n=4)[::2] if len(times) > 1 else [times[0], times[0]]
    return {
        "what": what,
        "median": statistics.median(times),
        "quartiles": quartiles,
        "beside": beside,
        "ratio": ratio,
        "mark": mark,
        "met": met,
    }


if __name__ == "__main__":
    sys.exit(main())
