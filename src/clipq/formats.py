"""Files of tensors in other formats, read and written without running code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from clipq.archive import write_file
from clipq.errors import ArchiveError
from clipq.files import load

READABLE = (".safetensors", ".pt", ".pth", ".clipq")
WRITABLE = (".safetensors",)


def read_state(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a .safetensors, .clipq or .pt file (a state_dict), by name.

    Raises:
        ArchiveError: another ending, a file that cannot be read, or one that holds more than tensors.
    """
    _check_ending(path, READABLE)
    state: Any
    try:
        if path.suffix == ".clipq":
            state = load(path)
        elif path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ArchiveError(
            f"{path} holds more than tensors, and reading it would run code; save the state_dict alone, best as "
            f".safetensors"
        ) from None
    except Exception as error:
        raise ArchiveError(f"{path} cannot be read: {error}") from None
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ArchiveError(f"{path} holds no tensors by name; save a state_dict")
    return state


def write_state(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a .safetensors file, whole or not at all; tied ones are written once for each name.

    Raises:
        ArchiveError: another ending, a dtype that the format does not have, or the file cannot be written.
    """
    _check_ending(path, WRITABLE)
    try:
        content = safetensors.torch.save({name: tensor.clone() for name, tensor in tensors.items()})
    except Exception as error:
        raise ArchiveError(f"{path}: the tensors cannot be written as {path.suffix}: {error}") from None
    write_file(path, content)


def _check_ending(path: Path, accepted: tuple[str, ...]) -> None:
    if path.suffix not in accepted:
        raise ArchiveError(f"{path} has the ending {path.suffix!r}; accepted are {', '.join(accepted)}")
