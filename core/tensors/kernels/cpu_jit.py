"""The loops of encoding and decoding on the CPU, compiled by numba when they are first called.

They work on numpy views of tensors: bf16 and fp16 as int16 bit patterns, fp32 as int32 ones. Block b is the elements
`starts[b]` to `starts[b + 1]`. Nothing here holds the interpreter lock or relaxes a rule of floating point;
`core.tensors.kernels.cpu` is the door, `cpu_rounding_jit` has the other loops that round, `cpu_packing_jit` those that
know no blocks.

Numbers are compared as *keys*: the pattern's magnitude, and for negative numbers all its bits turned, -1 for -0. Keys
order as numbers do, and x > L holds exactly when x's key is greater than that of L rounded down to x's precision, one
less where L is negative: so 16-bit lanes suffice for 16-bit weights whatever the scale is.

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
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Starts = NDArray[np.uint64]
Scaling = tuple[int, float, int, int, int]
Rounding = tuple[bool, int, int, int]
Whole = int | np.integer[Any]
Work = TypeVar("Work", bound=Callable[..., Any])

FP32, BF16, FP16 = 0, 1, 2  # kinds of bit patterns
CHUNK = 32  # elements of one step: a constant, so that the compiler makes it whole vectors
GROUP = 15  # limits that one step compares with
_PART = 64  # elements of a block that is whole vectors to the compiler
_TILE = 64  # blocks that are worked on together
_TILE_ELEMENTS = 1 << 14  # of a tile of long blocks, which are fewer
ABSMAX, SIGNMAX, RMS = 0, 1, 2  # statistics
E8M0 = 3  # a kind of scales, beside those of patterns
_MAGNITUDE = 0x7FFFFFFF
_FOUR = 4  # bytes of a pattern, a constant to the compiler where the kind is not
_SMALLEST = (1, 1 << 16)  # scales above 0, by kind, as fp32 patterns
_U = np.uint64


def compiled(function: Work) -> Work:
    """Compile on the first call, keep the result on disk where there is a place for it."""
    try:
        return cast("Work", njit(nogil=True, cache=True, error_model="numpy")(function))
    except RuntimeError:  # numba found no folder that it may write to
        return cast("Work", njit(nogil=True, error_model="numpy")(function))


def inlined(function: Work) -> Work:
    """Part of a loop: a call of its own would cost more than what it does for one block."""
    return cast("Work", njit(nogil=True, forceinline=True, error_model="numpy")(function))


def in_any_order(function: Work) -> Work:
    """Part of a loop whose products and sums are exact, so that vectors may make several sums of them."""
    return cast("Work", njit(nogil=True, forceinline=True, fastmath={"reassoc", "contract"})(function))


@compiled
def block_absmax(bits: Bits, starts: Starts, out: Bits) -> int:
    """Bit patterns of the largest magnitude of each block; answers the largest of all."""
    largest = 0
    for block in range(out.size):
        low, count = starts[block], starts[block + 1] - starts[block]
        found = _largest(bits, low, _U(_PART)) if count == _U(_PART) else _largest(bits, low, count)
        out[block] = found
        largest = max(largest, int(found))
    return largest


@inlined
def _largest(bits: Bits, low: np.uint64, count: np.uint64) -> Any:
    cast_, mask = bits.dtype.type, bits.dtype.type(_MAGNITUDE if bits.itemsize == _FOUR else 0x7FFF)
    found = cast_(0)
    for i in range(count):
        found = max(found, cast_(bits[low + i] & mask))
    return found


@compiled
def block_signmax(bits: Bits, starts: Starts, out: Bits) -> int:
    """Bit patterns of the element of largest magnitude of each block, the first of equals; +0 for zeros."""
    cast_, mask = bits.dtype.type, bits.dtype.type(_MAGNITUDE if bits.itemsize == _FOUR else 0x7FFF)
    largest = 0
    for block in range(out.size):
        low, count = starts[block], starts[block + 1] - starts[block]
        above, below = _sides(bits, low, _U(_PART)) if count == _U(_PART) else _sides(bits, low, count)
        found = max(above, below)
        is_negative = below > above
        if above == below and found > 0:
            for i in range(low, low + count):
                if (bits[i] & mask) == found:
                    is_negative = bits[i] < 0
                    break
        out[block] = cast_(~mask) | found if is_negative else found
        largest = max(largest, int(found))
    return largest


@inlined
def _sides(bits: Bits, low: np.uint64, count: np.uint64) -> tuple[Any, Any]:
    """The largest magnitudes of positive and of negative numbers."""
    cast_, sign = bits.dtype.type, bits.dtype.type(-_MAGNITUDE - 1 if bits.itemsize == _FOUR else -0x8000)
    above, below = cast_(0), cast_(0)
    for i in range(count):
        above = max(above, bits[low + i])
        below = max(below, cast_(bits[low + i] ^ sign))
    return above, below


@compiled
def widen(bits: Bits, kind: int, patterns: Ints) -> None:
    """Finite numbers of a kind as the patterns of the same numbers in fp32."""
    if kind == FP16:
        numbers = patterns.view(np.float32)
        for i in range(_U(bits.size)):
            wide = np.int32(bits[i])
            patterns[i] = ((wide & np.int32(0x7FFF)) << np.int32(13)) | (wide & np.int32(-0x80000000))
        for i in range(_U(bits.size)):
            numbers[i] *= np.float32(2.0**112)
    else:
        shift = np.int32(0 if bits.itemsize == _FOUR else 16)
        for i in range(_U(bits.size)):
            patterns[i] = np.int32(bits[i]) << shift


@compiled
def block_squares(bits: Bits, starts: Starts, kind: int, largest: Bits, squares: Doubles, out: Doubles) -> None:
    """Sums of squares, fp64: neighbours are added in pairs until one number is left, an odd one stays as it is.

    Where no sum can be rounded, any order will do: n squares of numbers of p bits and exponents low to high are
    multiples of 2^(2 (low - p + 1)) below n 2^(2 high + 2). `largest`: magnitudes of the blocks. `squares`: room for
    those of the longest block.
    """
    mantissa = 7 if kind == BF16 else 10
    longest, room = _U(squares.size), 53 - 2 * (mantissa + 1)
    while longest > _U(1):
        longest, room = (longest + _U(1)) // _U(2), room - 1
    for block in range(out.size):
        low, high, is_exact = starts[block], starts[block + 1], False
        if kind != FP32:  # whose squares have 48 bits
            count = high - low
            least = _least(bits, low, _U(_PART)) if count == _U(_PART) else _least(bits, low, count)
            highest = max(np.int64(largest[block]) >> mantissa, np.int64(1))
            is_exact = bool(2 * (highest - max(least >> mantissa, np.int64(1))) <= room)
        if is_exact:
            out[block] = _squares_in_any_order(bits, low, high, kind)
        else:
            for i in range(high - low):
                number = _number(bits[low + i], kind)
                squares[i] = number * number
            out[block] = _sum_of_pairs(squares, high - low)


@inlined
def _least(bits: Bits, low: np.uint64, count: np.uint64) -> np.int64:
    """The smallest magnitude above 0, one more than the largest where there is none."""
    cast_, mask = bits.dtype.type, bits.dtype.type(_MAGNITUDE if bits.itemsize == _FOUR else 0x7FFF)
    found = mask
    for i in range(count):
        found = min(found, cast_(cast_(cast_(bits[low + i] & mask) - cast_(1)) & mask))
    return np.int64(found) + 1


@inlined
def _number(pattern: Whole, kind: int) -> np.float64:
    """What a pattern stands for, but for the sign of fp16."""
    if kind == FP16:
        small = np.int32(np.int32(pattern & 0x7FFF) << np.int32(13)).view(np.float32)
        return np.float64(small * np.float32(2.0**112))
    return np.float64(np.int32(np.int32(pattern) << np.int32(16 if kind == BF16 else 0)).view(np.float32))


@in_any_order
def _squares_in_any_order(bits: Bits, low: Whole, high: Whole, kind: int) -> float:
    total = 0.0
    if kind == FP16:
        for i in range(low, high):
            number = _number(bits[i], FP16)
            total += number * number
    else:
        for i in range(low, high):
            number = _number(bits[i], BF16)
            total += number * number
    return total


@inlined
def _sum_of_pairs(numbers: Doubles, left: np.uint64) -> float:
    """Of the first so many numbers, which are overwritten."""
    if left == 0:
        return 0.0
    while left > 1:
        for i in range(left // _U(2)):
            numbers[i] = numbers[_U(2) * i] + numbers[_U(2) * i + _U(1)]
        if left % _U(2) == 1:
            numbers[left // _U(2)] = numbers[left - _U(1)]
        left = (left + _U(1)) // _U(2)
    return float(numbers[_U(0)])


@compiled
def limit_keys(
    limits: Doubles, lowered: NDArray[np.int8], scales: Floats, exact: bool, kind: int, patterns: Ints, out: Bits
) -> None:
    """Keys of limit k at scale b in out[k * _TILE + b]: x lies above the limit exactly when key(x) is greater.

    Not `exact`: of fl32(limit * |scale|). `exact`: of the real product; `lowered[k]`: x on it counts as above it.
    """
    numbers = patterns.view(np.float32)
    cast_ = out.dtype.type
    for k in range(_U(limits.size)):
        at, count = k * _U(_TILE), _U(scales.size)
        for b in range(count):
            numbers[b] = np.float32(limits[k] * np.float64(abs(scales[b])))
        for b in range(count):
            magnitude = np.int32(patterns[b] & np.int32(_MAGNITUDE))
            patterns[b] = np.int32(-magnitude) if patterns[b] < 0 else magnitude
        if exact:
            _lower(limits[k], lowered[k] != 0, scales, patterns)
        if kind == FP16:
            for b in range(count):
                out[at + b] = _half_key(patterns[b])
        else:
            shift = np.int32(0 if out.itemsize == _FOUR else 16)
            for b in range(count):
                out[at + b] = patterns[b] >> shift
        for b in range(count):  # -0 lies one below 0 among keys, and all negative numbers with it
            out[at + b] = cast_(out[at + b] - cast_(out[at + b] < 0))


@inlined
def _lower(limit: float, on_tie: bool, scales: Floats, keys: Ints) -> None:
    """The next lower key where fp32 rounded the product up, and where it is exact and a tie goes up."""
    if on_tie:
        for b in range(_U(scales.size)):
            product = limit * np.float64(abs(scales[b]))
            keys[b] -= np.int32(product <= np.float64(np.float32(product)))
    else:
        for b in range(_U(scales.size)):
            product = limit * np.float64(abs(scales[b]))
            keys[b] -= np.int32(product < np.float64(np.float32(product)))


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
    patterns, keys = np.empty(_TILE, np.int32), keys_of(bits, limits.size)
    for first in range(0, scales.size, _TILE):
        tile = scales[first : first + _TILE]
        limit_keys(limits, lowered, tile, exact, kind, patterns, keys)
        count_tile(bits, starts[first:], tile, keys, zero, codes)


@inlined
def keys_of(bits: Bits, limits: int) -> Bits:
    """Room for the limits of a tile, whole groups of them; those that are not filled in lie above all numbers."""
    groups = -(-limits // GROUP)
    return np.full(groups * GROUP * _TILE, _MAGNITUDE if bits.itemsize == _FOUR else 0x7FFF, bits.dtype)


@compiled
def count_tile(bits: Bits, starts: Starts, scales: Floats, keys: Bits, zero: int, codes: Codes) -> None:
    """`counted_codes` of the blocks whose limits `keys` has."""
    cast_, sign = bits.dtype.type, -0x80000000 if bits.itemsize == _FOUR else -0x8000
    for block in range(_U(scales.size)):
        low, high = starts[block], starts[block + _U(1)]
        if scales[block] == 0:
            for i in range(low, high):
                codes[i] = zero
        else:
            flip = cast_(sign * np.int64(scales[block] < 0))
            _above(bits, low, high, flip, keys, block, False, codes)
            for group in range(_U(1), _U(keys.size) // _U(GROUP * _TILE)):
                _above(bits, low, high, flip, keys, group * _U(GROUP * _TILE) + block, True, codes)


@inlined
def _above(bits: Bits, low: Whole, high: Whole, flip: Whole, keys: Bits, at: Whole, more: bool, codes: Codes) -> None:
    """How many of GROUP ascending limits lie below each element, by halving; `more`: in addition to `codes`."""
    cast_ = bits.dtype.type
    nothing, mask = cast_(0), cast_(_MAGNITUDE if bits.itemsize == _FOUR else 0x7FFF)
    l0, l1, l2 = keys[at], keys[at + _U(_TILE)], keys[at + _U(2 * _TILE)]
    l3, l4, l5 = keys[at + _U(3 * _TILE)], keys[at + _U(4 * _TILE)], keys[at + _U(5 * _TILE)]
    l6, l7, l8 = keys[at + _U(6 * _TILE)], keys[at + _U(7 * _TILE)], keys[at + _U(8 * _TILE)]
    l9, l10, l11 = keys[at + _U(9 * _TILE)], keys[at + _U(10 * _TILE)], keys[at + _U(11 * _TILE)]
    l12, l13, l14 = keys[at + _U(12 * _TILE)], keys[at + _U(13 * _TILE)], keys[at + _U(14 * _TILE)]
    for start in range(low, high, _U(CHUNK)):
        for i in range(_U(CHUNK)):
            pattern = cast_(bits[start + i] ^ flip)
            key = cast_(pattern ^ (mask if pattern < 0 else nothing))
            d = key > l7
            m0, m1, m2, m3 = l8 if d else l0, l9 if d else l1, l10 if d else l2, l11 if d else l3
            m4, m5, m6 = l12 if d else l4, l13 if d else l5, l14 if d else l6
            c = key > m3
            n0, n1, n2 = m4 if c else m0, m5 if c else m1, m6 if c else m2
            b = key > n1
            a = key > (n2 if b else n0)
            count = (np.uint8(d) << 3) | (np.uint8(c) << 2) | (np.uint8(b) << 1) | np.uint8(a)
            codes[start + i] = np.uint8(codes[start + i] + count) if more else np.uint8(count)


@compiled
def round_scales(extremes: Floats, scaling: Scaling, factors: Floats) -> None:
    """Statistics to decoded scales, as `core.tensors.scale_formats` stores them.

    `scaling`: kind, what the statistic is divided by, the largest scale's pattern in fp32; of e8m0 the mantissa in
    2^-23 from which on the exponent is one more, and the exponent of 1.
    """
    kind, end, largest, rise, offset = scaling
    patterns = factors.view(np.int32)
    if kind == E8M0:
        for b in range(_U(extremes.size)):
            wide = np.float64(extremes[b]).view(np.int64)
            above = np.int64(((wide >> 29) & 0x7FFFFF) >= rise)
            power = min(max((wide >> 52) - 1023 + offset + above, np.int64(0)), np.int64(254))
            code = power if extremes[b] > 0 else np.int64(0)
            patterns[b] = np.int32(code << 23 if code > 0 else 1 << 22)
        return
    smallest = _SMALLEST[kind]
    for b in range(_U(extremes.size)):
        wanted = np.float32(extremes[b] / np.float32(end))
        pattern = wanted.view(np.int32)
        nearest = _nearest(np.int32(pattern & np.int32(_MAGNITUDE)), kind)
        magnitude = min(max(nearest, np.int32(smallest if extremes[b] != 0 else 0)), np.int32(largest))
        patterns[b] = np.int32(magnitude | np.int32(pattern & np.int32(-0x80000000)))


@inlined
def _nearest(magnitude: np.int32, kind: int) -> np.int32:
    """fp32 rounded to bf16, ties to even, or as it is; patterns without sign."""
    if kind == FP32:
        return magnitude
    odd = np.int32(np.int32(magnitude >> np.int32(16)) & np.int32(1))
    return np.int32(np.int32(magnitude + np.int32(0x7FFF) + odd) & np.int32(-0x10000))


@compiled
def translate(codes: Codes, middle: int, first: int) -> None:
    """Indices become stored codes: those from `first` on, or of a float whose zero has the index `middle`.

    `first` of a float is its sign bit; `middle` is -1 where there is none.
    """
    zero, added = np.uint8(middle), np.uint8(first)
    if middle >= 0:
        negative = np.uint8(added + zero)
        for i in range(_U(codes.size)):
            codes[i] = np.uint8(negative - codes[i]) if codes[i] < zero else np.uint8(codes[i] - zero)
    elif first > 0:
        for i in range(_U(codes.size)):
            codes[i] = np.uint8(codes[i] + added)


@compiled
def pack_pairs(pairs: NDArray[np.uint16], bits: int, out: Codes) -> None:
    """Two codes below 2^bits, seen as one number, to a byte."""
    shift = np.uint16(8 - bits)
    for i in range(_U(pairs.size)):
        out[i] = np.uint8(pairs[i] | np.uint16(pairs[i] >> shift))


@compiled
def encode_blocks(
    bits: Bits,
    starts: Starts,
    kind: int,
    statistic: int,
    scaling: Scaling,
    rounding: Rounding,
    limits: Doubles,
    lowered: NDArray[np.int8],
    scales: Floats,
    packed: bool,
    out: Codes,
) -> int:
    """All of encoding, a tile of blocks after the other: decoded scales, and codes, `packed` two to a byte.

    Answers the largest magnitude's pattern; where that is no number, no more tiles were worked on. `bits`, and `out`
    if it is not packed, have room for CHUNK more. `rounding`: exact (`limit_keys`), code of 0, and how indices become
    codes (`translate`).
    """
    exact, zero, middle, first_code = rounding
    infinity = 0x7F800000 if kind == FP32 else 0x7F80 if kind == BF16 else 0x7C00
    longest = np.int64(starts[1] - starts[0]) if scales.size else 1
    tile = min(_TILE, max(1, _TILE_ELEMENTS // longest))
    places, found, extremes = np.empty(tile + 1, np.uint64), np.empty(tile, bits.dtype), np.empty(tile, np.float32)
    sums, squares = np.empty(tile), np.empty(longest)
    patterns, keys = np.empty(_TILE, np.int32), keys_of(bits, limits.size)
    codes = np.empty(tile * longest + CHUNK + 1 if packed else 0, np.uint8)
    largest, held, done = 0, np.int64(0), np.int64(0)
    for first in range(0, scales.size, tile):
        count = min(tile, scales.size - first)
        low, high = starts[first], starts[first + count]
        size = np.int64(high - low)
        for b in range(count + 1):
            places[b] = starts[first + b] - low
        part, here, factors = bits[low : high + _U(CHUNK)], places[: count + 1], scales[first : first + count]
        if statistic == SIGNMAX:
            largest = max(largest, block_signmax(part, here, found[:count]))
        else:
            largest = max(largest, block_absmax(part, here, found[:count]))
        if largest >= infinity:
            break
        if statistic == RMS:
            block_squares(part, here, kind, found[:count], squares, sums[:count])
            for b in range(count):
                extremes[b] = np.float32(np.sqrt(sums[b] / np.float64(here[b + 1] - here[b])))
        else:
            widen(found[:count], kind, extremes.view(np.int32))
        round_scales(extremes[:count], scaling, factors)
        target = codes[held:] if packed else out[low:]
        limit_keys(limits, lowered, factors, exact, kind, patterns, keys)
        count_tile(part, here, factors, keys, zero, target)
        translate(target[:size], middle, first_code)
        if packed:
            pairs = (held + size) // 2
            pack_pairs(codes[: 2 * pairs].view(np.uint16), 4, out[done : done + pairs])
            codes[0], held, done = codes[held + size - 1], (held + size) % 2, done + pairs
    if held and largest < infinity:
        out[done] = codes[0]
    return largest
