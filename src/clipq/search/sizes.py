"""The size model: how many bytes a tensor takes in the file at any θ, without encoding it each time.

Before the search a tensor is quantized and encoded at a grid of pruning rates and bit widths; between its points
the logarithm of the size is interpolated. Along with it comes what quantization does to the weights, which the
error surfaces are built on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from clipq import files
from clipq.archive import encoded_size, scan_of
from clipq.search.groups import Group, Theta, quantize_group

SAMPLE_ROWS_ELEMENTS = 2**20
"""Of a larger tensor, rows of about so many elements stand for all of it."""
MANY_VALUES = 2**12
"""A tensor of fewer distinct values than that has ties, so that more weights are clipped than asked for."""
_HEADER_BYTES = 12  # of one tensor: checksum, shape, p and b
_SPARSITIES = (0.0, 0.12, 0.3, 0.5, 0.8, 1.1, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.6, 5.3, 6.2)

Floats = npt.NDArray[np.float64]


def sparsity(pruning_rate: float) -> float:
    """-log(1 - p): equal steps divide the survivors by equal factors."""
    return -math.log1p(-pruning_rate)


def pruning_rate_of(sparsity: float) -> float:
    """The inverse of `sparsity`."""
    return -math.expm1(-sparsity)


@dataclass(frozen=True)
class Clipped:
    """How many weights are clipped at a pruning rate: more than asked for where weights are equal, or zero already.

    Attributes:
        size: weights in all.
        zeros: that are zero.
        signs: for each sign of each tensor with ties, how many weights have each magnitude or a smaller one.
        untied: weights other than zero in tensors without ties.
    """

    size: int
    zeros: int
    signs: tuple[npt.NDArray[np.int64], ...]
    untied: int

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Clipped:
        signs, size, zeros, untied = [], 0, 0, 0
        for tensor in tensors:
            size += tensor.numel()
            zeros += int((tensor == 0).sum())
            values = tensor.detach().double().cpu().numpy().ravel()
            if len(np.unique(values[: 4 * MANY_VALUES])) < min(MANY_VALUES, 0.9 * values.size):
                for magnitudes in (values[values > 0], -values[values < 0]):
                    signs.append(np.unique(magnitudes, return_counts=True)[1].cumsum())
            else:
                untied += int((tensor != 0).sum())
        return cls(size, zeros, tuple(signs), untied)

    def sparsities(self, asked: Floats) -> Floats:
        """The sparsity that comes out at each sparsity that is asked for; of weights other than zero, at least one."""
        rates = -np.expm1(-asked)
        gone = self.zeros + rates * self.untied
        for upto in self.signs:
            if len(upto):
                rank = np.floor(rates * upto[-1] + 0.5)
                gone = gone + np.where(rank > 0, upto[np.searchsorted(upto, rank).clip(max=len(upto) - 1)], 0)
        found: Floats = -np.log(np.maximum(1 - gone / self.size, 0.5 / self.size))
        return found


@dataclass(frozen=True)
class SizeModel:
    """One group's bytes and squared quantization error, anywhere in the ranges of p and b.

    Attributes:
        group: which.
        bits: the bit widths that can be asked for.
        highest: the highest sparsity that can be asked for.
    """

    group: Group
    bits: tuple[int, ...]
    highest: float
    _clipped: Clipped
    _log_bytes: Mapping[int, PchipInterpolator]
    _log_distortion: Mapping[int, PchipInterpolator]

    def bytes(self, theta: Theta) -> float:
        """What the group takes in the file."""
        return float(self.bytes_at(np.array([sparsity(theta.pruning_rate)]), theta.bits)[0])

    def bytes_at(self, sparsities: Floats, bits: int) -> Floats:
        """The same for many sparsities at one bit width."""
        clipped = self._clipped.sparsities(np.clip(sparsities, 0, self.highest))
        found: Floats = np.exp(self._log_bytes[bits](clipped))
        return found

    def distortion(self, theta: Theta) -> float:
        """‖w - q‖² / ‖w‖², with q the quantized weights."""
        return float(self.distortion_at(np.array([sparsity(theta.pruning_rate)]), theta.bits)[0])

    def distortion_at(self, sparsities: Floats, bits: int) -> Floats:
        """The same for many sparsities at one bit width."""
        clipped = self._clipped.sparsities(np.clip(sparsities, 0, self.highest))
        found: Floats = np.exp(self._log_distortion[bits](clipped))
        return found


def measure_sizes(
    groups: Sequence[Group], weights: Mapping[str, Tensor], bits: Sequence[int], highest_pruning_rate: float
) -> list[SizeModel]:
    """The size models of all groups, by encoding each at a grid of θ.

    Args:
        weights: full-precision weights by parameter name.
        bits: the bit widths to allow, ascending.
        highest_pruning_rate: the highest to allow; for small tensors it is lowered so that a few weights survive.
    """
    grids = [_Grid.of(group, weights, tuple(bits), highest_pruning_rate) for group in groups]
    tasks = [(grid, point) for grid in grids for point in grid.points]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = iter(list(pool.map(lambda task: task[0].measure(task[1]), tasks)))
    return [grid.model([next(found) for _ in grid.points]) for grid in grids]


@dataclass(frozen=True)
class _Grid:
    """Where a group is measured.

    Attributes:
        samples: its weights, or of large ones some rows.
        points: sparsities.
    """

    group: Group
    samples: dict[str, Tensor]
    bits: tuple[int, ...]
    points: tuple[float, ...]

    @classmethod
    def of(
        cls, group: Group, weights: Mapping[str, Tensor], bits: tuple[int, ...], highest_pruning_rate: float
    ) -> _Grid:
        samples = {name: _sample(weights[name].detach()) for name in group.tensors}
        n = sum(sample.numel() for sample in samples.values())
        highest = min(sparsity(highest_pruning_rate), math.log(max(n / 8, 1.0)))
        return cls(group, samples, bits, (*(s for s in _SPARSITIES if s < highest - 0.15), highest))

    def measure(self, point: float) -> list[tuple[float, float]]:
        """Bytes and squared error, relative to the weights', at one sparsity and each bit width."""
        scale = self.group.size / sum(sample.numel() for sample in self.samples.values())
        norm = sum(float(sample.double().square().sum()) for sample in self.samples.values()) or 1.0
        out = {name: torch.empty_like(sample) for name, sample in self.samples.items()}
        scans: dict[str, Any] = {}
        measured = []
        for b in self.bits:
            quantize_group(self.group, Theta(pruning_rate_of(point), b), self.samples, out)
            taken = float(_HEADER_BYTES * len(out))
            for name, array in files.to_arrays(out).items():
                if name not in scans:
                    scans[name] = scan_of(array)  # type: ignore[arg-type]
                taken += scale * encoded_size(array, scan=scans[name])  # type: ignore[arg-type]
            error = sum(float((self.samples[t] - out[t]).double().square().sum()) for t in out)
            measured.append((taken, max(error / norm, 1e-12)))
        return measured

    def model(self, measured: Sequence[Sequence[tuple[float, float]]]) -> SizeModel:
        """The size model, from what `measure` gave at each point."""
        clipped = Clipped.of(self.samples.values())
        reached = clipped.sparsities(np.array(self.points))
        logs = np.log(np.array(measured))  # (points, bits, 2)
        log_bytes, log_distortion = (
            {b: _curve(reached, logs[:, k, which]) for k, b in enumerate(self.bits)} for which in (0, 1)
        )
        return SizeModel(self.group, self.bits, self.points[-1], clipped, log_bytes, log_distortion)


def _curve(points: Floats, values: Floats) -> PchipInterpolator:
    """Through the points, of which neighbours may coincide."""
    apart = np.flatnonzero(np.diff(points, prepend=-1.0) > 1e-6)
    x, y = points[apart], values[apart]
    if len(x) == 1:
        x, y = np.array([x[0], x[0] + 1.0]), np.array([y[0], y[0]])
    return PchipInterpolator(x, y)


def _sample(weight: Tensor) -> Tensor:
    """The weight, or some of its rows, evenly spread, if it is large; a copy in plain layout."""
    if weight.numel() <= SAMPLE_ROWS_ELEMENTS or weight.dim() < 2:
        return weight.contiguous()
    row = weight[0].numel()
    rows = min(max(SAMPLE_ROWS_ELEMENTS // row, 1), len(weight))
    chosen = torch.linspace(0, len(weight) - 1, rows).round().long()
    return weight[chosen.to(weight.device)].contiguous()
