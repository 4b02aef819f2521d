"""The nearest value of every weight, inside GPU kernels: indices that equal `core.tensors.indices` bit for bit.

A limit between two values is t * scale. Four rules say how a weight x compares with it (`gpu_plan.Element`):

    codebook   x > fl32(fl64(t * s)), the product in fp64
    product    x > t * s as real numbers, ties by the table; the product is exact in fp32
    exact      the same where it is exact only in fp64
    quotients  fl32(x / s) > t, ties by the table

No product is added to anything before it is rounded, so that contraction into fused operations changes nothing. Up to
16 codes the limits of a block stand in registers and a weight walks down their tree; beyond, an index found from the
quotient is off by one at most and moves where the limit says so.
"""
# Triton is a language of its own: constants of a kernel are spelled in capitals, and its values have no types for mypy.
# ruff: noqa: N803, RUF005
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from core.tensors.kernels.gpu_numbers import number, pattern

_BELOW_ZERO = tl.constexpr(-0x7FFFFFFF)  # the pattern of the largest negative number


@triton.jit
def prepared(scale, limits, upper, RULE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr):
    """The scale that limits are multiplied with, (rows, 1), and up to 16 codes a block's limits, ascending.

    Where the scale is 0 the first `ZERO` limits lie below all weights and the others above.
    """
    s = tl.abs(scale)[:, None]
    if RULE == "quotients":
        s = tl.full(s.shape, 1.0, tl.float32)
    kept = ()
    if BITS <= 4:
        for at in tl.static_range(2**BITS - 1):
            limit = _limit(s, tl.load(limits + at), tl.load(upper + at), RULE)
            kept = kept + (tl.where(scale[:, None] == 0, _dead(at, ZERO), limit),)
    return s, kept


@triton.jit
def nearest(
    x,
    scale,
    s,
    kept,
    limits,
    upper,
    RULE: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    SIGNED: tl.constexpr,
    ZERO: tl.constexpr,
):
    """Indices of the values nearest to x / scale, int32; `ZERO` where the scale is 0."""
    if SIGNED:
        x = tl.where(scale[:, None] < 0, -x, x)
    if RULE == "quotients":
        size = tl.abs(scale)[:, None]
        x = tl.div_rn(x, tl.zeros_like(x) + tl.where(size == 0, 1.0, size))
    if BITS <= 4:
        return _walked(x, kept, BITS)
    if IS_EVEN:
        index = _moved(x, s, _guessed(x, s, limits, COUNT), limits, upper, RULE, IS_EVEN, COUNT)
    else:
        index = _searched(x, s, limits, upper, RULE, IS_EVEN, BITS)
    return tl.where(scale[:, None] == 0, ZERO, index)


@triton.jit
def _dead(at: tl.constexpr, ZERO: tl.constexpr):
    if at < ZERO:
        return -float("inf")
    return float("inf")


@triton.jit
def _limit(s, limit, is_upper, RULE: tl.constexpr):
    """fp32 L so that x > L decides for the upper value for every fp32 x (`core.tensors.indices.limits_of`)."""
    if RULE == "product":
        rounded = s * limit.to(tl.float32)
        takes_it = is_upper != 0
    else:
        product = s.to(tl.float64) * limit
        rounded = product.to(tl.float32)
        exact = rounded.to(tl.float64)
        takes_it = (product < exact) | ((product == exact) & (is_upper != 0))
    if RULE == "codebook":
        return rounded
    bits = pattern(rounded)
    below = tl.where(rounded == 0, _BELOW_ZERO, tl.where(bits > 0, bits - 1, bits + 1))
    return tl.where(takes_it, number(below), rounded)


@triton.jit
def _walked(x, kept, BITS: tl.constexpr):
    """How many of 2^BITS - 1 limits lie below x, found in their tree, highest bit first."""
    index = tl.zeros(x.shape, tl.int32)
    for level in tl.static_range(BITS):
        is_above = x > kept[2 ** (BITS - 1 - level) - 1]
        index |= tl.where(is_above, 2 ** (BITS - 1 - level), 0)
        kept = _half_of(kept, is_above, 2 ** (BITS - 1 - level) - 1)
    return index


@triton.jit
def _half_of(kept, is_above, MIDDLE: tl.constexpr):
    """The limits above the middle one, or below it."""
    nearer = ()
    for at in tl.static_range(MIDDLE):
        nearer = nearer + (tl.where(is_above, kept[MIDDLE + 1 + at], kept[at]),)
    return nearer


@triton.jit
def _guessed(x, s, limits, COUNT: tl.constexpr):
    """An index that is off by one at most, from the fp32 quotient, for limits at equal distances."""
    quotient = x / tl.where(s == 0, 1.0, s)
    lowest = tl.load(limits).to(tl.float32)
    step = (tl.load(limits + 1) - tl.load(limits)).to(tl.float32)
    level = tl.floor((quotient - lowest) * (1.0 / step)) + 1.0
    level = tl.where(level > 0.0, level, 0.0)  # of NaN too
    return tl.where(level < COUNT - 1, level, COUNT - 1).to(tl.int32)


@triton.jit
def _searched(x, s, limits, upper, RULE: tl.constexpr, IS_EVEN: tl.constexpr, BITS: tl.constexpr):
    """How many limits lie below x, by halves: exact also where a scale is so small that limits coincide."""
    index = tl.zeros(x.shape, tl.int32)
    for level in tl.static_range(BITS):
        which = index + (2 ** (BITS - 1 - level) - 1)
        index += tl.where(_is_above(x, s, which, limits, upper, RULE, IS_EVEN), 2 ** (BITS - 1 - level), 0)
    return index


@triton.jit
def _moved(x, s, index, limits, upper, RULE: tl.constexpr, IS_EVEN: tl.constexpr, COUNT: tl.constexpr):
    """The index after one step down or up where the exact limit says so."""
    below = tl.maximum(index - 1, 0)
    stays = _is_above(x, s, below, limits, upper, RULE, IS_EVEN) | (index == 0)
    index = tl.where(stays, index, below)
    rises = _is_above(x, s, tl.minimum(index, COUNT - 2), limits, upper, RULE, IS_EVEN) & (index < COUNT - 1)
    return index + rises.to(tl.int32)


@triton.jit
def _is_above(x, s, which, limits, upper, RULE: tl.constexpr, IS_EVEN: tl.constexpr):
    """Whether x lies above limit `which`."""
    if IS_EVEN:
        lowest = tl.load(limits)
        step = tl.load(limits + 1) - lowest
        is_upper = (tl.load(upper) + which) & 1
        if RULE == "product":
            limit = lowest.to(tl.float32) + which.to(tl.float32) * step.to(tl.float32)
        else:
            limit = lowest + which.to(tl.float64) * step
    else:
        limit = tl.load(limits + which)
        is_upper = tl.load(upper + which)
    if RULE == "codebook":
        return x > (s.to(tl.float64) * limit).to(tl.float32)
    if RULE == "product":
        product = s * limit.to(tl.float32)
        return (x > product) | ((x == product) & (is_upper != 0))
    product = s.to(tl.float64) * limit
    exact = x.to(tl.float64)
    return (exact > product) | ((exact == product) & (is_upper != 0))
