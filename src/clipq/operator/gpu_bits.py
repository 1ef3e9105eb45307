"""What the Triton kernels share: the layout of their tables, and weights as bits.

A weight is handled by the bits of its magnitude in float32, an integer that orders as the magnitude does; for the
search of the thresholds these are shifted by ``KEY_SHIFT``, so that neighbouring keys are neighbouring numbers of the
weight's dtype. All sums are of integers, so the order in which programs add to them never shows.

Compile the kernels without fused multiply-adds (``enable_fp_fusion=False``): the reference rounds after each operation.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Columns of the jobs table, int64, one row a tensor.
WEIGHT: tl.constexpr = tl.constexpr(0)  # address
OUT: tl.constexpr = tl.constexpr(1)  # address
SIZE: tl.constexpr = tl.constexpr(2)
RATE: tl.constexpr = tl.constexpr(3)  # the pruning rate's float64 bits
BITS: tl.constexpr = tl.constexpr(4)
FLAG: tl.constexpr = tl.constexpr(5)  # where among the flags the tensor's is
TOTAL: tl.constexpr = tl.constexpr(6)  # weights of the tensor in all processes that it is split over
JOB_FIELDS: tl.constexpr = tl.constexpr(7)

# Columns of the sides table, int32, two rows a tensor: the negative side, then the positive one.
LOW: tl.constexpr = tl.constexpr(0)  # the threshold's key is looked for in [low, high)
HIGH: tl.constexpr = tl.constexpr(1)
SHIFT: tl.constexpr = tl.constexpr(2)  # a bin has 2**shift keys
COPIES: tl.constexpr = tl.constexpr(3)  # and 2**copies counters, so that not all programs add to the same one
FOUND: tl.constexpr = tl.constexpr(4)
THRESHOLD: tl.constexpr = tl.constexpr(5)  # key
REACH: tl.constexpr = tl.constexpr(6)  # how far around the last threshold the next one is looked for first
NONZERO: tl.constexpr = tl.constexpr(7)  # tallies of one counting pass: non-zero keys,
FROM_LOW: tl.constexpr = tl.constexpr(8)  # keys >= low,
LARGEST: tl.constexpr = tl.constexpr(9)  # the largest key
EDGE: tl.constexpr = tl.constexpr(10)  # float32 bits: larger magnitudes are kept
DENSITY: tl.constexpr = tl.constexpr(11)  # float32 bits: intervals per unit of magnitude
INTERVALS: tl.constexpr = tl.constexpr(12)
SCALE: tl.constexpr = tl.constexpr(13)  # the exponent of the fixed-point format, see `reference.fixed_point`
SIDE_FIELDS: tl.constexpr = tl.constexpr(16)

BIN_BITS: tl.constexpr = tl.constexpr(12)
BINS: tl.constexpr = tl.constexpr(1 << 12)
MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # the bits of a magnitude, and no less than any of them
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)

# How the weights of a dtype are stored.
FLOAT32: tl.constexpr = tl.constexpr(0)
BFLOAT16: tl.constexpr = tl.constexpr(1)
FLOAT16: tl.constexpr = tl.constexpr(2)


@triton.jit
def load_weights(
    address: tl.tensor,
    first: tl.tensor,
    size: tl.tensor,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The float32 bits of the weights from ``first`` on; zeros past the end."""
    offset = first + tl.arange(0, TILE)
    if DTYPE == FLOAT32:
        at = address.to(tl.pointer_type(tl.int32))
    elif DTYPE == BFLOAT16:
        at = address.to(tl.pointer_type(tl.int16))
    else:
        at = address.to(tl.pointer_type(tl.float16))
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    # Without a mask where there is no need for one, as it would keep loads and stores from being wide.
    if first + TILE <= size:  # noqa: SIM108 - both sides would be executed
        value = tl.load(at + offset)
    else:
        value = tl.load(at + offset, mask=offset < size, other=0)
    if DTYPE == FLOAT32:
        bits = value
    elif DTYPE == BFLOAT16:
        bits = value.to(tl.int32) << 16
    else:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    return bits


@triton.jit
def store_weights(
    address: tl.tensor,
    first: tl.tensor,
    size: tl.tensor,
    bits: tl.tensor,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    offset = first + tl.arange(0, TILE)
    if DTYPE == FLOAT32:
        at = address.to(tl.pointer_type(tl.int32))
        value = bits
    else:
        at = address.to(tl.pointer_type(tl.int16))
        value = bits.to(tl.int16)
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    if first + TILE <= size:
        tl.store(at + offset, value)
    else:
        tl.store(at + offset, value, mask=offset < size)


@triton.jit
def rounded_bits(value: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Non-negative float32 numbers rounded to the weight's dtype, halves to even, as bits."""
    if DTYPE == FLOAT32:
        bits = value.to(tl.int32, bitcast=True)
    elif DTYPE == BFLOAT16:
        wide = value.to(tl.int32, bitcast=True)
        bits = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
    else:
        bits = value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return bits


@triton.jit
def bit_length(number: tl.tensor) -> tl.tensor:
    """Bits of a number from 0 to 2**53, from the exponent of its float64."""
    return tl.where(number > 0, ((number.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1022).to(tl.int32), 0)
