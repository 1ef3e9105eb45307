"""NNCodec on the tensors of one NumPy archive; run by ``archive.py`` in an environment of its own.

    python benchmarks/nncodec_worker.py NET.npz REPEATS

Prints, as JSON, bytes, seconds and the largest errors, with NNCodec's own step for tensors that are not weights and
with one of 2**-24. Weights are coded as indices into codebooks (``codebook_mode`` 2), on its default step for the rest.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
import types
from typing import Any

import numpy as np

FRAMEWORKS = ("tensorflow_model", "pytorch_model", "use_case_init")  # import torch; plain arrays do not need them
QP = -75
NONWEIGHT_QPS = {"as it comes": -75, "non-weights at 2^-24": -96}


class _Stub(types.ModuleType):
    """A module of functions that all say no."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: False


parent = sys.modules["nncodec.framework"] = _Stub("nncodec.framework")
for name in FRAMEWORKS:
    module = sys.modules[f"nncodec.framework.{name}"] = _Stub(f"nncodec.framework.{name}")
    setattr(parent, name, module)

from nncodec import nnc  # noqa: E402


def measure(tensors: dict[str, np.ndarray], nonweight_qp: int, repeats: int) -> dict[str, Any]:
    encoding, decoding = [], []
    with contextlib.redirect_stdout(io.StringIO()), tempfile.NamedTemporaryFile(suffix=".nnc") as file:
        start = time.process_time()
        stream = nnc.compress(
            {name: array.copy() for name, array in tensors.items()},
            bitstream_path=file.name,
            qp=QP,
            nonweight_qp=nonweight_qp,
            use_dq=False,
            codebook_mode=2,
            row_skipping=True,
            return_bitstream=True,
        )
        encoding.append(time.process_time() - start)
        for _ in range(repeats):
            start = time.process_time()
            decoded = nnc.decompress(stream)
            decoding.append(time.process_time() - start)
    errors = {name: float(np.abs(decoded[name] - array).max()) for name, array in tensors.items()}
    return {
        "bytes": len(stream),
        "encode": min(encoding),
        "decode": min(decoding),
        "weight error": max(errors[name] for name, array in tensors.items() if array.ndim > 1),
        "other error": max((errors[name] for name, array in tensors.items() if array.ndim < 2), default=0.0),
    }


if __name__ == "__main__":
    with np.load(sys.argv[1]) as file:
        net = {name: np.array(file[name], np.float32) for name in file}
    print(json.dumps({what: measure(net, qp, int(sys.argv[2])) for what, qp in NONWEIGHT_QPS.items()}))
