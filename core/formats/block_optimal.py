"""Codes for Normal weights in absmax blocks: AF4, AF4*, BOF4, BOF4-S, any block size, any even number of codes.

Weights are independent draws of N(0, 1), a block is divided by its largest magnitude (absolute) or by its largest
element with its sign (signed), and the levels minimise an expected error of the quotients X = W / M:

    absmax_float    E|X - q(X)|: AF4 (arXiv 2306.06965) as published, and AF4*, the true optimum
    block_optimal   E|W - q(W)|^p, the error of the weights, p = 1 or 2: BOF4 and BOF4-S (arXiv 2505.06653)

0 is a level of index codes / 2 - 1 (7 of 16), +1 is the last one; -1 is the first one but for signed scales. Because 0
is fixed, the halves are independent problems, and BOF4 and BOF4-S have the same positive half bit for bit.

Promise: tables are solved, never tabulated and never sampled: ascending, stationary to 1e-10, or InvalidFormat.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from core.errors import InvalidFormat
from core.formats.block_lloyd import MAX_CODES, Boundary, Metric, solve_levels, spread_levels
from core.formats.limits import block_mixture

Rule = Literal["published", "l1"]

_ZERO, _ONE = Boundary(0.0, True), Boundary(1.0, True)
_LEAST_BLOCK = 2


def absmax_float(codes: int, block: int, rule: Rule) -> tuple[float, ...]:
    """The `codes` levels (even, 4 to 1024) for blocks of `block` weights by E|X - q(X)|, ascending from -1 to 1.

    `rule` "published": the cells of the two levels next to 0 end at 0, as in the released tables, so that the level 0
    has no cell; "l1": they end half-way to 0, which is the optimum (AF4*). Every level is the median of its cell.
    """
    _check(codes)
    inner = Boundary(0.0, rule != "published")
    half = codes // 2
    return _joined(_half(half - 2, block, 0, inner, _ONE, "mae"), _half(half - 1, block, 0, inner, _ONE, "mae"))


def block_optimal(codes: int, block: int, *, signed: bool, metric: Metric) -> tuple[float, ...]:
    """The `codes` levels (even, 4 to 1024) for blocks of `block` weights by E|W - q(W)|^p, ascending, p = 1 or 2.

    `signed`: the scale has the sign of the largest element, so that -1 is not needed and the first level is free.
    Levels are the means (`mse`) or medians (`mae`) of their cells, with every block weighted by M^p.
    """
    _check(codes)
    half, power = codes // 2, 2 if metric == "mse" else 1
    positive = _half(half - 1, block, power, _ZERO, _ONE, metric)
    if signed:
        return _joined(_half(half - 1, block, power, _ZERO, Boundary(1.0, False), metric)[:-1], positive)
    return _joined(_half(half - 2, block, power, _ZERO, _ONE, metric), positive)


@lru_cache(maxsize=512)
def _half(count: int, block: int, power: int, inner: Boundary, outer: Boundary, metric: Metric) -> tuple[float, ...]:
    """`count` free levels in (0, 1), ascending, and 1; blocks weighted by M^power.

    Blocks of one weight, which any code with a 1 represents exactly, are treated as blocks of two.
    """
    law = block_mixture("normal", None, max(block, _LEAST_BLOCK), power)
    start = spread_levels(law, count, inner, outer, metric)
    return (*solve_levels(law, start, inner, outer, metric).tolist(), 1.0)


def _joined(negative: tuple[float, ...], positive: tuple[float, ...]) -> tuple[float, ...]:
    return (*(-one for one in reversed(negative)), 0.0, *positive)


def _check(codes: int) -> None:
    if codes % 2 or not 4 <= codes <= MAX_CODES:
        raise InvalidFormat(f"a block code of {codes} codes", hint=f"an even number from 4 to {MAX_CODES}")
