"""Which tensors of two models differ, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 2**20


@dataclass(frozen=True)
class Difference:
    """How a tensor differs between two models.

    Attributes:
        what: "only in A", "only in B", "shape", "dtype" or "values". Values are compared for the last two.
        a, b: dtype and shape, or None where the tensor is not there.
        count: elements that are not the same bit for bit (for "dtype": whose values differ).
        max_abs: the largest |a − b| of elements that are finite in both; None if there is none.
        relative: ‖a − b‖₂ / ‖a‖₂ over the same elements; None if a is all zeros.
        not_finite: of those that differ, how many are infinite or no number in A or B.
    """

    name: str
    what: str
    a: str | None
    b: str | None
    count: int | None = None
    elements: int | None = None
    max_abs: float | None = None
    relative: float | None = None
    not_finite: int | None = None


def differences(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[Difference]:
    """Every tensor that is not the same, bit for bit, in both; in the order of A, then of B."""
    found = []
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in b:
            found.append(Difference(name, "only in A", _kind(a[name]), None))
        elif name not in a:
            found.append(Difference(name, "only in B", None, _kind(b[name])))
        elif a[name].shape != b[name].shape:
            found.append(Difference(name, "shape", _kind(a[name]), _kind(b[name])))
        else:
            difference = _compare(name, a[name], b[name])
            if difference is not None:
                found.append(difference)
    return found


def _compare(name: str, a: Tensor, b: Tensor) -> Difference | None:
    count = not_finite = 0
    largest, squares, norm = None, 0.0, 0.0
    flat_a, flat_b = a.detach().reshape(-1), b.detach().reshape(-1)
    for start in range(0, a.numel(), _CHUNK):
        left, right = flat_a[start : start + _CHUNK], flat_b[start : start + _CHUNK]
        x, y = _values(left), _values(right)
        unlike = (_bits(left) != _bits(right)).any(dim=1) if a.dtype == b.dtype else (x != y) & ~(x.isnan() & y.isnan())
        finite = x.isfinite() & y.isfinite()
        count += int(unlike.sum())
        not_finite += int((unlike & ~finite).sum())
        if finite.any():
            distance = (x[finite] - y[finite]).abs()
            largest = max(largest or 0.0, distance.max().item())
            squares += distance.square().sum().item()
            norm += x[finite].abs().square().sum().item()
    if a.dtype == b.dtype and not count:
        return None
    what = "values" if a.dtype == b.dtype else "dtype"
    relative = (squares / norm) ** 0.5 if norm else None
    return Difference(name, what, _kind(a), _kind(b), count, a.numel(), largest, relative, not_finite)


def _values(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _bits(tensor: Tensor) -> Tensor:
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    return plain.view(torch.uint8).reshape(len(plain), -1)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
