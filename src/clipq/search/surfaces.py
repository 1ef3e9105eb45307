"""Each group's error surface: what its θ adds to the model's cost, anywhere, from a few evaluations.

What quantization adds to the cost is, near a minimum, a quadratic form in the weights' error, so that the
logarithm of the cost added is nearly linear in the logarithm of the squared error, which costs nothing to compute. A
Gaussian process learns how a layer departs from that line.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from clipq.search.groups import Theta
from clipq.search.sizes import SizeModel, sparsity

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ErrorSurface:
    """What one group adds to the cost at any θ, with all other groups in full precision."""

    size: SizeModel
    _slope: float
    _intercept: float
    _departure: GaussianProcessRegressor
    _ceiling: float

    def cost(self, theta: Theta) -> float:
        """The cost added."""
        return float(self.cost_at(np.array([sparsity(theta.pruning_rate)]), theta.bits)[0])

    def cost_at(self, sparsities: Floats, bits: int) -> Floats:
        """The same at many sparsities and one bit width."""
        log_distortion = np.log(self.size.distortion_at(sparsities, bits))
        departure = self._departure.predict(_features(sparsities, bits))
        log_cost = self._intercept + self._slope * log_distortion + departure
        cost: Floats = np.exp(np.minimum(log_cost, math.log(self._ceiling)))
        return cost


def fit_surface(size: SizeModel, thetas: Sequence[Theta], added: Sequence[float], resolution: float) -> ErrorSurface:
    """The surface through evaluations of one group.

    Args:
        added: the cost at each θ less that of the full-precision model.
        resolution: differences of the cost below it say nothing, such as one sample's worth.
    """
    x = np.array([math.log(size.distortion(t)) for t in thetas])
    y = np.log(np.maximum(np.array(added), resolution))
    told = y > math.log(resolution) + 1e-9
    slope, intercept = _line(x, y, told)
    features = np.concatenate([_features(np.array([sparsity(t.pruning_rate)]), t.bits) for t in thetas])
    kernel = ConstantKernel(0.25, (1e-2, 4.0)) * RBF([1.0, 1.0], (0.3, 10.0)) + WhiteKernel(0.05, (1e-4, 1.0))
    process = GaussianProcessRegressor(kernel, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a kernel parameter at its bound is fine
        process.fit(features, y - (intercept + slope * x))
    return ErrorSurface(size, slope, intercept, process, max(*added, resolution) * 4)


def _features(sparsities: Floats, bits: int) -> Floats:
    return np.stack([sparsities, np.full(len(sparsities), math.log2(bits))], axis=1)


def _line(x: Floats, y: Floats, told: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """A line of rising, near quadratic error; points below the resolution pull only gently."""
    weight = np.where(told, 1.0, 0.1)
    mean_x, mean_y = np.average(x, weights=weight), np.average(y, weights=weight)
    spread = np.average((x - mean_x) ** 2, weights=weight)
    # As if seen once before: slope 1, so that few points do not make a steep line.
    found = (np.average((x - mean_x) * (y - mean_y), weights=weight) + 0.1) / (spread + 0.1)
    slope = float(np.clip(found, 0.3, 3.0))
    return slope, float(mean_y - slope * mean_x)
