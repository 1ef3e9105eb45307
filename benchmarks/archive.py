"""The file's size and speed on real nets, against NNCodec and plainer ways to store codes.

    python benchmarks/archive.py --set-up                       # NNCodec, in an environment of its own
    python benchmarks/archive.py --data-root DIR [--model FILE.clipq ...] [--net NAME ...]

``--model`` adds files that ``clipq compress`` made. Sizes count everything in a file. Times are the least of several
runs with the kernels warm: of the processor for one thread, of the clock for more. Writes
``benchmarks/results/archive.json`` and the tables of ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from safetensors.numpy import load_file
from timing import cores, markdown_table, processor, read_json, replace_between, write_json

from clipq import archive
from clipq.operator import quantize

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / "build" / "nncodec"
NNCODEC = "nncodec==2.1.3"
RELEASED_SQUEEZENET = 675_763
LARGE = "alexnet-shaped"
HELD_AGAINST = "non-weights at 2^-24"
EFFORTS: tuple[archive.Effort, ...] = ("default", "max")
Net = dict[str, npt.NDArray[np.float32]]


def set_up() -> None:
    """Make NNCodec's environment. Its dependencies include torch, which coding plain arrays does not need."""
    python = ENVIRONMENT / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy<2"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", NNCODEC], check=True)


def quantized(net: Mapping[str, npt.NDArray[np.float32]], p: float, bits: int) -> Net:
    """Every tensor of two or more dimensions quantized in one shot, without training."""
    return {k: quantize(torch.from_numpy(v), p, bits).numpy() if v.ndim > 1 else v for k, v in net.items()}


def alexnet() -> Net:
    """61 million weights in AlexNet's shapes, p = 0.92: normal, with inputs and outputs of different scales."""
    rng = np.random.default_rng(0)
    shapes = [(96, 3, 11, 11), (256, 48, 5, 5), (384, 256, 3, 3), (384, 192, 3, 3), (256, 192, 3, 3)]
    shapes += [(4096, 9216), (4096, 4096), (1000, 4096)]
    net: Net = {}
    for i, shape in enumerate(shapes):
        weight = rng.standard_normal(shape, np.float32)
        for axis in (0, 1):
            scale = np.exp(0.3 * rng.standard_normal(shape[axis], np.float32))
            weight *= scale.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        net[f"{i}.weight"] = quantize(torch.from_numpy(weight), 0.92, 3).numpy()
        net[f"{i}.bias"] = rng.standard_normal(shape[0], np.float32)
    return net


def nets(data: Path, models: list[Path]) -> dict[str, Callable[[], Net]]:
    weights = data / "weights"
    found: dict[str, Callable[[], Net]] = {
        "lenet-300-100, pruned": lambda: quantized(load_file(weights / "mnist_lenet300100_sparse.safetensors"), 0, 4),
        "lenet-5, pruned": lambda: quantized(load_file(weights / "mnist_lenet5_sparse.safetensors"), 0, 4),
        "squeezenet": lambda: load_file(weights / "imagenet_squeezenet_v1.0_deepcompression.safetensors"),
    }
    for name, file in (("mobilenet", "imagenet_mobilenet_v1_0.25_224"), ("resnet-20", "cifar10_resnet20")):
        for p, bits in ((0.5, 4), (0.7, 3), (0.9, 3)):
            found[f"{name} {p}, {bits}"] = lambda file=file, p=p, bits=bits: quantized(
                load_file(weights / f"{file}.safetensors"), p, bits
            )
    for model in models:
        found[f"{model.parent.name}, trained"] = lambda model=model: _read(model.read_bytes())
    found[LARGE] = alexnet
    return found


def _read(content: bytes) -> Net:
    with archive.Archive(content) as file:
        return {name: np.asarray(array, np.float32) for name, array in file.read(threads=1).items()}


def plain_sizes(net: Net) -> dict[str, int]:
    """Codes by order-0 entropy, LZMA, Zstandard, or as gaps and codes; codebooks and the rest as float32."""
    rest, entropy, sparse, stream = 0, 0.0, 0, []
    for array in net.values():
        levels, codes, counts = np.unique(array, return_inverse=True, return_counts=True)
        if len(levels) > 256:
            rest += array.nbytes
            continue
        rest += levels.nbytes
        entropy -= float((counts * np.log2(counts / array.size)).sum()) / 8
        stream.append(codes.astype(np.uint8).tobytes())
        zero = int(counts[levels == 0].sum())
        sparse += _sparse_bytes(np.flatnonzero(array.reshape(-1)), (len(levels) - bool(zero)), array.size)
    joined = b"".join(stream)
    return {
        "float32": sum(array.nbytes for array in net.values()),
        "order-0 entropy": rest + round(entropy),
        "lzma": rest + len(lzma.compress(joined, preset=9)),
        "zstd": rest + len(zstandard.ZstdCompressor(level=19).compress(joined)),
        "sparse layout": rest + sparse,
    }


def _sparse_bytes(where: npt.NDArray[np.int64], levels: int, size: int) -> int:
    """The paper's layout: for each weight that is not zero the gap and the code; long gaps take more entries."""
    gaps = np.diff(where, prepend=-1) - 1
    code_bits = int(levels).bit_length()
    best = size * code_bits
    for width in range(1, 17):
        best = min(best, int((1 + (gaps >> width)).sum()) * (width + code_bits))
    return -(-best // 8)


def least(action: Callable[[], object], repeats: int, clock: Callable[[], float] = time.process_time) -> float:
    times = []
    for _ in range(repeats):
        start = clock()
        action()
        times.append(clock() - start)
    return min(times)


def ours(net: Net, effort: archive.Effort, repeats: int) -> dict[str, Any]:
    content = archive.encode_file(net, effort=effort, threads=1)
    back = _read(content)
    assert all(np.array_equal(back[k].view(np.uint32), v.view(np.uint32)) for k, v in net.items()), "not exact"
    encode = least(lambda: archive.encode_file(net, effort=effort, threads=1), max(1, repeats // 4))
    return {"bytes": len(content), "encode": encode, "decode": least(lambda: _read(content), repeats)}


def nncodec(net: Net, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "net.npz", **net)
        command = [ENVIRONMENT / "bin" / "python", ROOT / "benchmarks" / "nncodec_worker.py"]
        run = subprocess.run(
            [*command, Path(folder) / "net.npz", str(repeats)], check=True, capture_output=True, text=True
        )
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def scaling(net: Net) -> dict[str, Any]:
    """Seconds to write and read by threads; the memory of a read beyond the tensors."""
    results: dict[str, Any] = {}
    content = archive.encode_file(net, threads=cores())
    for threads in sorted({1, 2, cores()}):
        results[str(threads)] = {
            "encode": least(lambda threads=threads: archive.encode_file(net, threads=threads), 1, time.perf_counter),
            "decode": least(
                lambda threads=threads: archive.Archive(content).read(threads=threads), 2, time.perf_counter
            ),
        }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.clipq"
        path.write_bytes(content)
        worker = [sys.executable, str(ROOT / "tests" / "workers" / "reading_memory.py"), str(path), "path"]
        run = subprocess.run(worker, check=True, capture_output=True, text=True)
    return {"threads": results, "memory beyond the tensors": int(run.stdout)}


def cold_start(content: bytes) -> dict[str, float]:
    """Seconds of a new process, once it imported torch, to load a file: with no machine code kept, and with it."""
    program = "import sys, time, torch; start = time.perf_counter(); from clipq import archive; "
    program += "archive.Archive(sys.argv[1]).read(); print(time.perf_counter() - start)"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.clipq"
        path.write_bytes(content)
        environment = os.environ | {"NUMBA_CACHE_DIR": folder, "PYTHONPATH": str(ROOT / "src")}

        def load() -> float:
            command = [sys.executable, "-c", program, str(path)]
            return float(
                subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()[-1]
            )

        return {"empty cache": load(), "full cache": min(load() for _ in range(5))}


def tables(results: Mapping[str, Any]) -> str:
    sizes, speeds = [], []
    for name, r in results["nets"].items():
        plain, peer = r["plain"], r["nncodec"]
        against = peer[HELD_AGAINST]
        ratios = [f"{r[e]['bytes'] / peer[way]['bytes']:.3f}" for e in EFFORTS for way in peer]
        cells = [f"{plain[k]:,}" for k in ("order-0 entropy", "lzma", "zstd", "sparse layout")]
        cells += [f"{peer[way]['bytes']:,}" for way in peer] + [f"{r[e]['bytes']:,}" for e in EFFORTS]
        sizes.append([name, *cells, *ratios])
        times = [f"{1000 * r[e][way]:,.1f}" for way in ("encode", "decode") for e in EFFORTS]
        speeds.append(
            [
                name,
                f"{1000 * against['encode']:,.0f}",
                *times[:2],
                f"{1000 * against['decode']:,.1f}",
                *times[2:],
                f"{against['encode'] / r['default']['encode']:,.0f}",
                f"{against['decode'] / r['default']['decode']:.2f}",
            ]
        )
    ways = ["as it comes", "at 2^-24"]
    header = ["net, (p, b)", "order-0", "lzma", "zstd", "sparse", *(f"NNCodec {w}" for w in ways), *EFFORTS]
    header += [f"{e} / {w}" for e in EFFORTS for w in ways]
    text = [markdown_table(header, sizes)]
    header = ["ms, one thread", "NNCodec writes", *EFFORTS, "NNCodec reads", *EFFORTS, "writes faster", "reads faster"]
    text.append(markdown_table(header, speeds))
    measured = results["nets"].values()
    ratio = {e: [r[e]["bytes"] / r["nncodec"][HELD_AGAINST]["bytes"] for r in measured] for e in EFFORTS}
    lines = [
        f"- `{e}` / NNCodec with non-weights at 2^-24, by which the marks are judged: median "
        f"{statistics.median(ratio[e]):.3f}, largest {max(ratio[e]):.3f}"
        for e in EFFORTS
    ]
    if "squeezenet" in results["nets"]:
        share = results["nets"]["squeezenet"]["default"]["bytes"] / RELEASED_SQUEEZENET
        lines.append(f"- SqueezeNet: {share:.3f} of the released Deep-Compression file's {RELEASED_SQUEEZENET:,} bytes")
    cold = results["cold start"]
    lines.append(
        f"- A new process that has imported torch loads LeNet-300-100 in {cold['empty cache']:.2f} s while no machine "
        f"code is kept, in {cold['full cache']:.2f} s afterwards"
    )
    if "scaling" in results:
        threads = results["scaling"]["threads"]
        first, last = threads["1"], threads[max(threads, key=int)]
        lines.append(
            f"- {max(threads, key=int)} threads on the AlexNet-shaped net: writing "
            f"{first['encode'] / last['encode']:.2f} times as fast as one, reading "
            f"{first['decode'] / last['decode']:.2f} times; memory of reading beyond the tensors "
            f"{results['scaling']['memory beyond the tensors'] / 2**20:.1f} MiB"
        )
    return "\n\n".join([*text, "\n".join(lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set-up", action="store_true", help="make NNCodec's environment and stop")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--model", type=Path, action="append", default=[], help="a file that clipq compress made")
    parser.add_argument("--net", action="append", help="only these; the others keep their last results")
    arguments = parser.parse_args()
    if arguments.set_up:
        set_up()
        return
    if arguments.data_root is None:
        parser.error("--data-root is missing: the folder that has weights/")
    results = read_json("archive") or {"nets": {}}
    results |= {"processor": processor(), "cores": cores()}
    for name, make in nets(arguments.data_root, arguments.model).items():
        if arguments.net and name not in arguments.net:
            continue
        print(name, flush=True)
        net = make()
        repeats = 1 if name == LARGE else max(8, 10**7 // sum(array.size for array in net.values()))
        known = results["nets"].get(name, {}).get("nncodec")
        results["nets"][name] = {
            "plain": plain_sizes(net),
            **{effort: ours(net, effort, repeats) for effort in EFFORTS},
            "nncodec": nncodec(net, repeats) if known is None or not arguments.net else known,
        }
        if name == LARGE:
            results["scaling"] = scaling(net)
        if name.startswith("lenet-300-100"):
            results["cold start"] = cold_start(archive.encode_file(net))
        write_json("archive", results)
    replace_between(ROOT / "docs" / "performance.md", "archive", tables(results))


if __name__ == "__main__":
    main()
