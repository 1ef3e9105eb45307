"""Models to ``.clipq`` files and back: the torch side of the archive."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clipq import archive, sharded
from clipq.archive import dtypes
from clipq.errors import ArchiveError, MismatchError

_TORCH = {name: getattr(torch, name) for name in dtypes.BY_NAME if hasattr(torch, name)}
_NAME = {dtype: name for name, dtype in _TORCH.items()}


class Planned(Protocol):
    """What is kept of a planned tensor."""

    @property
    def pruning_rate(self) -> float: ...
    @property
    def bits(self) -> int: ...


class Plan(Protocol):
    """Anything that says which tensors were trained with which p and b."""

    @property
    def tensors(self) -> Mapping[str, Planned]: ...


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a file.

    Attributes:
        kind: "codes", "raw", "group" (raw, in one block with other small tensors) or "tied".
        bytes: of payload; a member of a group has its share by size, a tied tensor none.
        density: the fraction of elements that are not zero; 1 for an empty tensor.
        levels: distinct values, for "codes"; None for others.
        pruning_rate, bits: as planned, or None.
        tied_to: the tensor that it is the same as, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    bytes: int
    elements: int
    density: float
    levels: int | None
    pruning_rate: float | None
    bits: int | None
    tied_to: str | None

    @property
    def bits_per_element(self) -> float:
        return 8 * self.bytes / max(self.elements, 1)


@dataclass(frozen=True)
class FileReport:
    """A whole file.

    Attributes:
        bytes: of the file.
        decoded_bytes: of its tensors, tied ones once.
        float32_bytes: of its elements as float32, tied ones once.
        tensors: in their order.
    """

    bytes: int
    decoded_bytes: int
    float32_bytes: int
    tensors: tuple[TensorReport, ...]

    @property
    def overhead_bytes(self) -> int:
        """Bytes that are no tensor's payload: names, shapes, checksums."""
        return self.bytes - sum(t.bytes for t in self.tensors)


def save(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    effort: archive.Effort = "default",
    bfloat16_rest: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> FileReport:
    """Write a model, or its state_dict, to a ``.clipq`` file; every bit of every tensor comes back.

    Tensors of at most 256 distinct values become a codebook and entropy-coded codes, whoever quantized them;
    the others are stored as they are. Tied tensors are stored once and come back tied. The file is written
    whole or not at all.

    Of a model that is split over processes (FSDP2, DTensors) all of them call this; the first one writes the file.

    Args:
        model: a module, or a mapping from names to dense tensors of any dtype, shape, strides and device.
        path: usually with the ending ``.clipq``.
        plan: where the tensors' p and b are taken from, to be shown by ``clipq inspect``.
        effort: "default", or "max" for the smallest file, written and read more slowly.
        bfloat16_rest: write biases and norms as `round_rest` rounds them; the model stays as it is. Evaluate what
            you load.
        metadata: free text to keep with the tensors.

    Raises:
        ArchiveError: a value that is no dense tensor, or the file cannot be written.

    Example:
        >>> clipq.save(model, "model.clipq").bytes
    """
    state = sharded.named_tensors(model)
    if sharded.is_split(state):
        return sharded.on_first_rank(
            state,
            lambda whole: save(whole, path, plan=plan, effort=effort, bfloat16_rest=bfloat16_rest, metadata=metadata),
        )
    tensors = to_arrays(round_rest(state, plan) if bfloat16_rest else state)
    planned = {n: archive.Planned(t.pruning_rate, t.bits) for n, t in (plan.tensors if plan else {}).items()}
    content = archive.encode_file(tensors, planned=planned, metadata=metadata, effort=effort)
    archive.write_file(path, content)
    with archive.Archive(content) as file:
        return report(file, {name: array for name, array in tensors.items() if not isinstance(array, archive.Tied)})


def round_rest(state: Mapping[str, Tensor], plan: Plan | None = None) -> dict[str, Tensor]:
    """Tensors of which biases and norms hold only values that bfloat16 has; their dtype stays.

    These are the float32 and float64 tensors of fewer than two dimensions that the plan does not name. In a file
    they take half the bytes; whether that costs accuracy is to be measured.

    Raises:
        ArchiveError: a value in one of them is too large for bfloat16.
    """
    rounded: dict[str, Tensor] = {}
    tied: dict[tuple[object, ...], Tensor] = {}
    planned = plan.tensors if plan else {}
    for name, tensor in state.items():
        rest = isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.float64) and tensor.dim() < 2
        if not rest or name in planned:
            rounded[name] = tensor
            continue
        where = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if where not in tied or not tensor.numel():
            tied[where] = tensor.detach().to(torch.bfloat16).to(tensor.dtype)
            if not torch.equal(tied[where].isfinite(), tensor.isfinite()):
                raise ArchiveError(f"{name}: a value is too large for bfloat16; write the file without bfloat16_rest")
        rounded[name] = tied[where]
    return rounded


@overload
def load(source: archive.Source, into: None = None, *, limit: int | None = None) -> dict[str, Tensor]: ...
@overload
def load(source: archive.Source, into: nn.Module, *, limit: int | None = None) -> nn.Module: ...
def load(
    source: archive.Source, into: nn.Module | None = None, *, limit: int | None = None
) -> dict[str, Tensor] | nn.Module:
    """Read a ``.clipq`` file. No code in it is ever run.

    Args:
        source: a path, URL, bytes, memory map or open file, as `clipq.archive.Archive` takes.
        into: a module whose tensors have the file's names, shapes and dtypes; it is filled in place, on
            whatever devices its tensors are. If it is split over processes all of them call this, and each reads the
            file.
        limit: the most bytes of decoded tensors; None for 1 GiB or 4096 times the file's size.

    Returns:
        The state_dict, in main memory; or, with ``into``, that module.

    Raises:
        DamagedFileError: the file is damaged or no ``.clipq`` file.
        TooLargeError: its tensors take more than ``limit``.
        MismatchError: they do not fit the module, which is left as it was.
    """
    with archive.Archive(source, limit=limit) as file:
        if into is not None:
            target = into.state_dict(keep_vars=True)
            _check_fit(file, target)
        tensors = to_tensors(file.read())
    if into is None:
        return tensors
    with torch.no_grad():
        for name, tensor in tensors.items():
            target[name].copy_(sharded.like(target[name], tensor))
    return into


def to_arrays(model: nn.Module | Mapping[str, Tensor]) -> dict[str, npt.NDArray[np.generic] | archive.Tied]:
    """A model's tensors as the archive takes them: NumPy arrays, or the name of the one that they are tied to.

    Raises:
        ArchiveError: one of them is no dense tensor of a dtype that a file can hold.
    """
    arrays: dict[str, npt.NDArray[np.generic] | archive.Tied] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in (model.state_dict() if isinstance(model, nn.Module) else model).items():
        _check_storable(name, tensor)
        where = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj())
        if tensor.numel() and where in first:
            arrays[name] = archive.Tied(first[where])
        else:
            first[where] = name
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            dtype = dtypes.BY_NAME[_NAME[tensor.dtype]][1]
            arrays[name] = plain.view(torch.uint8).numpy().view(dtype).reshape(tuple(tensor.shape))
    return arrays


def to_tensors(arrays: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, Tensor]:
    """Arrays from an archive as tensors that share their memory; one array under two names is one tensor."""
    tensors: dict[int, Tensor] = {}
    for name, array in arrays.items():
        if id(array) not in tensors:
            known = dtypes.BY_CODE[dtypes.code_of(array, name)][0]
            if known not in _TORCH:
                raise ArchiveError(f"{name}: this torch, {torch.__version__}, has no dtype {known}; use a later one")
            flat = torch.from_numpy(array.reshape(-1).view(np.uint8))
            tensors[id(array)] = flat.view(_TORCH[known]).reshape(array.shape)
    return {name: tensors[id(array)] for name, array in arrays.items()}


def report(file: archive.Archive, arrays: Mapping[str, npt.NDArray[np.generic]]) -> FileReport:
    """What is in an open file, given its decoded arrays (those of tied tensors may be left out)."""
    entries = []
    for name, header in file.tensors.items():
        array = arrays[header.tied_to or name]
        bits = array.reshape(-1).view(np.uint8).reshape(array.size, array.itemsize).any(axis=1)
        entries.append(
            TensorReport(
                name=name,
                shape=header.shape,
                dtype=header.dtype,
                kind=header.kind,
                bytes=file.stored_bytes(name),
                elements=header.elements,
                density=np.count_nonzero(bits) / bits.size if bits.size else 1.0,
                levels=file.levels(name),
                pruning_rate=header.planned.pruning_rate if header.planned else None,
                bits=header.planned.bits if header.planned else None,
                tied_to=header.tied_to,
            )
        )
    own = [header for header in file.tensors.values() if header.tied_to is None]
    return FileReport(
        bytes=file.nbytes,
        decoded_bytes=sum(header.nbytes for header in own),
        float32_bytes=4 * sum(header.elements for header in own),
        tensors=tuple(entries),
    )


def _check_storable(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ArchiveError(
            f"{name}: a {type(tensor).__name__} is no tensor; a .clipq file holds tensors only. Take it out of the "
            f"state_dict and keep it elsewhere"
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise ArchiveError(
            f"{name}: only dense tensors that have data can be stored, not {tensor.layout}, quantized or meta ones; "
            f"convert it first, for example with to_dense() or dequantize()"
        )
    if tensor.dtype not in _NAME:
        raise ArchiveError(f"{name}: {tensor.dtype} cannot be stored; accepted are {', '.join(map(str, _NAME))}")


def _check_fit(file: archive.Archive, target: Mapping[str, object]) -> None:
    """Raise `MismatchError` with every difference between a file and the tensors to be filled from it."""
    differences = [f"{name} is in the file and not in the model" for name in file.tensors if name not in target]
    for name, tensor in target.items():
        if name not in file.tensors:
            differences.append(f"{name} is in the model and not in the file")
            continue
        header = file.tensors[name]
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            differences.append(f"{name} is a {type(tensor).__name__} without data in the model")
        elif tuple(tensor.shape) != header.shape or _NAME.get(tensor.dtype) != header.dtype:
            differences.append(
                f"{name} is {header.dtype} {header.shape} in the file and "
                f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} in the model"
            )
        elif any(stride == 0 and n > 1 for stride, n in zip(tensor.stride(), tensor.shape, strict=True)):
            differences.append(f"{name} is an expanded view in the model, which cannot be filled")
    if differences:
        shown = differences[:20] + ([f"and {len(differences) - 20} more"] if len(differences) > 20 else [])
        raise MismatchError(
            "the file does not fit the model, which was left as it is:\n  " + "\n  ".join(shown) + "\n"
            "Build the model that was saved, or load without into= and pick the tensors yourself"
        )
