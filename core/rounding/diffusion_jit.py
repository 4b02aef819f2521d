"""Compiled loops that choose levels one after another along a row and pass on what each leaves over.

They work on tiles of rows in fp64, on the columns `low` to `high` of one block; what a block owes to columns outside it
is one product of matrices, made by the caller. `rule`: values (fp32, for scale 1), their limits, whether a number at
a limit takes the upper value, whether limits times scales are ROUNDED to fp32 or EXACT, or QUOTIENTS in fp32 compared
with limits, and the index where the scale is 0: so indices are those of rounding to nearest, ties included
(`core.tensors.indices`). `scales` (rows, blocks), `blocks` (columns,): the block of each column. Decoded is fl32(value
* scale).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.rounding.levels import QUOTIENTS, ROUNDED
from core.tensors.kernels.cpu_jit import Doubles, Floats, Ints, compiled, inlined

_FEW = 16  # limits that are all compared with faster than they are searched
Longs = NDArray[np.int64]
Rule = tuple[Floats, Doubles, NDArray[np.bool_], int, int]


@inlined
def place_of(number: float, scale: float, rule: Rule) -> Any:
    """The index of the level nearest to a number."""
    _, limits, upper_on_tie, kind, zero = rule
    if scale == 0.0:
        return np.int32(zero)
    magnitude, turned = abs(np.float64(scale)), np.float64(number if scale > 0.0 else -number)
    if kind == QUOTIENTS:
        turned = np.float64(np.float32(turned) / np.float32(magnitude))
        magnitude = np.float64(1.0)
    low, high = 0, limits.size
    while low < high:
        middle = (low + high) // 2
        limit = limits[middle] * magnitude
        if kind == ROUNDED:
            limit = np.float64(np.float32(limit))
        if turned > limit or (turned == limit and upper_on_tie[middle]):
            low = middle + 1
        else:
            high = middle
    return np.int32(low)


@inlined
def places_of(numbers: Doubles, scales: Floats, rule: Rule, turned: Doubles, found: Ints) -> None:
    """`place_of` of numbers (rows,) that have a scale each, to `found`; `turned` (rows,) is room to work in."""
    _, limits, upper_on_tie, kind, zero = rule
    if limits.size > _FEW:
        for row in range(found.size):
            found[row] = place_of(numbers[row], scales[row], rule)
        return
    for row in range(found.size):
        number = numbers[row] if scales[row] > 0.0 else -numbers[row]
        if kind == QUOTIENTS:
            number = np.float64(np.float32(number) / abs(scales[row]))
        turned[row], found[row] = number, 0
    for k in range(limits.size):
        for row in range(found.size):
            limit = limits[k] if kind == QUOTIENTS else limits[k] * abs(np.float64(scales[row]))
            if kind == ROUNDED:
                limit = np.float64(np.float32(limit))
            found[row] += np.int32((turned[row] > limit) | ((turned[row] == limit) & upper_on_tie[k]))
    for row in range(found.size):
        if scales[row] == 0.0:
            found[row] = zero


@compiled
def nearest_places(numbers: Doubles, scales: Floats, blocks: Longs, rule: Rule, indices: Ints) -> None:
    """Indices (rows, columns) of the levels nearest to `numbers`."""
    for row in range(numbers.shape[0]):
        for t in range(numbers.shape[1]):
            indices[row, t] = place_of(numbers[row, t], scales[row, blocks[t]], rule)


@compiled
def spread_block(
    wanted: Doubles,
    weights: Doubles,
    ratios: Doubles,
    scales: Floats,
    blocks: Longs,
    rule: Rule,
    low: int,
    high: int,
    indices: Ints,
    errors: Doubles,
) -> None:
    """Round the places `low` to `high` of `wanted`; add the error of t times ratios[t, s] to the later ones s of these.

    Arrays are transposed, (places, rows), and so are `scales` (blocks, rows); `blocks` (places,): the block of each. An
    error is the weight less what it is decoded as: `errors` (high - low, rows).
    """
    values, turned = rule[0], np.empty(wanted.shape[1])
    for t in range(low, high):
        scale, here, found = scales[blocks[t]], errors[t - low], indices[t]
        places_of(wanted[t], scale, rule, turned, found)
        for row in range(wanted.shape[1]):
            here[row] = weights[t, row] - np.float64(np.float32(values[found[row]] * scale[row]))
        for s in range(t + 1, high):
            ratio, into = ratios[t, s], wanted[s]
            for row in range(wanted.shape[1]):
                into[row] += ratio * here[row]


@compiled
def descend_block(
    slopes: Doubles,
    hessian: Doubles,
    damping: float,
    scales: Floats,
    blocks: Longs,
    rule: Rule,
    low: int,
    high: int,
    indices: Ints,
    moves: Doubles,
) -> int:
    """Move each column to the level at which the cost is least, all others held; answers how many were moved.

    `slopes` (rows, columns): half the derivative of the cost by the decoded weights, kept up to date within the block.
    `hessian`: half the second derivative but for `damping` on its diagonal. `moves` (rows, high - low): by how much.
    """
    values, moved = rule[0], 0
    for row in range(slopes.shape[0]):
        for t in range(low, high):
            moves[row, t - low] = 0.0
            curve = hessian[t, t] + damping
            if curve <= 0.0:
                continue
            scale = scales[row, blocks[t]]
            held = np.float64(np.float32(values[indices[row, t]] * scale))
            found = place_of(held - slopes[row, t] / curve, scale, rule)
            move = np.float64(np.float32(values[found] * scale)) - held
            if move * (2.0 * slopes[row, t] + move * curve) >= 0.0:
                continue
            indices[row, t], moves[row, t - low], moved = found, move, moved + 1
            for s in range(low, high):
                slopes[row, s] += move * hessian[t, s]
            slopes[row, t] += move * damping
    return moved


@compiled
def pass_on(slopes: Doubles, hessian: Doubles, low: int, high: int, moves: Doubles) -> None:
    """slopes += moves x hessian[low:high] for the columns outside the block, where few have moved."""
    columns = slopes.shape[1]
    for row in range(slopes.shape[0]):
        for t in range(low, high):
            move = moves[row, t - low]
            if move == 0.0:
                continue
            for s in range(low):
                slopes[row, s] += move * hessian[t, s]
            for s in range(high, columns):
                slopes[row, s] += move * hessian[t, s]
