"""Files of tensors in other formats, read and written without running code."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from clipq.archive import Archive, write_file
from clipq.errors import ArchiveError
from clipq.files import load, to_arrays, to_tensors

TORCH = (".pt", ".pth", ".bin")
READABLE = (".safetensors", *TORCH, ".npz", ".npy", ".onnx", ".clipq")
WRITABLE = (".safetensors", ".npz")


def read_state(path: Path, *, limit: int | None = None) -> Mapping[str, Tensor]:
    """The tensors of a file, by name: of a safetensors or .clipq file, a NumPy archive, the initializers of an ONNX
    model, or a state_dict in a .pt file.

    Args:
        limit: of a .clipq file, the most bytes of decoded tensors, as for `clipq.load`.

    Raises:
        ArchiveError: another ending, a file that cannot be read, or one that holds more than tensors.
    """
    _check_ending(path, READABLE)
    state: Any
    try:
        if path.suffix == ".clipq":
            state = load(path, limit=limit)
        elif path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        elif path.suffix in TORCH:
            state = torch.load(path, map_location="cpu", weights_only=True)
        elif path.suffix == ".onnx":
            from clipq.onnx import read_initializers  # only here: the package onnx is optional

            state = to_tensors(read_initializers(path))
        else:
            state = to_tensors(_read_numpy(path))
    except ArchiveError:
        raise
    except pickle.UnpicklingError:
        raise ArchiveError(
            f"{path} holds more than tensors, and reading it would run code; save the state_dict alone, best as "
            f".safetensors"
        ) from None
    except Exception as error:  # each format's library has its own
        raise ArchiveError(f"{path} cannot be read: {error}") from None
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ArchiveError(f"{path} holds no tensors by name; save a state_dict")
    return state


def read_metadata(path: Path) -> dict[str, str]:
    """The free text that a safetensors or .clipq file carries beside its tensors; of other files none.

    Raises:
        ArchiveError: the file cannot be read.
    """
    if path.suffix == ".clipq":
        with Archive(path) as file:
            return dict(file.metadata)
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, "pt") as opened:
                return opened.metadata() or {}
        except Exception as error:
            raise ArchiveError(f"{path} cannot be read: {error}") from None
    return {}


def write_state(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a .safetensors or .npz file, whole or not at all; tied ones are written once for each name.

    Args:
        metadata: free text, for .safetensors; a NumPy archive has no place for it.

    Raises:
        ArchiveError: another ending, a dtype that the format does not have, or the file cannot be written.
    """
    _check_ending(path, WRITABLE)
    if path.suffix == ".npz":
        content = _numpy_archive(tensors)
    else:
        try:
            clones = {name: tensor.clone() for name, tensor in tensors.items()}
            content = safetensors.torch.save(clones, dict(metadata) if metadata else None)
        except Exception as error:
            raise ArchiveError(f"{path}: the tensors cannot be written as {path.suffix}: {error}") from None
    write_file(path, content)


def _read_numpy(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    found = np.load(path, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return {path.stem: _native(found)}
    with found:
        return {name: _native(found[name]) for name in found.files}


def _native(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    return np.array(array, array.dtype.newbyteorder("="), order="C", copy=None)


def _numpy_archive(tensors: Mapping[str, Tensor]) -> bytes:
    """A NumPy archive, as `numpy.savez` makes it, with any names."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, tensor in tensors.items():
            array = to_arrays({name: tensor})[name]
            assert isinstance(array, np.ndarray)
            if array.dtype.kind == "V":
                raise ArchiveError(
                    f"{name}: NumPy has no type {str(tensor.dtype).removeprefix('torch.')}; write .safetensors instead"
                )
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return content.getvalue()


def _check_ending(path: Path, accepted: tuple[str, ...]) -> None:
    if path.suffix not in accepted:
        raise ArchiveError(f"{path} has the ending {path.suffix!r}; accepted are {', '.join(accepted)}")
