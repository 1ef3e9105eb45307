"""The operator for compiled and exported code: ``torch.ops.clipq.quantize``, one node of the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipq.errors import WeightError
from clipq.operator.dispatch import Quantizer, QuantizerEntry
from clipq.operator.reference import check_weight, non_finite


@torch.library.custom_op("clipq::quantize", mutates_args=())
def quantize(weight: Tensor, pruning_rate: float, bits: int) -> Tensor:
    """Clip, partition and quantize a weight tensor (paper, section 3.1), in eager, compiled or exported code.

    The gradient passes straight through, as in the paper. It looks for the thresholds anew each time; to do so
    at every step of a training, `clipq.attach` is faster.

    Args:
        weight: float64, float32, bfloat16 or float16; any shape, strides and device. Not modified.
        pruning_rate: the fraction p of the positive, and of the negative, weights that become zero; in [0, 1).
        bits: the bit width b, 1 to 8; there are at most ``2**b - 1`` non-zero levels.

    Returns:
        ``clip_quantize(weight, pruning_rate, bits).quantized``: shape, dtype and device of the weight.

    Raises:
        WeightError: the tensor has NaN or Inf or another dtype, or pruning_rate or bits is out of range.
    """
    out = torch.empty_like(weight)
    quantizer = Quantizer([QuantizerEntry("weight", pruning_rate, bits)])
    quantizer([weight], [out])
    try:
        quantizer.check()  # there is no later call that could tell of NaN or Inf
    except WeightError:
        raise non_finite(weight, "weight") from None
    return out


@quantize.register_fake
def _empty_result(weight: Tensor, pruning_rate: float, bits: int) -> Tensor:
    check_weight(weight, "weight")
    return torch.empty_like(weight)


def _straight_through(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return gradient, None, None


quantize.register_autograd(_straight_through)
