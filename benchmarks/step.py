"""Whole training steps with and without `clipq.attach`, side by side, and beside other libraries.

    python benchmarks/step.py [--peer dkm=PYTHON] [--peer nncf=PYTHON] [NET ...]

Each variant trains the same network on the same random batch in a process of its own; the processes take turns, so
that whatever else the machine does falls on all of them alike, and are started anew a few times. Peers run in virtual
environments of their own: coremltools' differentiable k-means palettizer at 3 bits (``pip install -c constraints.txt
-e . coremltools==9.0``) and NNCF's magnitude pruning at 90 % (``nncf==3.4.0``), both on all layers that clipq's plan
has. NNCF's masks are made once and stay; the others work on the weights at every step. No process gets more than half
of the machine's memory. Writes ``benchmarks/results/step.json`` and the tables of ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import cores, machine, markdown_table, peak_memory, ratios, read_json, replace_between, spread, write_json
from torch import Tensor, nn

SEED = 0
PRUNING_RATE, BITS = 0.9, 3
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
TURN, PAUSE = 0.15, 0.03
"""Seconds that a variant trains in one turn, at least one step, and waits before: idle threads spin for a while."""
PATIENCE = 60.0
"""Seconds that a variant gets for its first five steps; one that takes longer is not measured further."""


@dataclass(frozen=True)
class Net:
    """A network and how it is trained: batch shape, classes, precision and layout; the most that attach may cost."""

    title: str
    make: Callable[[], nn.Module]
    batch: tuple[int, ...]
    classes: int
    allowed: float
    bf16: bool = False
    channels_last: bool = False


class AlexNet(nn.Module):
    """AlexNet in its one-column form, 61 million weights."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, kernel: int, *, stride: int = 1, pool: bool = False) -> list[nn.Module]:
            layers = [nn.Conv2d(inputs, outputs, kernel, stride, padding=2 if kernel > 3 else 1), nn.ReLU(inplace=True)]
            return [*layers, nn.MaxPool2d(3, 2)] if pool else layers

        self.layers = nn.Sequential(
            *block(3, 64, 11, stride=4, pool=True),
            *block(64, 192, 5, pool=True),
            *block(192, 384, 3),
            *block(384, 256, 3),
            *block(256, 256, 3, pool=True),
            *(nn.Flatten(), nn.Dropout(), nn.Linear(9216, 4096), nn.ReLU(inplace=True)),
            *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Linear(4096, 1000)),
        )

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x)
        return scores


def named(name: str) -> nn.Module:
    """One of the recipes' networks."""
    from clipq.models import build

    return build(name)


NETS = {
    "lenet-5": Net("LeNet-5, batch 256", partial(named, "lenet-5"), (256, 1, 28, 28), 10, 1.05, channels_last=True),
    "resnet-20": Net(
        "CIFAR ResNet-20, batch 128", partial(named, "resnet-20"), (128, 3, 32, 32), 10, 1.03, True, channels_last=True
    ),
    "alexnet": Net("AlexNet, batch 32", AlexNet, (32, 3, 224, 224), 1000, 1.10),
}


def with_clipq(model: nn.Module, optimizer: torch.optim.Optimizer) -> object:
    import clipq

    return clipq.attach(model, optimizer, clipq.Plan.uniform(model, pruning_rate=PRUNING_RATE, bits=BITS))


def with_dkm(model: nn.Module, x: Tensor) -> nn.Module:
    from coremltools.optimize.torch.palettization import DKMPalettizer, DKMPalettizerConfig

    config = DKMPalettizerConfig.from_dict({"global_config": {"n_bits": BITS, "weight_threshold": 0}})
    return DKMPalettizer(model, config).prepare(inplace=True)


def with_nncf(model: nn.Module, x: Tensor) -> nn.Module:
    import nncf

    return nncf.prune(model, nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=PRUNING_RATE, examples_inputs=x)


PEERS = {"dkm": ("DKM (coremltools)", with_dkm), "nncf": ("magnitude pruning (NNCF)", with_nncf)}


def work(variant: str, net: Net) -> Iterator[dict[str, Any]]:
    """One variant's process: gives its memory before the first step, then the seconds of the steps of each turn."""
    torch.manual_seed(SEED)
    torch.set_num_threads(cores())
    x, target = torch.randn(net.batch), torch.randint(net.classes, net.batch[:1])
    if net.channels_last:
        x = x.to(memory_format=torch.channels_last)
    model = net.make()
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    if variant in PEERS:
        model = PEERS[variant][1](model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    attachment = with_clipq(model, optimizer) if variant == "clipq" else None
    precision = torch.autocast("cpu", torch.bfloat16) if net.bf16 else contextlib.nullcontext()

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        with precision:
            loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    for _ in range(5):
        step()
    yield {"weights": weights, "attached": attachment is not None}
    while True:
        time.sleep(PAUSE)
        stop = time.perf_counter() + TURN
        seconds = [step()]
        while time.perf_counter() < stop:
            seconds.append(step())
        yield {"seconds": seconds, "peak": peak_memory()}


def worker(variant: str, net: Net) -> None:
    """Answer each line on standard input with the next of `work`, as JSON; an error ends it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    resource.setrlimit(resource.RLIMIT_DATA, (half, half))
    turns = work(variant, net)
    for _ in sys.stdin:
        try:
            answer = next(turns)
        except Exception as error:
            answer = {"error": str(error).strip().splitlines()[0] if str(error) else type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


class Process:
    """A variant's process, seen from outside."""

    def __init__(self, name: str, variant: str, python: str) -> None:
        command = [python, __file__, "--worker", variant, name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def turn(self) -> dict[str, Any]:
        """Let it do its next turn. One that failed or died tells why under "error"."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print("go", file=self._process.stdin, flush=True)
            if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
                return {"error": f"not five steps in {PATIENCE:.0f} s"}
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"error": f"ended with status {self._process.wait()}"}

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def measure(name: str, pythons: dict[str, str], groups: int, turns: int) -> dict[str, Any]:
    """One network with every variant: seconds a step by turn, peak memory, ratios to plain."""
    medians: dict[str, list[float]] = {v: [] for v in pythons}
    peaks: dict[str, list[float]] = {v: [] for v in pythons}
    errors: dict[str, str] = {}
    weights = 0
    for _ in range(groups):
        processes = {v: Process(name, v, python) for v, python in pythons.items() if v not in errors}
        for variant, process in list(processes.items()):
            first = process.turn()
            if "error" in first:
                errors[variant] = first["error"]
                processes.pop(variant).end()
            else:
                weights = first["weights"]
        for _ in range(turns):
            for variant, process in processes.items():
                answer = process.turn()
                medians[variant].append(statistics.median(answer["seconds"]))
                peaks[variant].append(answer["peak"])
        for process in processes.values():
            process.end()
    result: dict[str, Any] = {"weights": weights, "variants": {}}
    for variant, values in medians.items():
        if variant in errors:
            result["variants"][variant] = {"error": errors[variant]}
        else:
            result["variants"][variant] = {
                "seconds": spread(values),
                "ratio": ratios(values, medians["plain"]),
                "peak bytes": max(peaks[variant]),
                "extra bytes": max(peaks[variant]) - max(peaks["plain"]),
            }
    return result


def table(results: dict[str, Any]) -> str:
    """The table of the page."""
    rows = []
    for name, net in NETS.items():
        for variant, values in results["nets"].get(name, {"variants": {}})["variants"].items():
            title = {"plain": "plain", "clipq": "clipq"}.get(variant) or PEERS[variant][0]
            if "error" in values:
                rows.append([f"{net.title}: {title}", values["error"], "", "", ""])
                continue
            ratio = values["ratio"]
            rows.append(
                [
                    f"{net.title}: {title}",
                    f"{values['seconds']['median'] * 1e3:.1f}",
                    f"{ratio['median']:.3f}",
                    f"{ratio['lower quartile']:.3f} to {ratio['upper quartile']:.3f}",
                    f"{values['extra bytes'] / 1e6:.0f}",
                ]
            )
    return markdown_table(["step", "ms", "times plain", "middle half", "more memory, MB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=list(NETS), metavar="NET", help=", ".join(NETS))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="dkm=… or nncf=…")
    parser.add_argument("--groups", type=int, default=3, help="how often the processes are started anew")
    parser.add_argument("--turns", type=int, default=20, help="turns of each process")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, NETS[arguments.nets[0]])
        return
    pythons = {"plain": sys.executable, "clipq": sys.executable}
    pythons |= dict(peer.split("=", 1) for peer in arguments.peer)
    results = read_json("step") or {"nets": {}}
    torch.set_num_threads(cores())
    results["made with"] = {**machine(), "seed": SEED, "pruning rate": PRUNING_RATE, "bits": BITS}
    for name in arguments.nets:
        results["nets"][name] = measure(name, pythons, arguments.groups, arguments.turns)
        write_json("step", results)
        print(f"{name}: {json.dumps(results['nets'][name])}", flush=True)
    text = table(results)
    print(text)
    replace_between(PAGE, "step", text)


if __name__ == "__main__":
    main()
