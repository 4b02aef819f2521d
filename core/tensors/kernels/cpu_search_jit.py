"""The loops of the search of block scales on the CPU, compiled by numba when they are first called.

`look` tells quickly which candidates may have the least error, `integer_errors` and `table_errors` give exact ones,
`first_least` chooses. `core.tensors.kernels.cpu_search` is the door, and says why what is dropped never matters.
Nothing here holds the interpreter lock or relaxes a rule of floating point.

Exactly, numbers are compared as keys: the bit pattern's magnitude, negative for negative numbers. Keys order as numbers
do, and both zeros are 0. Quickly, as 16-bit integers, with the same element of LANES blocks side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from core.tensors.kernels.cpu_jit import compiled

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Places = NDArray[np.uint32]
Doubles = NDArray[np.float64]
Shorts = NDArray[np.int16]
Flags = NDArray[np.bool_]
Bytes = NDArray[np.uint8]
Grid = tuple[float, float, float, float]
Table = tuple[Floats, Doubles, Flags]
Rules = tuple[bool, bool, bool]
Closest = Callable[[Shorts, Shorts, Shorts, int, Floats], None]

SEGMENT = 4096  # elements whose squares are added on their own
GROUP = 8  # limits that one step compares with
FEW = 48  # up to this many limits, comparing with all of them is faster than searching
_MAGNITUDE = 0x7FFFFFFF

LANES = 32  # blocks side by side
SHORT_TABLES = (8, 16)  # values of the tables that are searched quickly
TOP = 24_000  # what the largest magnitude of a block becomes: leaves room for an end of the table 36 % beyond it
_MOST = 32_767
_BEYOND = 2 * TOP - _MOST  # from a value of this on to _MOST, half-way is beyond every element
_SAFE = 1e9  # far from where int32 ends
_TINY, _HUGE = 2.0**-100, 2.0**100
_MARGIN = 1.0625  # how far the distance of an element to its value may be off
_ROWS = 4  # elements that share what is read of the table
_U = np.uint64
_LANES = np.uint64(LANES)


@compiled
def integer_errors(blocks: Floats, scales: Floats, grid: Grid, asked: Flags, low: int, high: int, out: Doubles) -> None:
    """Of what is `asked` of blocks low..high. `grid`: step, shift, first, last; values (first, ..., last) * step."""
    width = blocks.shape[1]
    part, squares = np.empty(min(width, SEGMENT), np.float32), np.empty(min(width, SEGMENT))
    for b in range(low, high):
        if not _begin(asked, b, out):
            continue
        for start in range(0, width, SEGMENT):
            size = min(SEGMENT, width - start)
            part[:size] = blocks[b, start : start + size]
            for c in range(scales.shape[0]):
                if asked[c, b]:
                    if scales[c, b] == 0:
                        _squares(part, size, squares)
                    else:
                        _integer_squares(part, size, scales[c, b], grid, squares)
                    out[c, b] += _halved(squares, size)


@compiled
def _begin(asked: Flags, b: int, out: Doubles) -> bool:
    """Whether anything is asked of a block; sums start at 0."""
    found = False
    for c in range(asked.shape[0]):
        if asked[c, b]:
            out[c, b] = 0.0
            found = True
    return found


@compiled
def _integer_squares(part: Floats, size: int, scale: float, grid: Grid, squares: Doubles) -> None:
    step, shift, first, last = grid
    turn, factor = np.float32(-1.0) if scale < 0 else np.float32(1.0), np.float32(abs(scale))
    gap = np.float64(factor) * step
    for i in range(size):
        x = part[i] * turn
        level = np.rint(np.float64(x) / gap - shift) + shift
        level = min(max(level, first), last)
        error = np.float64(x) - np.float64(np.float32(level * step) * factor)
        squares[i] = error * error


@compiled
def table_errors(
    blocks: Floats, scales: Floats, table: Table, rules: Rules, asked: Flags, low: int, high: int, out: Doubles
) -> None:
    """Of what is `asked` of blocks low..high. `table`: values, limits between them, whether a number on one is above.

    The table is filled up to whole groups with limits of infinity. `rules`: exact, quotients and signed as in
    `core.tensors.indices`.
    """
    values, limits, on_tie = table
    exact, quotients, signed = rules
    width = blocks.shape[1]
    longest = min(width, SEGMENT)
    part, decoded, keys = np.empty(longest, np.float32), np.empty(longest, np.float32), np.empty(longest, np.int32)
    squares, found = np.empty(longest), np.empty(longest, np.uint32)
    patterns, quotient_patterns = part.view(np.int32), decoded.view(np.int32)
    bounds, scaled = np.empty(limits.size, np.int32), np.empty(values.size, np.float32)
    _bounds(limits, on_tie, 1.0, exact, scaled, bounds)
    for b in range(low, high):
        if not _begin(asked, b, out):
            continue
        for start in range(0, width, SEGMENT):
            size = min(SEGMENT, width - start)
            part[:size] = blocks[b, start : start + size]
            for c in range(scales.shape[0]):
                if not asked[c, b]:
                    continue
                scale, turned = abs(scales[c, b]), signed and scales[c, b] < 0
                if scale == 0:
                    _squares(part, size, squares)
                else:
                    if quotients:
                        _divide(part, size, scale, decoded)
                        _keys(quotient_patterns, size, turned, keys)
                    else:
                        _bounds(limits, on_tie, scale, exact, scaled, bounds)
                        _keys(patterns, size, turned, keys)
                    for k in range(values.size):
                        scaled[k] = values[k] * scale
                    _decode(keys, size, bounds, scaled, found, decoded)
                    _differences(part, size, turned, decoded, squares)
                out[c, b] += _halved(squares, size)


@compiled
def _squares(part: Floats, size: int, squares: Doubles) -> None:
    for i in range(size):
        squares[i] = np.float64(part[i]) * np.float64(part[i])


@compiled
def _divide(part: Floats, size: int, scale: float, quotients: Floats) -> None:
    for i in range(size):
        quotients[i] = part[i] / scale


@compiled
def _differences(part: Floats, size: int, turned: bool, decoded: Floats, squares: Doubles) -> None:
    turn = -1.0 if turned else 1.0
    for i in range(size):
        error = turn * np.float64(part[i]) - np.float64(decoded[i])
        squares[i] = error * error


@compiled
def _bounds(
    limits: Doubles, on_tie: NDArray[np.bool_], scale: float, exact: bool, products: Floats, bounds: Ints
) -> None:
    """Keys of fl32(limit * scale), one less where x on it lies above the limit: see `indices.limits_of`."""
    factor = np.float64(scale)
    bits = products.view(np.int32)
    for k in range(limits.size):
        products[k] = np.float32(limits[k] * factor)
    for k in range(limits.size):
        magnitude = np.int32(bits[k] & np.int32(_MAGNITUDE))
        bounds[k] = np.int32(-magnitude) if bits[k] < 0 else magnitude
    if exact:
        for k in range(limits.size):
            product, rounded = limits[k] * factor, np.float64(products[k])
            bounds[k] -= np.int32((product < rounded) | ((product == rounded) & on_tie[k]))


@compiled
def _keys(patterns: Ints, size: int, turned: bool, keys: Ints) -> None:
    flip = np.int32(-1) if turned else np.int32(0)
    for i in range(size):
        sign = np.int32((patterns[i] >> np.int32(31)) ^ flip)
        magnitude = np.int32(patterns[i] & np.int32(_MAGNITUDE))
        keys[i] = np.int32((magnitude ^ sign) - sign)


@compiled
def _decode(keys: Ints, size: int, bounds: Ints, scaled: Floats, found: Places, decoded: Floats) -> None:
    """The scaled value of each key: the last one whose bound lies below the key."""
    if bounds.size <= FEW:
        for i in range(size):
            decoded[i] = scaled[0]
        for k in range(0, bounds.size, GROUP):
            _compared(keys, size, bounds, scaled, k, decoded)
    else:
        _searched(keys, size, bounds, found)
        for i in range(size):
            decoded[i] = scaled[found[i]]


@compiled
def _compared(keys: Ints, size: int, bounds: Ints, scaled: Floats, k: int, decoded: Floats) -> None:
    b0, b1, b2, b3 = bounds[k], bounds[k + 1], bounds[k + 2], bounds[k + 3]
    b4, b5, b6, b7 = bounds[k + 4], bounds[k + 5], bounds[k + 6], bounds[k + 7]
    v0, v1, v2, v3 = scaled[k + 1], scaled[k + 2], scaled[k + 3], scaled[k + 4]
    v4, v5, v6, v7 = scaled[k + 5], scaled[k + 6], scaled[k + 7], scaled[k + 8]
    for i in range(size):
        key, value = keys[i], decoded[i]
        value = v0 if key > b0 else value
        value = v1 if key > b1 else value
        value = v2 if key > b2 else value
        value = v3 if key > b3 else value
        value = v4 if key > b4 else value
        value = v5 if key > b5 else value
        value = v6 if key > b6 else value
        decoded[i] = v7 if key > b7 else value


@compiled
def _searched(keys: Ints, size: int, bounds: Ints, found: Places) -> None:
    """How many bounds lie below each key, by halving; there are 2^k - 1 bounds or more."""
    step = np.uint32((bounds.size + 1) // 2)
    for i in range(size):
        found[i] = 0
    while step > 0:
        for i in range(size):
            found[i] += step if keys[i] > bounds[np.uint32(found[i] + step - np.uint32(1))] else np.uint32(0)
        step = np.uint32(step >> np.uint32(1))


@compiled
def _halved(numbers: Doubles, size: int) -> float:
    """The sum: of a power of two of numbers, filled up with 0, the upper half joins the lower until one is left."""
    rest, half = np.uint64(size), np.uint64(1)
    while half * np.uint64(2) < rest:
        half *= np.uint64(2)
    while half > 0:
        for i in range(min(half, rest - half)):
            numbers[i] += numbers[i + half]
        rest = min(rest, half)
        half //= np.uint64(2)
    return float(numbers[0])


def _closest_of(count: int) -> Closest:
    """The loop for tables of so many values: a constant, so that the compiler unrolls it."""
    limits = np.uint64(count - 1)

    @compiled
    def closest(rows: Shorts, values: Shorts, bounds: Shorts, at: int, sums: Floats) -> None:
        """Adds the squared distance of each element to its value, lane by lane, to the sums from `at` on."""
        for i in range(_U(0), _U(rows.size), _LANES * _U(_ROWS)):
            for lane in range(_LANES):
                x0, x1 = rows[i + lane], rows[i + _LANES + lane]
                x2, x3 = rows[i + _LANES * _U(2) + lane], rows[i + _LANES * _U(3) + lane]
                v0 = v1 = v2 = v3 = values[lane]
                for k in range(limits):
                    bound, above = bounds[k * _LANES + lane], values[k * _LANES + _LANES + lane]
                    v0 = above if x0 > bound else v0
                    v1 = above if x1 > bound else v1
                    v2 = above if x2 > bound else v2
                    v3 = above if x3 > bound else v3
                d0, d1 = np.float32(np.int16(x0 - v0)), np.float32(np.int16(x1 - v1))
                d2, d3 = np.float32(np.int16(x2 - v2)), np.float32(np.int16(x3 - v3))
                sums[at + lane] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)

    return closest


_closest_8, _closest_16 = (_closest_of(count) for count in SHORT_TABLES)


@compiled
def look(
    blocks: Floats, scales: Floats, table: Floats, rules: Rules, low: int, high: int, asked: Flags, best: Bytes
) -> None:
    """Of blocks low..high: `best`, the first candidate that may have the least error; `asked`, all if there are more.

    `table`: 8 or 16 ascending values, the last one repeated. `rules`: whether the table is the upper half of a
    symmetric one, whether it has a 0, whether a negative scale turns the block. The width is a multiple of 4.
    """
    width, count = blocks.shape[1], scales.shape[0]
    patterns, is_half = blocks.view(np.int32), rules[0]
    units, largest = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    lines, rows = np.zeros(width * LANES, np.int16), np.zeros(width * LANES, np.int16)
    factors, sums = np.empty(count * LANES, np.float32), np.empty(count * LANES, np.float32)
    values, bounds = np.empty(table.size * LANES, np.int16), np.empty(table.size * LANES, np.int16)
    least, ends = np.empty(LANES, np.float32), np.empty(2 * LANES, np.int16)
    for start in range(low, high, LANES):
        lanes = min(LANES, high - start)
        _largest(patterns, start, lanes, largest)
        _factors(scales, start, lanes, max(abs(table[0]), abs(table[-1])), rules[2], largest, units, factors)
        _lines(blocks, start, lanes, units, is_half, lines)
        _across(lines, width, rows)
        sums[:], least[:] = 0.0, np.inf
        for at in range(_U(0), _U(sums.size), _LANES):
            _scaled_table(table, factors, at, values, bounds)
            if table.size == SHORT_TABLES[0]:
                _closest_8(rows, values, bounds, at, sums)
            else:
                _closest_16(rows, values, bounds, at, sums)
            _lessen(sums, at, values, is_half, ends, least)
        _keep(sums, least, largest, width, rules[1], start, lanes, asked, best)


@compiled
def _largest(patterns: Ints, start: int, lanes: int, largest: Floats) -> None:
    """Largest magnitude of each block."""
    found = largest.view(np.int32)
    found[:] = 0
    for lane in range(lanes):
        most = np.int32(0)
        for i in range(patterns.shape[1]):
            most = max(most, np.int32(patterns[start + lane, i] & np.int32(_MAGNITUDE)))
        found[lane] = most


@compiled
def _factors(
    scales: Floats, start: int, lanes: int, end: float, signed: bool, largest: Floats, units: Floats, factors: Floats
) -> None:
    """What blocks and their scales are multiplied with to become integers; 0, so that nothing differs, where they
    are too small or too large for the bound to hold, or a scale is 0, or not of the sign of all."""
    factors[:] = 0.0
    usable = np.zeros(LANES, np.bool_)
    for lane in range(lanes):
        turn = np.float32(-1.0 if signed and scales[0, start + lane] < 0 else 1.0)
        usable[lane] = (largest[lane] >= _TINY) & (largest[lane] <= _HUGE)
        units[lane] = turn * np.float32(TOP) / max(largest[lane], np.float32(_TINY))
    for c in range(scales.shape[0]):
        for lane in range(lanes):
            factor = scales[c, start + lane] * units[lane]
            usable[lane] &= (factor > 0) & (factor * end < _SAFE)
            factors[c * LANES + lane] = factor
    for lane in range(LANES):
        if not usable[lane]:
            units[lane] = 0.0
            factors[lane::LANES] = 0.0


@compiled
def _lines(blocks: Floats, start: int, lanes: int, units: Floats, is_half: bool, lines: Shorts) -> None:
    """Blocks as integers, their magnitudes if `is_half`, one after the other."""
    width = _U(blocks.shape[1])
    for lane in range(_U(lanes)):
        unit, b = units[lane], _U(start) + lane
        if is_half:
            for i in range(width):
                lines[lane * width + i] = np.int16(np.rint(abs(blocks[b, i] * unit)))
        else:
            for i in range(width):
                lines[lane * width + i] = np.int16(np.rint(blocks[b, i] * unit))


@compiled
def _across(lines: Shorts, width: int, rows: Shorts) -> None:
    """The same element of all blocks side by side."""
    for i in range(_U(width)):
        for lane in range(_LANES):
            rows[i * _LANES + lane] = lines[lane * _U(width) + i]


@compiled
def _scaled_table(table: Floats, factors: Floats, at: int, values: Shorts, bounds: Shorts) -> None:
    """The values of each lane as integers, and the integers half-way between them, rounded down."""
    for k in range(_U(table.size)):
        for lane in range(_LANES):
            value = np.int32(np.rint(table[k] * factors[at + lane]))
            values[k * _LANES + lane] = np.int16(min(max(value, np.int32(-_MOST)), np.int32(_MOST)))
    for i in range(_U(values.size) - _LANES):
        bounds[i] = np.int16((np.int32(values[i]) + np.int32(values[i + _LANES])) >> np.int32(1))


@compiled
def _lessen(sums: Floats, at: int, values: Shorts, is_half: bool, ends: Shorts, least: Floats) -> None:
    """The least sum so far, without those of lanes where an element may have taken a value that was cut.

    `ends`: room for the outermost values of each lane that were not.
    """
    below, cut = _LANES, np.int16(_MOST)
    is_cut = False
    last = _U(values.size) - _LANES
    for lane in range(_LANES):
        is_cut |= (values[last + lane] == cut) | (values[lane] == np.int16(-cut))
        ends[lane], ends[below + lane] = -cut, cut
    if not is_cut:
        for lane in range(_LANES):
            least[lane] = min(least[lane], sums[at + lane])
        return
    for k in range(_U(0), _U(values.size), _LANES):
        for lane in range(_LANES):
            value = values[k + lane]
            ends[lane] = max(ends[lane], np.int16(-cut) if value == cut else value)
            ends[below + lane] = min(ends[below + lane], cut if value == np.int16(-cut) else value)
    for lane in range(_LANES):
        is_whole = (values[last + lane] < _MOST) | (ends[lane] >= _BEYOND)
        is_whole &= is_half | (values[lane] > -_MOST) | (ends[below + lane] <= -_BEYOND)
        least[lane] = min(least[lane], sums[at + lane] if is_whole else np.float32(np.inf))


@compiled
def _keep(
    sums: Floats,
    least: Floats,
    largest: Floats,
    width: int,
    has_zero: bool,
    start: int,
    lanes: int,
    asked: Flags,
    best: Bytes,
) -> None:
    """Candidates whose smallest possible error is not above the least of the largest possible ones."""
    rounding = (width / _ROWS + 8) * 2.0**-23
    reach = 2 * _MARGIN * np.sqrt(width)
    most, kept, first = np.empty(LANES), np.zeros(LANES, np.uint8), np.zeros(LANES, np.uint8)
    for lane in range(_LANES):
        most[lane] = (np.sqrt(least[lane] * (1 + rounding)) + reach) ** 2 / (1 - rounding)
    for c in range(asked.shape[0]):
        for lane in range(_LANES):
            is_kept = sums[_U(c) * _LANES + lane] <= most[lane]
            first[lane] = np.uint8(c) if is_kept & (kept[lane] == 0) else first[lane]
            kept[lane] += np.uint8(is_kept)
    for lane in range(lanes):
        is_zero = has_zero and largest[lane] == 0  # all errors are 0
        best[start + lane] = 0 if is_zero else first[lane]
        most[lane] = -1.0 if is_zero or kept[lane] == 1 else most[lane]
    for c in range(asked.shape[0]):
        for lane in range(lanes):
            asked[c, start + lane] = sums[c * LANES + lane] <= most[lane]


@compiled
def first_least(errors: Doubles, asked: Flags, low: int, high: int, best: Bytes) -> None:
    """Of blocks low..high with anything `asked`: the first candidate of least error."""
    for b in range(low, high):
        if asked[best[b], b]:
            for c in range(best[b] + 1, errors.shape[0]):
                if asked[c, b] and errors[c, b] < errors[best[b], b]:
                    best[b] = c
