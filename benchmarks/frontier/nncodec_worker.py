"""NNCodec on a float network; run by ``others.py`` in an environment of its own.

    python benchmarks/frontier/nncodec_worker.py FOLDER QP

Reads ``net.npz`` there, writes ``model.nnc``, and what that gives back as ``decoded.npz``.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from nncodec_worker import nnc

folder, qp = Path(sys.argv[1]), int(sys.argv[2])
with np.load(folder / "net.npz") as file:
    net = {name: np.array(file[name], np.float32) for name in file}
with contextlib.redirect_stdout(io.StringIO()):
    path = str(folder / "model.nnc")
    stream = nnc.compress(net, bitstream_path=path, qp=qp, row_skipping=True, return_bitstream=True)
    decoded = nnc.decompress(stream)
np.savez(folder / "decoded.npz", **{name: np.asarray(decoded[name], np.float32) for name in net})
