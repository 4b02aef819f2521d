"""Number formats inside GPU kernels: loading weights, storing and reading scales, rounding results.

Everything that decides a bit is integer arithmetic on the patterns of fp32 numbers, or an operation that IEEE 754
rounds correctly, so that a GPU, Triton's interpreter and the reference in torch give the same bits. Nothing here is
called from Python: these functions are inlined into the kernels of `gpu_encode` and `gpu_decode`.
"""
# Triton is a language of its own: constants of a kernel are spelled in capitals, and its values have no types for mypy.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)  # patterns from here on are infinity and NaN


@triton.jit
def load_weights(weights, places, inside, KIND: tl.constexpr):
    """fp32 weights; bf16 arrives as its pattern in int16. Outside: +0."""
    raw = tl.load(weights + places, mask=inside, other=0)
    if KIND == "bf16":
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return raw.to(tl.float32)


@triton.jit
def pattern(numbers):
    """fp32 -> int32, bit for bit."""
    return numbers.to(tl.int32, bitcast=True)


@triton.jit
def number(patterns):
    """int32 -> fp32, bit for bit."""
    return patterns.to(tl.float32, bitcast=True)


@triton.jit
def bf16_pattern(numbers):
    """fp32 -> bf16 to nearest, ties to even, as a pattern in int32 without sign; infinity where it overflows."""
    size = pattern(numbers) & MAGNITUDE
    return (size + 0x7FFF + ((size >> 16) & 1)) >> 16


@triton.jit
def stored_scale(wanted, is_nonzero, largest, rise, offset, KIND: tl.constexpr):
    """fp32 scales before rounding -> the pattern that is stored, int32 (`core.tensors.scale_formats`).

    bf16, fp16, fp32: nearest, of magnitude at most the pattern `largest`, not 0 where `is_nonzero`. e8m0: the exponent
    of wanted + `offset`, one more where the mantissa's 23 bits are at least `rise`.
    """
    size = pattern(wanted) & MAGNITUDE
    if KIND == "e8m0":
        return _exponent_code(wanted, size, rise, offset)
    if KIND == "bf16":
        nearest, sign = bf16_pattern(wanted), 0x8000
    elif KIND == "fp16":
        nearest, sign = number(size).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32), 0x8000
    else:
        nearest, sign = size, -0x80000000
    rounded = tl.minimum(tl.maximum(nearest, is_nonzero.to(tl.int32)), largest)
    return rounded | tl.where(pattern(wanted) < 0, sign, 0)


@triton.jit
def _exponent_code(wanted, size, rise, offset):
    is_tiny = size < 0x00800000
    normal = tl.where(is_tiny, pattern(number(size) * 16777216.0), size)  # 2^24: a denormal's leading bit shows
    exponent = (normal >> 23) - tl.where(is_tiny, 24, 0)
    power = exponent + offset + ((normal & 0x007FFFFF) >= rise).to(tl.int32)
    return tl.where(wanted > 0, tl.minimum(tl.maximum(power, 0), 254), 0)


@triton.jit
def decoded_scale(stored, KIND: tl.constexpr):
    """Patterns of stored scales in int32 (sign-extended or not) -> fp32, exactly."""
    if KIND == "bf16":
        return number(stored << 16)
    if KIND == "fp16":
        return stored.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    if KIND == "e8m0":
        return number(tl.where(stored == 0, 0x00400000, stored << 23))
    return number(stored)
