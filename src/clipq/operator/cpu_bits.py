"""Weights as bits, for the compiled loops of the CPU.

A weight is handled by its *key*: its bits without the sign, an integer that orders as the magnitude does. Seen as
a signed integer, the bits of a positive weight are its key, and those of a negative weight with the sign bit
flipped are its key; the other sign then comes out negative. A compiled function knows the dtype by its ``tag``,
an empty array: float32, float64, uint16 (bfloat16) or int16 (float16).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.np.numpy_support import carray

NEGATIVE, POSITIVE, SIGNS = 0, 1, 2
VECTOR_BYTES = 64
LOOK_UP_LANES = 16

JOB = np.dtype(
    [
        ("weight", np.int64),  # address
        ("out", np.int64),  # address
        ("size", np.int64),
        ("pruning_rate", np.float64),
        ("bits", np.int64),
        ("infinity", np.int64),  # the key of infinity: all keys below it are finite
        ("low", np.int64, SIGNS),  # the threshold's key is looked for in [low, high)
        ("high", np.int64, SIGNS),
        ("threshold", np.int64, SIGNS),  # keys, from here on
        ("largest", np.int64, SIGNS),
        ("found", np.int64, SIGNS),
        ("intervals", np.int64, SIGNS),
        ("scale_exponent", np.int64),
        ("limb_bits", np.int64),
    ]
)
"""One tensor of a batch, from the first pass to the last; low, high and threshold live from call to call."""

compiled: Callable[..., Any] = njit(nogil=True, cache=True, error_model="numpy")
intrinsic: Callable[..., Any] = extending.intrinsic


@intrinsic
def use_wide_vectors(typing_context: Any) -> Any:
    """Let LLVM use the widest vectors there are in the calling function.

    By default it keeps to half of AVX-512's 64 bytes, for the sake of the clock; these loops gain more by them.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # LLVM's own name for it, which llvmlite's list of attributes does not have.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


def _cast(source: Any, target: Any, llvm_type: Any) -> Any:
    def cast(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], llvm_type)

        return target(source), generate

    return intrinsic(cast)


float_of_bits = _cast(types.int32, types.float32, ir.FloatType())
double_of_bits = _cast(types.int64, types.float64, ir.DoubleType())
bits_of_float = _cast(types.float32, types.int32, ir.IntType(32))
bits_of_double = _cast(types.float64, types.int64, ir.IntType(64))


@intrinsic
def append_between(
    typing_context: Any,
    source: Any,
    first: Any,
    target: Any,
    at: Any,
    p_above: Any,
    p_upto: Any,
    n_above: Any,
    n_upto: Any,
) -> Any:
    """Append to ``target``, from ``at`` on, those of one vector of ``source`` whose key is in the range of its sign.

    The vector is ``source[first : first + VECTOR_BYTES // itemsize]``; the ranges are (p_above, p_upto] and
    (n_above, n_upto]. One compressing store where the processor has it (AVX-512); LLVM makes do elsewhere.

    Returns:
        Where the next one goes.
    """
    key = source.dtype

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = VECTOR_BYTES * 8 // key.bitwidth
        element = ir.IntType(key.bitwidth)
        vector = ir.VectorType(element, lanes)
        source_array = context.make_array(signature.args[0])(context, builder, arguments[0])
        target_array = context.make_array(signature.args[2])(context, builder, arguments[2])

        def between(keys: Any, above: Any, upto: Any) -> Any:
            above, upto = _all_lanes(builder, above, lanes), _all_lanes(builder, upto, lanes)
            return builder.and_(builder.icmp_signed(">", keys, above), builder.icmp_signed("<=", keys, upto))

        where = builder.bitcast(builder.gep(source_array.data, [arguments[1]]), vector.as_pointer())
        p_keys = builder.load(where, align=key.bitwidth // 8)
        n_keys = builder.xor(p_keys, ir.Constant(vector, [-(2 ** (key.bitwidth - 1))] * lanes))
        kept = builder.or_(between(p_keys, *arguments[4:6]), between(n_keys, *arguments[6:8]))
        to = builder.gep(target_array.data, [arguments[3]])
        _call(builder, f"llvm.masked.compressstore.v{lanes}i{key.bitwidth}", ir.VoidType(), p_keys, to, kept)
        count_type = ir.IntType(lanes)
        count = _call(builder, f"llvm.ctpop.i{lanes}", count_type, builder.bitcast(kept, count_type))
        return builder.add(arguments[3], builder.zext(count, arguments[3].type))

    return types.int64(source, types.int64, target, types.int64, key, key, key, key), generate


@intrinsic
def look_up(typing_context: Any, table: Any, slots: Any, first: Any, target: Any) -> Any:
    """``target[i] = table[slots[i]]``, cut to the target's width, for the LOOK_UP_LANES values of i from ``first`` on.

    Gathering loads where the processor has them; a loop is not turned into them by itself, as the target might
    overlap the table.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table_array, slots_array, target_array = (
            context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 1, 3)
        )
        element, cut = ir.IntType(table.dtype.bitwidth), ir.IntType(target.dtype.bitwidth)
        addresses = ir.VectorType(ir.IntType(64), LOOK_UP_LANES)
        slot_vector = ir.VectorType(ir.IntType(32), LOOK_UP_LANES)
        where = builder.bitcast(builder.gep(slots_array.data, [arguments[2]]), slot_vector.as_pointer())
        offsets = builder.zext(builder.load(where, align=4), addresses)
        offsets = builder.mul(offsets, ir.Constant(addresses, [table.dtype.bitwidth // 8] * LOOK_UP_LANES))
        base = _all_lanes(builder, builder.ptrtoint(table_array.data, ir.IntType(64)), LOOK_UP_LANES)
        pointers = builder.inttoptr(builder.add(base, offsets), ir.VectorType(element.as_pointer(), LOOK_UP_LANES))
        vector = ir.VectorType(element, LOOK_UP_LANES)
        found = _call(
            builder,
            f"llvm.masked.gather.v{LOOK_UP_LANES}i{element.width}.v{LOOK_UP_LANES}p0",
            vector,
            pointers,
            ir.Constant(ir.IntType(32), element.width // 8),
            ir.Constant(ir.VectorType(ir.IntType(1), LOOK_UP_LANES), [1] * LOOK_UP_LANES),
            ir.Constant(vector, ir.Undefined),
        )
        if cut.width < element.width:
            found = builder.trunc(found, ir.VectorType(cut, LOOK_UP_LANES))
        to = builder.bitcast(builder.gep(target_array.data, [arguments[2]]), found.type.as_pointer())
        builder.store(found, to, align=cut.width // 8)
        return context.get_dummy_value()

    return types.none(table, slots, types.int64, target), generate


def _all_lanes(builder: Any, scalar: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    one = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    function_type = ir.FunctionType(result, [a.type for a in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    return builder.call(function, arguments)


def _specialize(general: Callable[..., Any]) -> Callable[[Callable[..., Any]], None]:
    """`overload` for a function with annotations: Numba wants them alike in the implementations, which have none."""

    def register(choose: Callable[..., Any]) -> None:
        choose.__annotations__ = {}
        extending.overload(general)(choose)

    return register


def weights_at(address: int, size: int, tag: Any) -> Any:
    """The bits of the weights at an address, as signed integers."""


def magnitude(key: Any, tag: Any) -> Any:
    """The magnitude with this key, in the compute type."""


def compute_type(value: Any, tag: Any) -> Any:
    """A number in the compute type."""


def rounded_bits(value: Any, tag: Any) -> Any:
    """A float64 rounded to the compute type and then to the weight's dtype, halves to even, as bits; never -0."""


@_specialize(weights_at)
def _weights_at(address: Any, size: Any, tag: Any) -> Any:
    if tag.dtype == types.float32:
        return lambda address, size, tag: carray(pointer(address), (size,), np.int32)
    if tag.dtype == types.float64:
        return lambda address, size, tag: carray(pointer(address), (size,), np.int64)
    return lambda address, size, tag: carray(pointer(address), (size,), np.int16)


@_specialize(magnitude)
def _magnitude(key: Any, tag: Any) -> Any:
    if tag.dtype == types.float32:
        return lambda key, tag: float_of_bits(np.int32(key))
    if tag.dtype == types.float64:
        return lambda key, tag: double_of_bits(np.int64(key))
    if tag.dtype == types.uint16:
        return lambda key, tag: float_of_bits(np.int32(np.int32(key) << np.int32(16)))
    # The exponent's bias is 15 in float16 and 127 in float32; multiplying also makes its subnormals right.
    rebias = np.float32(2.0**112)
    return lambda key, tag: float_of_bits(np.int32(np.int32(key) << np.int32(13))) * rebias


@_specialize(compute_type)
def _compute_type(value: Any, tag: Any) -> Any:
    if tag.dtype == types.float64:
        return lambda value, tag: np.float64(value)
    return lambda value, tag: np.float32(value)


@_specialize(rounded_bits)
def _rounded_bits(value: Any, tag: Any) -> Any:
    if tag.dtype == types.float64:
        return lambda value, tag: bits_of_double(value + 0.0)
    if tag.dtype == types.float32:
        return lambda value, tag: bits_of_float(np.float32(np.float32(value) + np.float32(0)))
    if tag.dtype == types.uint16:
        return lambda value, tag: _bfloat16_bits(np.float32(value))
    return lambda value, tag: _float16_bits(np.float32(value))


@compiled
def _bfloat16_bits(value: Any) -> Any:
    wide = np.int64(bits_of_float(value))
    bits = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
    return np.int16(bits if bits & 0x7FFF else 0)


@compiled
def _float16_bits(value: Any) -> Any:
    exponent = max(math.frexp(np.float64(value))[1] - 1, -14)
    key = ((exponent + 14) << 10) + np.int64(np.rint(math.ldexp(abs(np.float64(value)), 10 - exponent)))
    return np.int16(key | -0x8000 if value < 0 and key else key)
