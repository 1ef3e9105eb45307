"""Clip, partition and quantize one tensor, in plain torch, step by step as in the paper.

Source: Tung & Mori, *CLIP-Q*, CVPR 2018, section 3.1. This is the definition of the operator: every
kernel gives the same bits.

All arithmetic is on magnitudes, one sign at a time, in the *compute type*: float64 for float64 weights,
float32 for all others. Sums are taken in fixed point (see `fixed_point`), so they do not depend on
the order of summation, on the number of threads or processes, or on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clipq.errors import WeightError

MIN_BITS, MAX_BITS = 1, 8
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Thresholds(NamedTuple):
    """The clipping thresholds: weights in ``[negative, positive]`` become zero; ``negative <= 0 <= positive``."""

    negative: float
    positive: float


@dataclass(frozen=True)
class Quantized:
    """One tensor after clip, partition and quantize.

    Attributes:
        quantized: what the network runs on; dtype, shape and device of the weight.
        codes: uint8, shape of the weight; ``codebook[codes]`` is ``quantized``.
        codebook: 1-D, dtype of the weight, ascending, always with 0 and at most ``2**bits`` entries long.
        thresholds: c- and c+ of the paper.
    """

    quantized: Tensor
    codes: Tensor
    codebook: Tensor
    thresholds: Thresholds


def clip_quantize(weight: Tensor, pruning_rate: float, bits: int, *, name: str = "weight") -> Quantized:
    """Clip, partition and quantize one weight tensor (paper, section 3.1).

    Args:
        weight: float64, float32, bfloat16 or float16; any shape, strides and device. Not modified.
        pruning_rate: the fraction p of the positive, and of the negative, weights that become zero; in [0, 1).
        bits: the bit width b, 1 to 8; there are at most ``2**b - 1`` non-zero levels.
        name: what to call the tensor in an error.

    Where the paper is silent:

    - c+ is the k-th smallest positive weight with k = p times their number, rounded to nearest, halves up;
      weights equal to a threshold are clipped with it. With k = 0 the threshold is 0. Zeros stay zero.
    - An interval holds its inner edge (the one nearer to zero) but for the innermost one, whose inner edge is
      the threshold itself; the outermost one holds its outer edge.
    - The split of the intervals between the signs is `split_intervals`.
    - An empty interval, and one whose level rounds to zero, has no entry of its own in the codebook.

    Raises:
        WeightError: the tensor has NaN or Inf or another dtype, or pruning_rate or bits is out of range.
    """
    check_hyperparameters(pruning_rate, bits, name)
    check_weight(weight, name)
    w = weight.detach()
    w = w.to(torch.float64 if w.dtype == torch.float64 else torch.float32)
    if not bool(torch.isfinite(w).all()):
        raise non_finite(w, name)

    negative = _clip(-w[w < 0], pruning_rate)
    positive = _clip(w[w > 0], pruning_rate)
    scale_exponent, limb_bits = fixed_point(w.abs().max().item() if w.numel() else 0.0, w.numel())
    n_negative, n_positive = split_intervals(
        bits,
        negative.range,
        positive.range,
        _gain(-w[w < -negative.threshold], scale_exponent, limb_bits),
        _gain(w[w > positive.threshold], scale_exponent, limb_bits),
    )

    # Slots, ascending in value: n_negative negative intervals, zero, n_positive positive intervals.
    zero = n_negative
    slots = torch.full(w.shape, zero, dtype=torch.int64, device=w.device)
    for side, sign, n in ((negative, -1, n_negative), (positive, 1, n_positive)):
        if n:
            magnitude = sign * w
            kept = magnitude > side.threshold
            slots[kept] = zero + sign * (1 + _partition(magnitude[kept], side, n))

    levels = _levels(w, slots, n_negative + 1 + n_positive, scale_exponent, limb_bits)
    levels = levels.to(w.dtype).to(weight.dtype)
    levels[zero] = 0
    in_use = levels != 0
    in_use[zero] = True
    code_of_slot = torch.where(in_use, in_use.cumsum(0) - 1, in_use[:zero].sum())
    codebook = levels[in_use]
    codes = code_of_slot[slots].to(torch.uint8)
    return Quantized(
        quantized=codebook[codes.long()],
        codes=codes,
        codebook=codebook,
        thresholds=Thresholds(0.0 - negative.threshold, positive.threshold),
    )


def split_intervals(
    bits: int, negative_range: float, positive_range: float, negative_gain: float, positive_gain: float
) -> tuple[int, int]:
    """The number of intervals on the negative and on the positive side; ``2**bits - 1`` together.

    The paper does not give the rule. Ours fits its worked example: a side without unclipped weights gets
    none, otherwise the sides get equally many and the side with the longer range one more (the positive one
    if they are equal). With one bit there is one interval; it goes to the side that loses least, that is,
    the one whose level takes more off the squared error.

    Args:
        negative_range, positive_range: from the threshold to the extreme weight, in magnitude; 0 if no weight
            is left unclipped.
        negative_gain, positive_gain: (sum of the unclipped weights)² / their number, of each side.
    """
    n = 2**bits - 1
    if positive_range == 0:
        return (n, 0) if negative_range > 0 else (0, 0)
    if negative_range == 0:
        return 0, n
    negative_is_favoured = negative_gain > positive_gain if bits == 1 else negative_range > positive_range
    return (n - n // 2, n // 2) if negative_is_favoured else (n // 2, n - n // 2)


def fixed_point(max_magnitude: float, n: int) -> tuple[int, int]:
    """The fixed-point format in which ``n`` weights are summed exactly, whatever the order.

    A weight w is added as the 64-bit integer ``trunc(w * 2**scale_exponent)``, which has at most
    ``limb_bits`` bits, so that n of them cannot overflow. For float32 and narrower types that is exact for
    weights down to 2**(24 - limb_bits) of the largest (2**-12 at 67 million weights). For float64 a second
    integer takes the next ``limb_bits`` bits.

    Returns:
        (scale_exponent, limb_bits)
    """
    limb_bits = 62 - n.bit_length()
    return min(limb_bits - math.frexp(max_magnitude)[1], 1023), limb_bits


def check_hyperparameters(pruning_rate: float, bits: int, name: str) -> None:
    """Raise `WeightError` unless 0 <= pruning_rate < 1 and bits is a whole number from 1 to 8."""
    if isinstance(pruning_rate, bool) or not isinstance(pruning_rate, int | float) or not 0 <= pruning_rate < 1:
        raise WeightError(
            f"{name}: pruning rate {pruning_rate!r} is out of range; give a number from 0 (prune nothing) "
            f"to just under 1"
        )
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise WeightError(
            f"{name}: bit width {bits!r} is out of range; give a whole number from {MIN_BITS} to {MAX_BITS}"
        )


def check_weight(weight: Tensor, name: str) -> None:
    """Raise `WeightError` unless the tensor is a plain, dense tensor of a supported dtype."""
    if weight.dtype not in WEIGHT_DTYPES or weight.layout != torch.strided:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in WEIGHT_DTYPES)
        raise WeightError(
            f"{name}: a {str(weight.layout).removeprefix('torch.')} tensor of "
            f"{str(weight.dtype).removeprefix('torch.')} cannot be quantized; accepted are dense tensors of "
            f"{accepted}. Leave it out of the plan, or convert it"
        )


def non_finite(weight: Tensor, name: str) -> WeightError:
    """The error for a tensor with NaN or Inf, naming the first such element; none here: it is in another process."""
    bad = (~torch.isfinite(weight)).nonzero()
    what = "weights in another process are NaN or Inf"
    if len(bad):
        where = tuple(bad[0].tolist())
        what = f"{len(bad)} of {weight.numel()} weights are NaN or Inf, the first at {where} ({weight[where].item()})"
    return WeightError(
        f"{name}: {what}; weights must be finite. Lower the learning rate, or go back to the last good checkpoint"
    )


class _Side(NamedTuple):
    threshold: float  # in magnitude
    range: float  # from the threshold to the largest magnitude; 0 if nothing is left


def _clip(magnitudes: Tensor, pruning_rate: float) -> _Side:
    """Clipping (paper, step 1) of the weights of one sign, given by magnitude."""
    n = magnitudes.numel()
    k = math.floor(pruning_rate * n + 0.5)
    if n == 0:
        return _Side(0.0, 0.0)
    threshold = torch.kthvalue(magnitudes, k).values if k else magnitudes.new_zeros(())
    return _Side(threshold.item(), (magnitudes.max() - threshold).item())


def _partition(magnitudes: Tensor, side: _Side, intervals: int) -> Tensor:
    """Partitioning (paper, step 2): the interval, 0 innermost, of each unclipped magnitude of one side."""
    threshold, length = magnitudes.new_tensor(side.threshold), magnitudes.new_tensor(side.range)
    position = (magnitudes - threshold) * (intervals / length)
    return position.clamp(max=intervals - 1).to(torch.int64)


def _levels(w: Tensor, slots: Tensor, n_slots: int, scale_exponent: int, limb_bits: int) -> Tensor:
    """Quantizing (paper, step 3): the mean of the weights in each slot, float64; 0 where there are none."""
    flat = slots.reshape(-1)
    count = torch.zeros(n_slots, dtype=torch.int64, device=w.device).scatter_add_(0, flat, torch.ones_like(flat))
    mean = torch.zeros(n_slots, dtype=torch.float64, device=w.device)
    for limb, exponent in _limbs(w.reshape(-1), scale_exponent, limb_bits):
        total = torch.zeros_like(count).scatter_add_(0, flat, limb)
        mean += (total.double() / count.clamp(min=1)) * 2.0**exponent
    return mean


def _gain(magnitudes: Tensor, scale_exponent: int, limb_bits: int) -> float:
    """(sum of magnitudes)² / their number, in units of the fixed-point format; 0 for none."""
    if magnitudes.numel() == 0:
        return 0.0
    limb, _ = _limbs(magnitudes, scale_exponent, limb_bits)[0]
    total = float(limb.sum().item())
    return total * total / magnitudes.numel()


def _limbs(w: Tensor, scale_exponent: int, limb_bits: int) -> list[tuple[Tensor, int]]:
    """The fixed-point digits of each weight: (int64 tensor, exponent of its unit), most significant first."""
    scaled = w.double() * 2.0**scale_exponent
    high = scaled.to(torch.int64)
    if w.dtype != torch.float64:
        return [(high, -scale_exponent)]
    low = ((scaled - high) * 2.0**limb_bits).to(torch.int64)
    return [(high, -scale_exponent), (low, -scale_exponent - limb_bits)]
