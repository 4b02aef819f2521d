"""The squared errors of blocks under candidate scales on the CPU, compiled by numba when first asked for.

`block_errors` equals the readable reference, `core.tensors.search.block_error` of each candidate, bit for bit: the same
limits, the same fp32 decoded values, and fp64 squares added in the same order. No codes are written, and nothing beyond
a few KiB and the errors themselves is allocated. Blocks are independent, so threads change nothing.

Numbers are compared as keys: the bit pattern's magnitude, negative for negative numbers. Keys order as numbers do, and
both zeros are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from core.formats import integer
from core.formats.elements import ElementTable
from core.recipe.tensor_format import TensorFormat
from core.tensors.kernels.cpu_jit import compiled

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Places = NDArray[np.uint32]
Doubles = NDArray[np.float64]
Grid = tuple[float, float, float, float]
Table = tuple[Floats, Doubles, NDArray[np.bool_]]
Rules = tuple[bool, bool, bool]
Part = Callable[[int, int], None]  # works on blocks low..high

SEGMENT = 4096  # elements whose squares are added on their own
GROUP = 8  # limits that one step compares with
FEW = 48  # up to this many limits, comparing with all of them is faster than searching
_MAGNITUDE = 0x7FFFFFFF


def supports(blocks: torch.Tensor, table: ElementTable) -> bool:
    """Whether `block_errors` takes these blocks: fp32 on the CPU and at most 256 values."""
    return blocks.device.type == "cpu" and blocks.dtype is torch.float32 and len(table.values) <= 256


def block_errors(
    blocks: torch.Tensor, scales: torch.Tensor, fmt: TensorFormat, table: ElementTable, *, quotients: bool
) -> torch.Tensor:
    """Squared errors of blocks (count, width) fp32 under decoded scales (candidates, count) fp32, as fp64 like them.

    `quotients`: whether fl32(x / scale) is rounded and not the real quotient.
    """
    out = torch.empty(scales.shape, dtype=torch.float64)
    arrays = blocks.contiguous().numpy(), scales.contiguous().numpy(), out.numpy()
    work = _integer_work(fmt, *arrays) if fmt.family == "int" else _table_work(fmt, table, quotients, *arrays)
    threads = min(torch.get_num_threads(), max(len(blocks), 1))
    if threads == 1:
        work(0, len(blocks))
        return out
    bounds = [len(blocks) * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))
    return out


def _integer_work(fmt: TensorFormat, blocks: Floats, scales: Floats, out: Doubles) -> Part:
    lowest, step = integer.lowest(fmt.mode, fmt.codes), integer.step(fmt.mode, fmt.codes)
    grid = (step, lowest - int(lowest), lowest + (1.0 if fmt.mode == "mx" else 0.0), lowest + fmt.codes - 1)
    return lambda low, high: integer_errors(blocks, scales, grid, low, high, out)


def _table_work(
    fmt: TensorFormat, table: ElementTable, quotients: bool, blocks: Floats, scales: Floats, out: Doubles
) -> Part:
    count = len(table.limits)
    filled = -(-count // GROUP) * GROUP
    filled = filled if filled <= FEW else (1 << count.bit_length()) - 1
    limits, values = np.full(filled, np.inf), np.zeros(filled + 1, dtype=np.float32)
    on_tie = np.zeros(filled, dtype=np.bool_)
    limits[:count], on_tie[:count], values[: count + 1] = table.limits, table.upper_on_tie, table.values
    given = values, limits, on_tie
    rules = (not fmt.is_codebook, quotients, fmt.base_statistic == "signmax")
    return lambda low, high: table_errors(blocks, scales, given, rules, low, high, out)


@compiled
def integer_errors(blocks: Floats, scales: Floats, grid: Grid, low: int, high: int, out: Doubles) -> None:
    """Of blocks low..high. `grid`: step, shift, first, last; values (first, ..., last) * step, half to even."""
    width = blocks.shape[1]
    part, squares = np.empty(min(width, SEGMENT), np.float32), np.empty(min(width, SEGMENT))
    for b in range(low, high):
        out[:, b] = 0.0
        for start in range(0, width, SEGMENT):
            size = min(SEGMENT, width - start)
            part[:size] = blocks[b, start : start + size]
            for c in range(scales.shape[0]):
                if scales[c, b] == 0:
                    _squares(part, size, squares)
                else:
                    _integer_squares(part, size, scales[c, b], grid, squares)
                out[c, b] += _halved(squares, size)


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
def table_errors(blocks: Floats, scales: Floats, table: Table, rules: Rules, low: int, high: int, out: Doubles) -> None:
    """Of blocks low..high. `table`: values, the limits between them, whether a number on a limit lies above it.

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
        out[:, b] = 0.0
        for start in range(0, width, SEGMENT):
            size = min(SEGMENT, width - start)
            part[:size] = blocks[b, start : start + size]
            for c in range(scales.shape[0]):
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
