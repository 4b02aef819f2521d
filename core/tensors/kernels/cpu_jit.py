"""The loops of encoding and decoding on the CPU, compiled by numba when they are first called.

They work on numpy views of tensors: bf16 and fp16 as int16 bit patterns, fp32 as int32 ones. Block b is the elements
`starts[b]` to `starts[b + 1]`. Nothing here holds the interpreter lock or relaxes a rule of floating point;
`core.tensors.kernels.cpu` is the door, `cpu_packing_jit` has the loops that know no blocks.

Numbers are compared as *keys*: the pattern's magnitude, negative for negative numbers. Keys order as numbers do, both
zeros are 0, and x > L holds exactly when key(x) > floor(key(L) in x's precision), so 16-bit lanes suffice for 16-bit
weights whatever the scale is.

For speed, arrays are handed on whole and indexed with unsigned numbers: slices are counted references, and numba asks
of every signed index whether it counts from the end. Loops that belong together stand in one file because numba's cache
on disk only notices changes of the file of the function that is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

Bits = NDArray[np.signedinteger[Any]]
Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Starts = NDArray[np.uint64]
Work = TypeVar("Work", bound=Callable[..., Any])

FP32, BF16, FP16 = 0, 1, 2  # kinds of bit patterns
CHUNK = 32  # elements of one step: a constant, so that the compiler makes it whole vectors
GROUP = 15  # limits that one step compares with
PART = 64  # elements whose squares are added in one go
_PARTS = 8  # parts that are added side by side
_TILE = 64  # blocks whose limits are computed together
_U = np.uint64


def compiled(function: Work) -> Work:
    """Compile on the first call, keep the result on disk where there is a place for it."""
    try:
        return cast("Work", njit(nogil=True, cache=True)(function))
    except RuntimeError:  # numba found no folder that it may write to
        return cast("Work", njit(nogil=True)(function))


def inlined(function: Work) -> Work:
    """Part of a loop: a call of its own would cost more than what it does for one block."""
    return cast("Work", njit(nogil=True, forceinline=True)(function))


@compiled
def block_absmax(bits: Bits, starts: Starts, mask: int, out: Bits) -> int:
    """Bit patterns of the largest magnitude of each block; answers the largest of all."""
    cast_ = bits.dtype.type
    largest = 0
    for block in range(out.size):
        found = cast_(0)
        for i in range(starts[block], starts[block + 1]):
            found = max(found, cast_(bits[i] & cast_(mask)))
        out[block] = found
        largest = max(largest, int(found))
    return largest


@compiled
def block_signmax(bits: Bits, starts: Starts, mask: int, out: Bits) -> int:
    """Bit patterns of the element of largest magnitude of each block, the first of equals; +0 for zeros."""
    cast_ = bits.dtype.type
    largest = 0
    for block in range(out.size):
        above, below = cast_(0), cast_(0)
        for i in range(starts[block], starts[block + 1]):
            above = max(above, bits[i])
            below = max(below, cast_(bits[i] & cast_(mask)) if bits[i] < 0 else cast_(0))
        found = max(above, below)
        is_negative = below > above
        if above == below and found > 0:
            for i in range(starts[block], starts[block + 1]):
                if (bits[i] & mask) == found:
                    is_negative = bits[i] < 0
                    break
        out[block] = cast_(~mask) | found if is_negative else found
        largest = max(largest, int(found))
    return largest


@compiled
def first_not_finite(bits: Bits, mask: int, infinity: int) -> int:
    """Index of the first element that is NaN or infinite, or -1."""
    for i in range(bits.size):
        if (bits[i] & mask) >= infinity:
            return i
    return -1


@compiled
def block_squares(numbers: Floats, starts: Starts, sums: Doubles, out: Doubles) -> None:
    """Sums of squares, fp64: neighbours are added in pairs until one number is left, an odd one stays as it is.

    `sums`: room for the sums of the parts of all blocks, rounded up to a multiple of _PARTS.
    """
    squares, halves = np.zeros(PART * _PARTS), np.zeros(PART * _PARTS // 2)
    part = _U(0)
    for block in range(out.size):
        for start in range(starts[block], starts[block + 1], _U(PART)):
            _square(numbers, start, min(start + _U(PART), starts[block + 1]), squares, part % _U(_PARTS) * _U(PART))
            part += _U(1)
            if part % _U(_PARTS) == 0:
                _add_pairs(squares, halves, sums, part - _U(_PARTS))
    if part % _U(_PARTS) != 0:
        _add_pairs(squares, halves, sums, part - part % _U(_PARTS))
    first = _U(0)
    for block in range(out.size):
        parts = (starts[block + 1] - starts[block] + _U(PART - 1)) // _U(PART)
        out[block] = _sum_of_parts(sums, first, parts)
        first += parts


@inlined
def _square(numbers: Floats, start: int, stop: np.uint64, squares: Doubles, at: np.uint64) -> None:
    if stop - start == _U(PART):
        for i in range(_U(PART)):
            squares[at + i] = np.float64(numbers[start + i]) * np.float64(numbers[start + i])
    else:
        for i in range(_U(PART)):
            squares[at + i] = 0.0
        for i in range(stop - start):
            squares[at + i] = np.float64(numbers[start + i]) * np.float64(numbers[start + i])


@compiled
def _add_pairs(squares: Doubles, halves: Doubles, sums: Doubles, at: np.uint64) -> None:
    """Six times: the sums of _PARTS parts of PART squares, which are overwritten."""
    for i in range(PART * _PARTS // 2):
        halves[i] = squares[2 * i] + squares[2 * i + 1]
    for i in range(PART * _PARTS // 4):
        squares[i] = halves[2 * i] + halves[2 * i + 1]
    for i in range(PART * _PARTS // 8):
        halves[i] = squares[2 * i] + squares[2 * i + 1]
    for i in range(PART * _PARTS // 16):
        squares[i] = halves[2 * i] + halves[2 * i + 1]
    for i in range(PART * _PARTS // 32):
        halves[i] = squares[2 * i] + squares[2 * i + 1]
    for i in range(_PARTS):
        sums[at + _U(i)] = halves[2 * i] + halves[2 * i + 1]


@inlined
def _sum_of_parts(sums: Doubles, first: np.uint64, left: np.uint64) -> float:
    if left == 0:
        return 0.0
    while left > 1:
        for i in range(left // _U(2)):
            sums[first + i] = sums[first + _U(2) * i] + sums[first + _U(2) * i + _U(1)]
        if left % _U(2) == 1:
            sums[first + left // _U(2)] = sums[first + left - _U(1)]
        left = (left + _U(1)) // _U(2)
    return float(sums[first])


@compiled
def limit_keys(
    limits: Doubles,
    lowered: NDArray[np.int8],
    scales: Floats,
    exact: bool,
    kind: int,
    patterns: NDArray[np.int32],
    out: Bits,
) -> None:
    """Keys of limit k at scale b in out[k, b]: x lies above the limit exactly when key(x) > out[k, b].

    Not `exact`: of fl32(limit * |scale|). `exact`: of the real product; `lowered[k]`: x on it counts as above it.
    """
    numbers = patterns.view(np.float32)
    for k in range(limits.size):
        for b in range(scales.size):
            numbers[b] = np.float32(limits[k] * np.float64(abs(scales[b])))
        for b in range(scales.size):
            magnitude = np.int32(patterns[b] & np.int32(0x7FFFFFFF))
            patterns[b] = np.int32(-magnitude) if patterns[b] < 0 else magnitude
        if exact:
            _lower(limits[k], lowered[k] != 0, scales, patterns)
        if kind == FP32:
            for b in range(scales.size):
                out[k, b] = patterns[b]
        elif kind == BF16:
            for b in range(scales.size):
                out[k, b] = patterns[b] >> np.int32(16)
        else:
            for b in range(scales.size):
                out[k, b] = _half_key(patterns[b])


@inlined
def _lower(limit: float, on_tie: bool, scales: Floats, keys: NDArray[np.int32]) -> None:
    """The next lower key where fp32 rounded the product up, and where it is exact and a tie goes up."""
    for b in range(scales.size):
        product = limit * np.float64(abs(scales[b]))
        rounded = np.float64(np.float32(product))
        keys[b] -= np.int32((product < rounded) | ((product == rounded) & on_tie))


@inlined
def _half_key(key: int) -> int:
    """The key of fp32 rounded down to the key of fp16."""
    magnitude = np.int32(abs(key))
    exponent = magnitude >> np.int32(23)
    is_small = exponent < 113  # fp16's subnormals: the significand moves right
    shift = min(np.int32(126 - exponent), np.int32(24)) if is_small else np.int32(13)
    significand = np.int32(magnitude & np.int32(0x7FFFFF)) | np.int32(0x800000 if exponent > 0 else 0)
    value = significand if is_small else np.int32(magnitude - np.int32(112 << 23))
    value = np.int32(value + (np.int32((np.int32(1) << shift) - 1) if key < 0 else 0))
    found = int(min(np.int32(value >> shift), np.int32(0x7C00)))
    return -found if key < 0 else found


@compiled
def counted_codes(
    bits: Bits,
    starts: Starts,
    kind: int,
    scales: Floats,
    limits: Doubles,
    lowered: NDArray[np.int8],
    exact: bool,
    zero: int,
    codes: Codes,
) -> None:
    """How many limits lie below each element; `bits` and `codes` have room for CHUNK more than the blocks need.

    Blocks are worked on in whole chunks, so that elements of the next one may be among them: their codes are
    overwritten later.
    """
    mask, sign = (0x7FFFFFFF, -0x80000000) if kind == FP32 else (0x7FFF, -0x8000)
    groups = -(-limits.size // GROUP)
    patterns = np.empty(_TILE, np.int32)
    keys = np.full((groups * GROUP, _TILE), mask, bits.dtype)
    for block in range(_U(scales.size)):
        tiled = block % _U(_TILE)
        if tiled == 0:
            limit_keys(limits, lowered, scales[block : block + _U(_TILE)], exact, kind, patterns, keys)
        if scales[block] == 0:
            for i in range(starts[block], starts[block + _U(1)]):
                codes[i] = zero
        else:
            flip = sign if scales[block] < 0 else 0
            for group in range(groups):
                first = _U(group * GROUP)
                keep = 0xFF if group else 0
                _above(bits, starts[block], starts[block + _U(1)], flip, mask, keys, first, tiled, keep, codes)


@inlined
def _above(
    bits: Bits,
    low: np.uint64,
    high: np.uint64,
    flip: int,
    mask: int,
    keys: Bits,
    at: np.uint64,
    block: np.uint64,
    keep: int,
    codes: Codes,
) -> None:
    """codes & keep, plus how many of GROUP ascending limits lie below each element: a search of four steps."""
    cast_ = bits.dtype.type
    turned, magnitude_mask, kept = cast_(flip), cast_(mask), np.uint8(keep)
    l0, l1, l2 = keys[at, block], keys[at + _U(1), block], keys[at + _U(2), block]
    l3, l4, l5 = keys[at + _U(3), block], keys[at + _U(4), block], keys[at + _U(5), block]
    l6, l7, l8 = keys[at + _U(6), block], keys[at + _U(7), block], keys[at + _U(8), block]
    l9, l10, l11 = keys[at + _U(9), block], keys[at + _U(10), block], keys[at + _U(11), block]
    l12, l13, l14 = keys[at + _U(12), block], keys[at + _U(13), block], keys[at + _U(14), block]
    for start in range(low, high, _U(CHUNK)):
        for i in range(_U(CHUNK)):
            pattern = cast_(bits[start + i] ^ turned)
            magnitude = cast_(pattern & magnitude_mask)
            key = cast_(-magnitude) if pattern < 0 else magnitude
            d = key > l7
            c = key > (l11 if d else l3)
            b = key > ((l13 if c else l9) if d else (l5 if c else l1))
            upper = (l14 if b else l12) if c else (l10 if b else l8)
            lower = (l6 if b else l4) if c else (l2 if b else l0)
            a = key > (upper if d else lower)
            count = (np.uint8(d) << 3) | (np.uint8(c) << 2) | (np.uint8(b) << 1) | np.uint8(a)
            codes[start + i] = np.uint8(np.uint8(codes[start + i] & kept) + np.uint8(count))


@compiled
def grid_codes(numbers: Floats, starts: Starts, scales: Floats, rule: Doubles, zero: int, codes: Codes) -> None:
    """Values a step apart: rint(x / scale * rule[0] + rule[1]) + rule[2], between rule[3] and rule[4].

    The quotient in fp64 of fp32 numbers lies on a limit only if the real one does; what is added to it, 0 or a half,
    moves it only from below 2^-53 onto 0.
    """
    factor, before, after, least, most = rule[0], rule[1], rule[2], rule[3], rule[4]
    for block in range(scales.size):
        scale = np.float64(scales[block])
        if scale == 0:
            for i in range(starts[block], starts[block + 1]):
                codes[i] = zero
        else:
            for i in range(starts[block], starts[block + 1]):
                level = np.rint(np.float64(numbers[i]) / scale * factor + before) + after
                codes[i] = np.uint8(np.int32(min(max(level, least), most)))


@compiled
def float_codes(
    numbers: Floats,
    starts: Starts,
    scales: Floats,
    single: bool,
    mantissa_bits: int,
    least: int,
    last: int,
    negative: int,
    codes: Codes,
) -> None:
    """Patterns of floats whose smallest normal number is 2^least; `last`: the largest magnitude, `negative`: the sign.

    Half to even in the patterns: those of fp64 above the smallest normal number, whole steps below it. `single`: what
    is rounded is the quotient in fp32; in fp64, it lies half-way only if the real one does.
    """
    quotients = np.empty(_TILE)
    patterns = quotients.view(np.int64)
    shift = np.int64(52 - mantissa_bits)
    base, half = np.int64(1022 + least) << 52, (np.int64(1) << (shift - 1)) - 1
    smallest, steps = 2.0**least, 2.0 ** (mantissa_bits - least)
    for block in range(scales.size):
        scale, high = np.float64(scales[block]), starts[block + 1]
        for start in range(starts[block], high, _U(_TILE)):
            count = min(high - start, _U(_TILE))
            if scale == 0:
                for i in range(count):
                    codes[start + i] = 0
                continue
            if single:
                for i in range(count):
                    quotients[i] = np.float64(abs(numbers[start + i] / scales[block]))
            else:
                for i in range(count):
                    quotients[i] = abs(np.float64(numbers[start + i]) / scale)
            for i in range(count):
                small = np.int64(np.rint(min(quotients[i], smallest) * steps))
                offset = patterns[i] - base
                large = (offset + half + ((offset >> shift) & 1)) >> shift
                pattern = min(small if quotients[i] < smallest else large, np.int64(last))
                is_below = (numbers[start + i] < 0) != (scale < 0)
                codes[start + i] = np.uint8(pattern + negative if is_below & (pattern > 0) else pattern)


@compiled
def guided_codes(
    numbers: Floats,
    starts: Starts,
    scales: Floats,
    limits: Doubles,
    guide: NDArray[np.int32],
    rule: Doubles,
    zero: int,
    codes: Codes,
) -> None:
    """A table says where the limits near a quotient begin, comparisons with the limits themselves find the code.

    `limits` ends with infinity. `rule`: where cell 0 starts, cells per unit, the largest number of limits near a cell.
    Where fl32(limit * scale) may be subnormal, and far from the real product, all limits are compared.
    """
    origin, most = rule[0], np.float64(guide.size - 1)
    for block in range(scales.size):
        if scales[block] == 0:
            for i in range(starts[block], starts[block + 1]):
                codes[i] = zero
            continue
        sign = np.float32(-1.0 if scales[block] < 0 else 1.0)
        scale = np.float64(abs(scales[block]))
        inverse, is_tiny = 1.0 / scale, scale < 1e-30
        cells, steps = (0.0, limits.size - 1) if is_tiny else (rule[1], np.int64(rule[2]))
        for i in range(starts[block], starts[block + 1]):
            number = sign * numbers[i]
            code = guide[_U(min(max((np.float64(number) * inverse - origin) * cells, 0.0), most))]
            for _ in range(steps):
                code += np.int32(number > np.float32(limits[_U(code)] * scale))
            codes[i] = np.uint8(code)


@compiled
def decode_steps(
    codes: Codes, starts: Starts, first: float, step: float, last: int, scales: Floats, out: Floats
) -> None:
    """fl32((first + step * code) * scale); larger codes than `last` are taken for it."""
    lowest, gap, most = np.float32(first), np.float32(step), np.uint8(last)
    for block in range(scales.size):
        for i in range(starts[block], starts[block + 1]):
            out[i] = (lowest + gap * np.float32(min(codes[i], most))) * scales[block]


@compiled
def decode_values(codes: Codes, starts: Starts, table: Floats, scales: Floats, out: Floats) -> None:
    """fl32(table[code] * scale); `table` has 256 values."""
    for block in range(scales.size):
        for i in range(starts[block], starts[block + 1]):
            out[i] = table[codes[i]] * scales[block]


@compiled
def decode_bf16(codes: Codes, starts: Starts, table: Floats, scales: Floats, out: NDArray[np.int16]) -> None:
    """`decode_values` rounded to bf16, nearest, ties to even; NaN stays NaN."""
    patterns = np.zeros(_TILE, np.int32)
    numbers = patterns.view(np.float32)
    for block in range(scales.size):
        high = starts[block + 1]
        for start in range(starts[block], high, _U(_TILE)):
            count = min(high - start, _U(_TILE))
            for i in range(count):
                numbers[i] = table[codes[start + i]] * scales[block]
            for i in range(count):
                wide = np.int64(patterns[i])
                is_nan = (wide & 0x7FFFFFFF) > 0x7F800000
                out[start + i] = np.int16(0x7FC0) if is_nan else np.int16((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16)
