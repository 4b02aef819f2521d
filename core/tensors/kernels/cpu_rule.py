"""Which of the compiled loops rounds to a table of values, and the numbers that it needs.

All loops give the index #{k : x > limit k}; what differs is their speed. `GRID` and `FLOAT` divide in fp64 and round,
for exact rules of evenly spaced values and of floating-point patterns; `COUNT` compares with the limits themselves, in
groups, and is the fastest where one group suffices; `GUIDE` looks up where the limits near a quotient begin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from core.formats.elements import ElementTable

_GROUP = 15  # limits of one step of COUNT
_FEW = 64  # up to this many values, counting is faster than a guide
_CELLS = 4096
_MARGIN = 0.01  # of a cell: far more than what rounding of quotients and limits moves them


class Method(Enum):
    """The loop that rounds."""

    COUNT = "count"
    GRID = "grid"
    FLOAT = "float"
    GUIDE = "guide"


@dataclass(frozen=True, eq=False)
class RoundingRule:
    """Arrays for the loops. `zero`: what they give where the scale is 0.

    `middle`, `first`: how indices, if the loop gives those, become codes (`cpu_jit.translate`); `stored`: by a table.
    `numbers`: GRID and GUIDE as the loops' `rule`; FLOAT mantissa bits, least exponent, last pattern, sign.
    `quotients`: FLOAT rounds the fp32 quotient instead of the real one.
    """

    method: Method
    limits: NDArray[np.float64]
    upper_on_tie: NDArray[np.int8]
    exact: bool
    zero: int
    stored: NDArray[np.uint8] | None
    numbers: NDArray[np.float64]
    guide: NDArray[np.int32]
    middle: int = -1
    first: int = 0
    quotients: bool = False


@lru_cache(maxsize=64)
def rounding_rule(
    table: ElementTable, *, exact: bool, stored: tuple[int, ...] | None, quotients: bool = False
) -> RoundingRule:
    """The rule for a table of at most 256 values.

    Not `exact`: limits are fl32(limit * scale), the rule of codebooks. `exact`: the real products, with
    `table.upper_on_tie` (integers, floats). `stored`: the stored code of each index, None where it is the index.
    `quotients`: the nearest to fl32(x / scale), which only floats have.
    """
    if len(table.limits) <= _GROUP and not quotients:
        return _translated(_rule(Method.COUNT, table, exact, (), zero=table.zero), stored)
    grid = _grid(table, stored) if exact and not quotients else None
    if grid is not None:
        return _rule(Method.GRID, table, exact, grid, zero=table.zero + int(grid[3]))
    pattern = _float(table, stored) if exact else None
    if pattern is not None:
        return replace(_rule(Method.FLOAT, table, exact, pattern, zero=0), quotients=quotients)
    if exact or len(table.values) <= _FEW:
        return _translated(_rule(Method.COUNT, table, exact, (), zero=table.zero), stored)
    return _translated(_guided(table), stored)


def _rule(method: Method, table: ElementTable, exact: bool, numbers: tuple[float, ...], zero: int) -> RoundingRule:
    return RoundingRule(
        method,
        np.array(table.limits, np.float64),
        np.array(table.upper_on_tie, np.int8),
        exact,
        zero,
        None,
        np.array(numbers, np.float64),
        np.zeros(1, np.int32),
    )


def _translated(rule: RoundingRule, stored: tuple[int, ...] | None) -> RoundingRule:
    """The rule with the way from its indices to codes."""
    if stored is None:
        return rule
    count, sign = len(stored), _sign_of(stored)
    if stored == tuple(range(stored[0], stored[0] + count)):
        return replace(rule, first=stored[0])
    if sign is not None:
        return replace(rule, middle=count // 2, first=sign)
    return replace(rule, stored=np.array(stored, np.uint8))


def _sign_of(stored: tuple[int, ...]) -> int | None:
    """The sign bit, if codes are sign and magnitude, and zero has no sign."""
    middle = len(stored) // 2
    sign = stored[0] - middle
    return sign if stored == (*range(sign + middle, sign, -1), *range(len(stored) - middle)) else None


def _grid(table: ElementTable, stored: tuple[int, ...] | None) -> tuple[float, ...] | None:
    """Numbers of GRID, if limits are a power of two apart at halves or whole numbers of it and ties follow one rule."""
    limits, offset = np.array(table.limits), 0 if stored is None else stored[0]
    if len(limits) < 2 or (stored is not None and stored != tuple(range(offset, offset + len(stored)))):
        return None
    step = float(limits[1] - limits[0])
    places = limits / step
    is_even_spaced = np.array_equal(places, places[0] + np.arange(len(limits)))
    if not is_even_spaced or np.frexp(step)[0] != 0.5 or places[0] * 2 != np.rint(places[0] * 2):
        return None
    upper, bounds = np.array(table.upper_on_tie), (float(offset), float(offset + len(limits)))
    for before in (0.0,) if places[0] != np.rint(places[0]) else (0.5, -0.5):
        rounded = np.rint(places + before)
        after = float(1 + offset - np.rint(places[0] + 0.25 + before))
        if np.array_equal(rounded + after, np.arange(len(limits)) + offset + upper):
            return (1 / step, 2 * before, after + (before > 0), *bounds)
    return None


def _float(table: ElementTable, stored: tuple[int, ...] | None) -> tuple[float, ...] | None:
    """Numbers of FLOAT, if values are the patterns of a float and codes are sign and magnitude."""
    count = len(table.values)
    zero = count // 2
    positive = np.array(table.values[zero:])
    if stored is None or count < 3 or tuple(-positive[:0:-1]) + tuple(positive) != table.values:
        return None
    sign = _sign_of(stored)
    if sign is None:
        return None
    if table.upper_on_tie != tuple((index + 1 - zero) % 2 == 0 for index in range(count - 1)):
        return None
    for mantissa_bits in range(8):
        least = int(np.frexp(positive[1])[1]) - 1 + mantissa_bits
        if np.array_equal(positive, _patterns(len(positive), mantissa_bits, least)):
            return (float(mantissa_bits), float(least), float(zero), float(sign))
    return None


def _patterns(count: int, mantissa_bits: int, least: int) -> NDArray[np.float64]:
    """The numbers of the first patterns of a float whose smallest normal number is 2^least."""
    exponent, mantissa = np.divmod(np.arange(count), 1 << mantissa_bits)
    significand = np.where(exponent == 0, mantissa, mantissa + (1 << mantissa_bits))
    powers = np.maximum(exponent, 1) - 1 + least - mantissa_bits
    return np.asarray(np.ldexp(significand.astype(np.float64), powers), np.float64)


def _guided(table: ElementTable) -> RoundingRule:
    limits = np.array(table.limits)
    per_unit = _CELLS / (limits[-1] - limits[0])
    edges = limits[0] + np.arange(_CELLS + 1) / per_unit
    guide = np.searchsorted(limits, edges[:-1] - _MARGIN / per_unit).astype(np.int32)
    most = np.searchsorted(limits, edges[1:] + _MARGIN / per_unit) - guide
    rule = _rule(Method.GUIDE, table, False, (limits[0], per_unit, float(most.max())), table.zero)
    return replace(rule, limits=np.append(limits, np.inf), guide=guide)
