"""Weights as bits, for the compiled loops of the CPU.

A weight is handled by its *key*: its bits without the sign, an integer that orders as the magnitude does. Seen as
a signed integer, the bits of a positive weight are its key, and those of a negative weight with the sign bit
flipped are its key; the other sign then comes out negative. A compiled function knows the dtype by its ``tag``,
an empty array: float32, float64, uint16 (bfloat16) or int16 (float16).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, extending, types
from numba.core.codegen import get_host_cpu_features
from numba.np.numpy_support import carray

from clipq import jit

NEGATIVE, POSITIVE, SIGNS = 0, 1, 2
VECTOR_BYTES = 64
LOOK_UP_LANES = 16
SMALL_BITS = 4
"""The bit width up to which `look_up_small` holds a table of levels in registers."""

JOB = np.dtype(
    [
        ("weight", np.int64),  # address
        ("out", np.int64),  # address
        ("size", np.int64),
        ("total", np.int64),  # weights of the tensor in all processes that it is split over
        ("pruning_rate", np.float64),
        ("bits", np.int64),
        ("infinity", np.int64),  # the key of infinity: all keys below it are finite
        ("low", np.int64, SIGNS),  # the threshold's key is looked for in [low, high)
        ("high", np.int64, SIGNS),
        ("threshold", np.int64, SIGNS),  # keys, from here on
        ("largest", np.int64, SIGNS),
        ("found", np.int64, SIGNS),
        ("reach", np.int64, SIGNS),  # of a split tensor: how far around the last threshold the next is looked for
        ("intervals", np.int64, SIGNS),
        ("scale_exponent", np.int64),
        ("limb_bits", np.int64),
    ]
)
"""One tensor of a batch, from the first pass to the last; low, high, threshold and reach live from call to call."""

compiled: Callable[..., Any] = partial(jit.compiled, error_model="numpy")
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
    (n_above, n_upto]. ``target`` has room for a whole vector more: with AVX-512 the vector is packed in a register and
    stored whole, as storing only a part of it takes some processors long. LLVM makes do elsewhere.

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

        p_keys = _load(builder, source_array, arguments[1], vector)
        n_keys = builder.xor(p_keys, ir.Constant(vector, [-(2 ** (key.bitwidth - 1))] * lanes))
        kept = builder.or_(between(p_keys, *arguments[4:6]), between(n_keys, *arguments[6:8]))
        kind = f"v{lanes}i{key.bitwidth}"
        if _processor_has("avx512f" if key.bitwidth > 16 else "avx512vbmi2"):
            packed = _call(builder, f"llvm.x86.avx512.mask.compress.{kind}", vector, p_keys, p_keys, kept)
            _store(builder, packed, target_array, arguments[3], element)
        else:
            to = builder.gep(target_array.data, [arguments[3]])
            _call(builder, f"llvm.masked.compressstore.{kind}", ir.VoidType(), p_keys, to, kept)
        count_type = ir.IntType(lanes)
        count = _call(builder, f"llvm.ctpop.i{lanes}", count_type, builder.bitcast(kept, count_type))
        return builder.add(arguments[3], builder.zext(count, arguments[3].type))

    return types.int64(source, types.int64, target, types.int64, key, key, key, key), generate


@intrinsic
def fence(typing_context: Any) -> Any:
    """Nothing of what was written before, past the cache or not, is seen later than what comes after."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), generate


def _look_up(generator: Callable[..., Any], *, past_cache: bool) -> Any:
    def look_up(typing_context: Any, table: Any, slots: Any, first: Any, target: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return generator(context, builder, signature, arguments, past_cache)

        return types.none(table, slots, types.int64, target), generate

    return intrinsic(look_up)


def _gathered(context: Any, builder: Any, signature: Any, arguments: Any, past_cache: bool) -> Any:
    table, slots, target = _arrays(context, builder, signature, arguments)
    element, cut = (ir.IntType(signature.args[i].dtype.bitwidth) for i in (0, 3))
    slot = _load(builder, slots, arguments[2], ir.VectorType(ir.IntType(32), LOOK_UP_LANES))
    addresses = ir.VectorType(ir.IntType(64), LOOK_UP_LANES)
    offsets = builder.mul(builder.zext(slot, addresses), ir.Constant(addresses, [element.width // 8] * LOOK_UP_LANES))
    base = _all_lanes(builder, builder.ptrtoint(table.data, ir.IntType(64)), LOOK_UP_LANES)
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
    _store(builder, found, target, arguments[2], cut, past_cache)
    return context.get_dummy_value()


def _permuted(context: Any, builder: Any, signature: Any, arguments: Any, past_cache: bool) -> Any:
    table, slots, target = _arrays(context, builder, signature, arguments)
    element, cut = (ir.IntType(signature.args[i].dtype.bitwidth) for i in (0, 3))
    lanes = VECTOR_BYTES * 8 // element.width
    vector = ir.VectorType(element, lanes)
    index = ir.IntType(64)
    levels = [_load(builder, table, ir.Constant(index, i), vector) for i in range(0, 1 << SMALL_BITS, lanes)]
    for i in range(0, LOOK_UP_LANES, lanes):
        at = builder.add(arguments[2], ir.Constant(index, i))
        slot = _load(builder, slots, at, ir.VectorType(ir.IntType(32), lanes))
        if element.width == 32:
            found = _call(builder, "llvm.x86.avx512.permvar.si.512", vector, *levels, slot)
        else:
            slot = builder.zext(slot, vector)
            found = _call(builder, "llvm.x86.avx512.vpermi2var.q.512", vector, levels[0], slot, levels[1])
        _store(builder, found, target, at, cut, past_cache)
    return context.get_dummy_value()


def _arrays(context: Any, builder: Any, signature: Any, arguments: Any) -> tuple[Any, ...]:
    """The array arguments of `look_up`: table, slots, target."""
    return tuple(context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 1, 3))


def _load(builder: Any, array: Any, at: Any, vector: Any) -> Any:
    address = builder.bitcast(builder.gep(array.data, [at]), vector.as_pointer())
    return builder.load(address, align=vector.element.width // 8)


def _store(builder: Any, found: Any, array: Any, at: Any, cut: Any, past_cache: bool = False) -> None:
    """Store a vector of integers, each cut to a width; past the cache only where it is aligned to its own size."""
    if cut.width < found.type.element.width:
        found = builder.trunc(found, ir.VectorType(cut, found.type.count))
    address = builder.bitcast(builder.gep(array.data, [at]), found.type.as_pointer())
    store = builder.store(found, address, align=cut.width // 8 * (found.type.count if past_cache else 1))
    if past_cache:
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))


def _processor_has(feature: str) -> bool:
    """Whether Numba compiles for a processor with this feature, by LLVM's name for it."""
    features: str | None = config.CPU_FEATURES  # type: ignore[attr-defined]  # the user's choice
    if features is None:
        features = get_host_cpu_features()  # type: ignore[no-untyped-call]
    return f"+{feature}" in features.split(",")


look_up = _look_up(_gathered, past_cache=False)
"""``target[i] = table[slots[i]]``, cut to the target's width, for the LOOK_UP_LANES values of i from ``first`` on.

Gathering loads where the processor has them; a loop is not turned into them by itself, as the target might overlap the
table.
"""
look_up_past_cache = _look_up(_gathered, past_cache=True)
"""`look_up` that does not read what it overwrites, for a target that is aligned to VECTOR_BYTES; ends with `fence`."""
_small = _permuted if _processor_has("avx512f") else _gathered
look_up_small = _look_up(_small, past_cache=False)
"""`look_up` for SMALL_BITS bits: in a table that AVX-512 holds in registers, where the processor has it."""
look_up_small_past_cache = _look_up(_small, past_cache=True)


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
