"""What clipq adds to training in several processes: time a step, and what it sends.

    python benchmarks/scale.py

Starts 1, 2 and 4 processes on this machine, with one thread each, that talk over gloo. In each of them the CIFAR
ResNet-20 is trained by DistributedDataParallel and by FSDP2 (``fully_shard``), plain and attached; the four take turns
step by step, each step begun together. Then weights of ResNet-50's shapes, split over the processes, are quantized
again and again while they drift as in training. What clipq sends is counted where it is sent. From these counts, and
from figures that are assumed and named, follows a projection to GPUs. Writes ``benchmarks/results/scale.json`` and the
tables of ``docs/scale.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timing import machine, markdown_table, ratios, replace_between, spread, write_json
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import clipq
from clipq.finetune.processes import leave
from clipq.models import build
from clipq.operator import Quantizer, QuantizerEntry
from clipq.operator.gpu_bits import BINS

PROCESSES = (1, 2, 4)
PRUNING_RATE, BITS = 0.9, 3
BATCH = 32
DRIFT = 1e-4
"""How far a weight moves a step, in standard deviations of its tensor."""
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"

NETWORKS = {8: (20e-6, 200e9), 64: (60e-6, 40e9)}
"""GPUs: assumed seconds a collective, and bytes a second that a GPU sends: one NVLink machine; eight on InfiniBand."""
MEMORY = 3.35e12
"""Assumed bytes a second of a GPU's memory: the data sheet of an H100."""
LAUNCH, LAUNCHES = 10e-6, 11
"""Assumed seconds between launches, and how many there are."""
STEP = 0.1
"""Assumed seconds of a training step of ResNet-50, batch 256 a GPU."""


def resnet_50() -> list[tuple[int, ...]]:
    """The shapes of ResNet-50's convolutions and of its linear layer."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, inputs, 1, 1))
            inputs = 4 * width
    return [*shapes, (1000, 2048)]


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts the all-reduces called from Python, which are clipq's: DDP and FSDP have their own ways to send."""
    found = {"collectives": 0, "bytes": 0}
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        found["collectives"] += 1
        found["bytes"] += tensor.nbytes
        return original(tensor, *arguments, **named)

    dist.all_reduce = all_reduce
    try:
        yield found
    finally:
        dist.all_reduce = original


def variant(kind: str, attached: bool) -> Callable[[], dict[str, int]]:
    """A step of one way of training, which returns what clipq sent."""
    torch.manual_seed(0)
    model = build("resnet-20")
    plan = clipq.Plan.uniform(model, pruning_rate=PRUNING_RATE, bits=BITS)
    x, target = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    if kind == "DDP":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model.layer1, model.layer2, model.layer3):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=5e-4)
    if attached:
        clipq.attach(model, optimizer, plan)

    def step() -> dict[str, int]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        with counted() as found:
            optimizer.step()
        return found

    return step


def train(steps: int) -> dict[str, Any]:
    """Seconds a step, and what is sent, of the four ways of training."""
    names = [(kind, attached) for kind in ("DDP", "FSDP") for attached in (False, True)]
    variants = {name: variant(*name) for name in names}
    seconds: dict[tuple[str, bool], list[float]] = {name: [] for name in variants}
    sent: dict[tuple[str, bool], list[dict[str, int]]] = {name: [] for name in variants}
    for turn in range(steps + 4):
        for name, step in variants.items():
            dist.barrier()
            start = time.perf_counter()
            found = step()
            dist.barrier()
            if turn >= 4:
                seconds[name].append(time.perf_counter() - start)
                sent[name].append(found)
    return {
        kind: {
            "plain seconds": spread(seconds[kind, False]),
            "attached seconds": spread(seconds[kind, True]),
            "ratio": ratios(seconds[kind, True], seconds[kind, False]),
            "collectives": statistics.mean(found["collectives"] for found in sent[kind, True]),
            "bytes": statistics.mean(found["bytes"] for found in sent[kind, True]),
        }
        for kind in ("DDP", "FSDP")
    }


def quantize(calls: int) -> dict[str, Any]:
    """Seconds, collectives and bytes of quantizing weights of ResNet-50's shapes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    weights = []
    for shape in resnet_50():
        deviation = (2 / torch.Size(shape[1:]).numel()) ** 0.5
        weights.append(distribute_tensor(torch.randn(shape, generator=generator) * deviation, mesh, [Shard(0)]))
    out = [torch.empty_like(weight) for weight in weights]
    quantizer = Quantizer([QuantizerEntry(str(i), PRUNING_RATE, BITS) for i in range(len(weights))])
    noise = torch.Generator().manual_seed(1 + dist.get_rank())
    seconds, sent = [], []
    for turn in range(calls + 3):
        with torch.no_grad():
            for weight in weights if turn else ():
                local = weight.to_local()
                deviation = (2 / torch.Size(weight.shape[1:]).numel()) ** 0.5
                local.add_(torch.randn(local.shape, generator=noise), alpha=DRIFT * deviation)
        dist.barrier()
        start = time.perf_counter()
        with counted() as found:
            quantizer(weights, out)
        dist.barrier()
        sent.append(found)
        if turn >= 3:
            seconds.append(time.perf_counter() - start)
    return {
        "tensors": len(weights),
        "weights": sum(weight.numel() for weight in weights),
        "seconds": spread(seconds),
        "first": sent[0],
        "collectives": statistics.mean(found["collectives"] for found in sent[3:]),
        "bytes": statistics.mean(found["bytes"] for found in sent[3:]),
    }


def worker(steps: int, calls: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = {"training": train(steps), "ResNet-50": quantize(calls)}
    if dist.get_rank() == 0:
        print(json.dumps(result))
    leave()


def measure(number: int, steps: int, calls: int) -> dict[str, Any]:
    """The results of so many processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    command = [sys.executable, __file__, "--worker", "--steps", str(steps), "--calls", str(calls)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(number)
    ]
    output = processes[0].communicate()[0]
    if any(process.wait() for process in processes):
        raise SystemExit(f"one of {number} processes failed")
    result: dict[str, Any] = json.loads(output)
    return result


def projected(results: dict[str, Any]) -> dict[str, Any]:
    """What clipq would add to a step of ResNet-50 on GPUs, from what its kernels read, write and send."""
    measured = next(iter(results["processes"].values()))["ResNet-50"]
    tensors, weights = measured["tensors"], measured["weights"]
    passes = 4
    counts = 4 * 2 * tensors * (2 + int(BINS.value))  # per sign two tallies and the bins, int32
    largest = 4 * 2 * tensors
    sums = 8 * 2 * tensors * 2**BITS
    sent, collectives = passes * (counts + largest) + sums, 2 * passes + 1
    traffic = 4 * 4 * weights / MEMORY  # three reads and one write of float32
    projection = {"bytes": sent, "collectives": collectives, "GPUs": {}}
    for number, (latency, bandwidth) in NETWORKS.items():
        sending = collectives * latency + 2 * (number - 1) / number * sent / bandwidth
        projection["GPUs"][number] = {
            "DDP seconds": traffic + LAUNCHES * LAUNCH,
            "FSDP seconds": traffic / number + LAUNCHES * LAUNCH + sending,
            "FSDP sending": sending,
        }
    return projection


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the page, by their marks."""
    training, operator = [], []
    for number, found in results["processes"].items():
        for kind, values in found["training"].items():
            ratio = values["ratio"]
            training.append(
                [
                    f"{number}: {kind}",
                    f"{values['plain seconds']['median'] * 1e3:.0f}",
                    f"{values['attached seconds']['median'] * 1e3:.0f}",
                    f"{ratio['median']:.3f}",
                    f"{ratio['lower quartile']:.3f} to {ratio['upper quartile']:.3f}",
                    f"{values['collectives']:.1f}",
                    f"{values['bytes'] / 1e3:.0f}",
                ]
            )
        values = found["ResNet-50"]
        operator.append(
            [
                str(number),
                f"{values['seconds']['median'] * 1e3:.0f}",
                f"{values['seconds']['lower quartile'] * 1e3:.0f} to {values['seconds']['upper quartile'] * 1e3:.0f}",
                f"{values['collectives']:.1f}",
                f"{values['bytes'] / 1e3:.0f}",
                f"{100 * values['bytes'] / (3 * 4 * values['weights']):.2f}",
            ]
        )
    projection = [
        [
            str(number),
            f"{values['DDP seconds'] * 1e3:.2f}",
            f"{100 * values['DDP seconds'] / STEP:.1f}",
            f"{values['FSDP seconds'] * 1e3:.2f}",
            f"{values['FSDP sending'] * 1e3:.2f}",
            f"{100 * values['FSDP seconds'] / STEP:.1f}",
        ]
        for number, values in results["projection"]["GPUs"].items()
    ]
    return {
        "training": markdown_table(
            ["processes", "plain, ms", "attached, ms", "ratio", "middle half", "all-reduces of ours", "of kB"], training
        ),
        "operator": markdown_table(
            ["processes", "ms", "middle half", "all-reduces", "of kB", "% of FSDP's own"], operator
        ),
        "projection": markdown_table(
            ["GPUs", "DDP, ms", "% of a step", "FSDP, ms", "of which sending", "% of a step"], projection
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="steps of each way of training that are timed")
    parser.add_argument("--calls", type=int, default=8, help="calls of the operator that are timed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.steps, arguments.calls)
        return
    torch.set_num_threads(1)
    results: dict[str, Any] = {"made with": {**machine(), "pruning rate": PRUNING_RATE, "bits": BITS, "batch": BATCH}}
    results["made with"]["machine's cores"] = os.cpu_count()
    results["processes"] = {number: measure(number, arguments.steps, arguments.calls) for number in PROCESSES}
    results["projection"] = projected(results)
    write_json("scale", results)
    for mark, table in tables(results).items():
        print(f"\n{table}")
        replace_between(PAGE, mark, table)


if __name__ == "__main__":
    main()
