"""Sixteen fp32 values as one value in numba kernels, since the compiler does not find the vectors of a loop by itself.

An array of any shape is given as it lies in memory (contiguous), with the place of the first of sixteen neighbours in
it. LLVM cuts the sixteen into what the machine has: one register with AVX-512, two with AVX2, four on ARM. Nothing is
checked.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

from rwkv_es.noise.compiled import compiled

# Without numba's counting of references (_nrt) a slice costs nothing; the kernels then may not allocate.
OPTIONS: Any = {"nogil": True, "fastmath": True, "error_model": "numpy", "_nrt": False}
inline = compiled(inline="always", **OPTIONS)
LANES = 16
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_HALVES = ir.VectorType(ir.HalfType(), LANES)
_WORDS = ir.VectorType(ir.IntType(32), LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)


class _Vector(types.Type):
    def __init__(self):
        super().__init__(name="vector of 16 fp32")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, _FLOATS)


def _pointer(context, builder, signature, arguments, kind):
    data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
    return builder.bitcast(builder.gep(data, [arguments[1]]), kind.as_pointer())


@intrinsic
def load(typing, array, place):
    """Read sixteen values of an fp32 array, or of fp16 bits in a uint16 array."""
    is_half = array.dtype == types.uint16

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature, arguments, _HALVES if is_half else _FLOATS)
        values = builder.load(pointer, align=2 if is_half else 4)
        return builder.fpext(values, _FLOATS) if is_half else values

    return vector(array, types.intp), generate


@intrinsic
def store(typing, array, place, values):
    """Write sixteen values to an fp32 array, or rounded to fp16 bits to a uint16 array."""
    is_half = array.dtype == types.uint16

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature, arguments, _HALVES if is_half else _FLOATS)
        written = builder.fptrunc(arguments[2], _HALVES) if is_half else arguments[2]
        builder.store(written, pointer, align=2 if is_half else 4)
        return context.get_dummy_value()

    return types.none(array, types.intp, vector), generate


@intrinsic
def load_bf16(typing, array, place):
    """Read sixteen values from bf16 bits in a uint16 array."""

    def generate(context, builder, signature, arguments):
        bits = builder.load(_pointer(context, builder, signature, arguments, _SHORTS), align=2)
        return builder.bitcast(builder.shl(builder.zext(bits, _WORDS), ir.Constant(_WORDS, [16] * LANES)), _FLOATS)

    return vector(array, types.intp), generate


@intrinsic
def splat(typing, value):
    """Return sixteen times the same fp32 value."""

    def generate(context, builder, signature, arguments):
        nothing = ir.Constant(_FLOATS, ir.Undefined)
        first = builder.insert_element(nothing, arguments[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, nothing, ir.Constant(_WORDS, [0] * LANES))

    return vector(types.float32), generate


@intrinsic
def fma(typing, a, b, c):
    """Return a * b + c, rounded once."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32"), arguments)

    return vector(vector, vector, vector), generate


@intrinsic
def mul(typing, a, b):
    """Return a * b."""
    return vector(vector, vector), lambda context, builder, signature, arguments: builder.fmul(*arguments)


@intrinsic
def add(typing, a, b):
    """Return a + b."""
    return vector(vector, vector), lambda context, builder, signature, arguments: builder.fadd(*arguments)


@intrinsic
def sub(typing, a, b):
    """Return a - b."""
    return vector(vector, vector), lambda context, builder, signature, arguments: builder.fsub(*arguments)


@intrinsic
def total(typing, values):
    """Return the sum of the sixteen values, by halves: the order is the same on every machine."""

    def generate(context, builder, signature, arguments):
        summed = arguments[0]
        for width in (8, 4, 2, 1):
            others = [*range(width, 2 * width), *[0] * (LANES - width)]
            moved = builder.shuffle_vector(summed, summed, ir.Constant(_WORDS, others))
            summed = builder.fadd(summed, moved)
        return builder.extract_element(summed, ir.Constant(ir.IntType(32), 0))

    return types.float32(vector), generate


@inline
def value(bits):
    """Return the number of a bf16's bits: exactly the factor, at half of its memory traffic."""
    return np.uint32(np.uint32(bits) << 16).view(np.float32)


@inline
def dot(x, factor):
    """Return <x, factor>: x (n,) fp32, factor (n,) bf16 bits."""
    zero, whole, quarters = splat(np.float32(0)), len(x) // LANES * LANES, len(x) // (4 * LANES) * (4 * LANES)
    t0, t1, t2, t3 = zero, zero, zero, zero  # four sums side by side: one would wait for itself
    for c in range(0, quarters, 4 * LANES):
        t0 = fma(load(x, c), load_bf16(factor, c), t0)
        t1 = fma(load(x, c + LANES), load_bf16(factor, c + LANES), t1)
        t2 = fma(load(x, c + 2 * LANES), load_bf16(factor, c + 2 * LANES), t2)
        t3 = fma(load(x, c + 3 * LANES), load_bf16(factor, c + 3 * LANES), t3)
    for c in range(quarters, whole, LANES):
        t0 = fma(load(x, c), load_bf16(factor, c), t0)
    result = total(add(add(t0, t1), add(t2, t3)))
    for c in range(whole, len(x)):
        result += x[c] * value(factor[c])
    return result
