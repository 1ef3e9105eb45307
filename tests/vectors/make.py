"""Writes the test vectors of format version 1. Run once for each version; the files never change afterwards.

python tests/vectors/make.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from clipq import archive

HERE = Path(__file__).parent
Array = npt.NDArray[np.generic]


def quantized(rng: np.random.Generator, shape: tuple[int, ...], levels: int, density: float) -> npt.NDArray[np.float32]:
    """Weights with rows, columns and neighbours that differ, as trained ones do."""
    scale = np.exp(rng.normal(size=shape) + rng.normal(size=(shape[0], *[1] * (len(shape) - 1))))
    book = np.sort(rng.normal(size=levels)).astype(np.float32)
    book[levels // 2] = 0
    away = np.minimum(rng.geometric(0.4, shape) * np.sign(rng.normal(size=shape) + 0.3), levels - 1 - levels // 2)
    code = np.where(rng.random(shape) < density * scale, levels // 2 + np.maximum(away, -(levels // 2)), levels // 2)
    return book[code.astype(np.int64)]


def vectors() -> dict[str, tuple[Mapping[str, Array | archive.Tied], archive.Effort]]:
    """File name to the tensors in it and the effort it is written with."""
    rng = np.random.default_rng(1)
    small = {"weight": quantized(rng, (20, 30), 7, 0.2), "bias": rng.normal(size=20).astype(np.float32)}
    every = {
        name: np.frombuffer(rng.bytes(6 * dtype.itemsize), dtype).reshape(2, 3)
        for name, (_, dtype) in archive.dtypes.BY_NAME.items()
        if name != "bool"
    }
    return {
        "small": (small, "default"),
        "conv-max": ({"conv.weight": quantized(rng, (12, 8, 3, 3), 15, 0.5)}, "max"),
        "many-levels": ({"w": quantized(rng, (40, 50), 255, 0.8)}, "default"),
        "wide-row": ({"w": quantized(rng, (2, 70_000), 3, 0.01)}, "default"),
        "vector": ({"w": quantized(rng, (300,), 5, 0.5), "scalar": np.float64(-0.0).reshape(())}, "default"),
        "no-zero": ({"w": np.float32([-1.5, 0.25, 3])[rng.integers(0, 3, (33, 9))]}, "default"),
        "constant": ({"w": np.full((500, 70), 2.5, np.float16), "none": np.zeros((0, 3), np.float32)}, "default"),
        "few-bfloat16": ({"w": quantized(rng, (30, 64), 9, 0.3).astype(ml_dtypes.bfloat16)}, "default"),
        "few-int8": ({"w": rng.integers(-3, 4, (50, 50), dtype=np.int8)}, "default"),
        "tied": ({**small, "head.weight": archive.Tied("weight")}, "default"),
        "every-type": ({**every, "bool": np.array([True, False])}, "default"),
        "raw": ({"layer.weight": np.arange(18_200, dtype=np.float32).reshape(130, 140) / 7}, "default"),
    }


def expected(arrays: Mapping[str, Array]) -> dict[str, dict[str, object]]:
    """What a decoder must give: type, shape and the SHA-256 of the elements' bytes."""
    return {
        name: {
            "type": archive.dtypes.code_of(array, name),
            "shape": list(array.shape),
            "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        }
        for name, array in arrays.items()
    }


def main() -> None:
    listing = {}
    for name, (tensors, effort) in vectors().items():
        content = archive.encode_file(tensors, effort=effort, metadata={"vector": name})
        (HERE / f"{name}.clipq").write_bytes(content)
        arrays = {n: tensors[t.name] if isinstance(t, archive.Tied) else t for n, t in tensors.items()}
        listing[name] = expected(arrays)
    (HERE / "expected.json").write_text(json.dumps(listing, indent=1) + "\n")


if __name__ == "__main__":
    main()
