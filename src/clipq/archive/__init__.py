"""The ``.clipq`` file: NumPy arrays in, NumPy arrays out, every bit the same.

`container` lays out the file; `codes` and `raw` say how a tensor becomes payload, with `model` and `rangecoder` under
`codes`; `writer` and `reader` are what others call. Source: docs/format.md.
"""

from clipq.archive.container import Planned, TensorHeader
from clipq.archive.reader import Archive
from clipq.archive.sources import Source
from clipq.archive.writer import Effort, EncodedTensors, Tied, encode_file, encoded_size, scan_of, write_file

__all__ = [
    "Archive",
    "Effort",
    "EncodedTensors",
    "Planned",
    "Source",
    "TensorHeader",
    "Tied",
    "encode_file",
    "encoded_size",
    "scan_of",
    "write_file",
]
