"""Compiled search over several paths: codes of a row that cost least together, not column by column.

Every row keeps the best `paths` beginnings of its codes (the M-algorithm). A column extends each by its two nearest
values, and the best of all are kept: by the squared error so far, and `price` for every bit that the codes take. Rows
are independent. Arithmetic is fp32: it chooses among codes, whose error is measured elsewhere.

Inside a block of columns paths carry only that block's targets (`near`), codes (`made`), decoded values (`drops`) and
where they stood when the block began (`origins`); each of these has two halves, of which `now` is the one in use. The
columns above are freed of the block when it ends (`_leave`).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]
Longs = NDArray[np.int64]
Real = float | np.float32
Best = tuple[Floats, Integers, Floats, Floats]
Paths = tuple[Floats, Floats, Floats, Integers, Floats]

_FAST = {"contract", "reassoc", "nsz", "arcp"}


@njit(nogil=True, cache=True)
def _kept(score: Real, path: int, code: Real, value: Real, count: int, best: Best) -> int:
    """Insert a candidate among the best, ascending by score; how many there are then."""
    scores, parents, codes, values = best
    most = scores.size
    if count == most and score >= scores[most - 1]:
        return count
    at = min(count, most - 1)
    while at > 0 and scores[at - 1] > score:
        scores[at], parents[at], codes[at], values[at] = scores[at - 1], parents[at - 1], codes[at - 1], values[at - 1]
        at -= 1
    scores[at], parents[at], codes[at], values[at] = score, path, code, value
    return min(count + 1, most)


@njit(nogil=True, cache=True, fastmath=_FAST)
def _extended_by_numbers(
    state: Paths, now: int, live: int, inside: int, unit: Real, value: Real, cost: Floats, price: Real, best: Best
) -> int:
    """The best of all paths with their two nearest numbers; how many."""
    near, sums, count, farthest = state[0], state[4], 0, cost.size - 1
    for path in range(live):
        wanted = near[now, path, inside] / unit if unit != 0.0 else np.float32(0.0)
        first = np.rint(wanted)
        second = first + np.float32(1.0) if wanted > first else first - np.float32(1.0)
        for number in (first, second):
            error = (wanted - number) * unit
            bits = cost[np.int64(min(abs(number), farthest))]
            score = sums[now, path] + error * error + price * bits
            count = _kept(score, path, number, number * value, count, best)
    return count


@njit(nogil=True, cache=True, fastmath=_FAST)
def _extended_by_table(
    state: Paths, now: int, live: int, inside: int, unit: Real, scale: Real, table: Floats, limits: Floats, best: Best
) -> int:
    """The best of all paths with their two nearest values of a table; how many."""
    near, sums, count, last = state[0], state[4], 0, table.size - 1
    for path in range(live):
        wanted = near[now, path, inside] / unit
        quotient = wanted / scale if scale != 0.0 else np.float32(0.0)
        place = np.searchsorted(limits, quotient)
        other = place + 1 if quotient > table[place] else place - 1
        for index in (place, other):
            if 0 <= index <= last:
                value = table[index] * scale
                error = (wanted - value) * unit
                score = sums[now, path] + error * error
                count = _kept(score, path, np.float32(index), value, count, best)
    return count


@njit(nogil=True, cache=True, fastmath=_FAST)
def _branch(state: Paths, now: int, count: int, inside: int, width: int, source: Floats, best: Best) -> None:
    """The paths that were kept, in the other half: freed of what the column took, within the block."""
    near, made, drops, origins, sums = state
    scores, parents, codes, values = best
    new = 1 - now
    for kept in range(count):
        path, value = parents[kept], values[kept]
        for place in range(inside):
            near[new, kept, place] = near[now, path, place] - value * source[place]
        for place in range(inside + 1, width):
            made[new, kept, place], drops[new, kept, place] = made[now, path, place], drops[now, path, place]
        made[new, kept, inside], drops[new, kept, inside] = codes[kept], value
        origins[new, kept], sums[new, kept] = origins[now, path], scores[kept]


@njit(nogil=True, cache=True)
def _enter(state: Paths, now: int, live: int, low: int, high: int, left: Floats) -> None:
    """The targets of a block for all paths."""
    for path in range(live):
        state[3][now, path] = path
        for at in range(low, high):
            state[0][now, path, at - low] = left[path, at]


@njit(nogil=True, cache=True, fastmath=_FAST)
def _leave(
    state: Paths,
    now: int,
    live: int,
    block: tuple[int, int],
    factor: Floats,
    left: Floats,
    fresh: Floats,
    codes: Floats,
    moved: Floats,
) -> None:
    """Targets of the columns above, freed of the block, and all codes so far, of the paths that are left."""
    low, high = block
    _, made, drops, origins, _ = state
    for path in range(live):
        origin = origins[now, path]
        for place in range(low):
            fresh[path, place] = left[origin, place]
        for at in range(low, high):
            value, source = drops[now, path, at - low], factor[at]
            for place in range(low):
                fresh[path, place] -= value * source[place]
            moved[path, at] = made[now, path, at - low]
        for at in range(high, codes.shape[1]):
            moved[path, at] = codes[origin, at]


@njit(nogil=True, cache=True)
def _room(paths: int, places: int, block: int) -> tuple[Paths, Best, Floats, Floats]:
    """Memory of one row's search."""
    kind = np.float32
    state = (
        np.zeros((2, paths, block), kind),
        np.zeros((2, paths, block), kind),
        np.zeros((2, paths, block), kind),
        np.zeros((2, paths), np.int32),
        np.zeros((2, paths), kind),
    )
    best = (np.zeros(paths, kind), np.zeros(paths, np.int32), np.zeros(paths, kind), np.zeros(paths, kind))
    return state, best, np.zeros((2, paths, places), kind), np.zeros((2, paths, places), kind)


@njit(nogil=True, cache=True, fastmath=_FAST)
def best_codes(
    targets: Floats,
    factor: Floats,
    values: Floats,
    scales: Floats,
    blocks: Longs,
    costs: tuple[Floats, Integers, Real],
    table: tuple[Floats, Floats],
    paths: int,
    block: int,
    rows: tuple[int, int],
    out: Integers,
) -> None:
    """Codes (rows, places) of rows `rows[0]` to `rows[1]` for `targets` (rows, places).

    A code is an index into the first of `table`, values ascending with limits between them, or where it is empty any
    whole number; it is decoded as that, times `values` (places,), times the scale of its row and block: `scales` (rows,
    blocks), `blocks` (places,). `costs`, of whole numbers: (classes, numbers), bits of the magnitude of a number, of
    the last one for all beyond; the class of each place; the price.
    """
    places = targets.shape[1]
    (bits, classes, price), (levels, limits) = costs, table
    state, best, left, codes = _room(paths, places, block)
    for row in range(rows[0], rows[1]):
        side, now, live, high = 0, 0, 1, places
        left[0, 0] = targets[row]
        state[4][now, 0] = 0.0
        while high > 0:
            low = max(0, high - block)
            _enter(state, now, live, low, high, left[side])
            for at in range(high - 1, low - 1, -1):
                value, inside, root = values[at] * scales[row, blocks[at]], at - low, factor[at, at]
                if levels.size:
                    live = _extended_by_table(state, now, live, inside, root, value, levels, limits, best)
                else:
                    cost = bits[classes[at]]
                    live = _extended_by_numbers(state, now, live, inside, root * value, value, cost, price, best)
                _branch(state, now, live, inside, high - low, factor[at, low:at], best)
                now = 1 - now
            _leave(state, now, live, (low, high), factor, left[side], left[1 - side], codes[side], codes[1 - side])
            side, high = 1 - side, low
        for at in range(places):
            out[row, at] = np.int32(codes[side, 0, at])
