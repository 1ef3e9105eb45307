"""The initializers of an ONNX model, as arrays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipq.errors import ArchiveError

# Types of less than a byte have one element a byte here; the values are the same.
_WIDER = {"int2": np.int8, "int4": np.int8, "uint2": np.uint8, "uint4": np.uint8}


def read_initializers(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    """The initializers of a model and of the graphs inside it, by name.

    Data that the model keeps in other files are read only from the model's own folder and those below it.

    Raises:
        ArchiveError: the package onnx is not installed, an initializer is sparse, has no name of its own, or lies
            elsewhere.
    """
    try:
        import onnx
        from onnx import external_data_helper, numpy_helper
    except ImportError:
        raise ArchiveError(
            f"{path} is an ONNX model, which the package onnx reads; pip install 'clipq[onnx]'"
        ) from None
    model = onnx.load(path, load_external_data=False)
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for graph in _graphs(model.graph):
        if graph.sparse_initializer:
            raise ArchiveError(f"{path}: {graph.sparse_initializer[0].values.name} is sparse; make it dense first")
        for tensor in graph.initializer:
            if tensor.name in arrays:
                raise ArchiveError(f"{path}: two initializers are named {tensor.name!r}; rename one of them")
            if external_data_helper.uses_external_data(tensor):
                _check_place(path, tensor)
                external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
            array = numpy_helper.to_array(tensor)
            array = array.astype(_WIDER.get(array.dtype.name, array.dtype), copy=False)
            arrays[tensor.name] = np.array(array, order="C")
    return arrays


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _graphs(inner)


def _check_place(path: Path, tensor: Any) -> None:
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    folder = path.parent.resolve()
    place = (folder / location).resolve()
    if folder not in place.parents or not place.is_file():
        raise ArchiveError(
            f"{path}: {tensor.name} is said to lie in {location!r}, which is no file in the model's folder; put the "
            f"model's data beside it"
        )
