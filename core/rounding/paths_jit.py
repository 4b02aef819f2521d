"""Compiled search over several paths: codes of a row that cost least together, not column by column.

Every row keeps the best `paths` beginnings of its codes (the M-algorithm). A column extends each by its two nearest
values, and the best of all are kept: by the squared error so far, and `price` for every bit that the codes take. Codes
are decided once all paths of a row have the same, and `LAG` columns later at the latest, by the best path of then. Rows
are independent. Arithmetic is fp32: it chooses among codes, whose error is measured elsewhere.

Columns are worked on in blocks, the last first. Inside a block a path has its targets (`near`), and a column notes
which paths it extended (`parents`) by what (`chosen`, `taken`); where the block ends, these are followed back. What is
not decided yet is *pending*: each path has codes and values of its own for it, and only targets of the next block are
freed of them. What is decided is taken out of all columns that are still to come, once for all paths. Some rows take
turns block by block, so that the factor is read once for all of them.

For speed, arrays are handed on whole and indexed with unsigned numbers (`core.tensors.kernels.cpu_jit`), and loops over
places have bounds that are not constant: those that are, the compiler takes apart before it can make them vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]
Longs = NDArray[np.int64]
Index = int | np.integer[Any]
Real = float | np.float32
Candidates = tuple[Floats, Floats, Floats, Integers, Integers]
Trace = tuple[Integers, Floats, Floats]
Pending = tuple[Floats, Floats]
Given = tuple[tuple[Floats, Floats, Longs, Floats], tuple[Floats, Integers, Real], tuple[Floats, Floats]]
Local = tuple[Floats, Floats, Index]

BLOCK = 32  # columns
LAG = 256  # columns
_TOGETHER = 16  # rows
_UNROLLED = 8  # scores that are compared with all at once
_FAST = {"contract", "reassoc", "nsz", "arcp"}
_U = np.uint64
Work = TypeVar("Work", bound=Callable[..., Any])


def _compiled(function: Work) -> Work:
    return cast("Work", njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST, forceinline=True)(function))


@_compiled
def _to_numbers(
    near: Floats,
    now: Index,
    inside: Index,
    sums: Floats,
    turn: Index,
    live: Index,
    unit: Real,
    value: Real,
    bits: Floats,
    kind: Index,
    price: Real,
    to: Candidates,
) -> int:
    """All paths with their two nearest numbers, the nearest ones first; how many."""
    scores, codes, values = to[0], to[1], to[2]
    farthest, inverse = np.float32(bits.shape[1] - 1), np.float32(1.0) / unit if unit != 0.0 else np.float32(0.0)
    for path in range(live):
        wanted = near[now, path, inside] * inverse
        first = np.rint(wanted)
        second = first + np.float32(1.0) if wanted > first else first - np.float32(1.0)
        nearer, farther = (wanted - first) * unit, (wanted - second) * unit
        at = np.uint32(min(abs(first), farthest))
        scores[path] = sums[turn, path] + nearer * nearer + price * bits[kind, at]
        at = np.uint32(min(abs(second), farthest))
        scores[live + path] = sums[turn, path] + farther * farther + price * bits[kind, at]
        codes[path], codes[live + path] = first, second
        values[path], values[live + path] = first * value, second * value
    return int(_U(2) * live)


@_compiled
def _to_table(
    near: Floats,
    now: Index,
    inside: Index,
    sums: Floats,
    turn: Index,
    live: Index,
    unit: Real,
    scale: Real,
    table: Floats,
    limits: Floats,
    to: Candidates,
) -> int:
    """All paths with their two nearest values of a table; how many."""
    scores, codes, values, count, last = to[0], to[1], to[2], int(live), table.size - 1
    for path in range(live):
        wanted = near[now, path, inside] / unit
        quotient = wanted / scale if scale != 0.0 else np.float32(0.0)
        place = np.searchsorted(limits, quotient)
        other = place + 1 if quotient > table[place] else place - 1
        error, at = (wanted - table[place] * scale) * unit, live + path
        scores[path], codes[path], values[path] = sums[turn, path] + error * error, place, table[place] * scale
        scores[at], codes[at], values[at] = np.inf, place, table[place] * scale
        if 0 <= other <= last:
            error = (wanted - table[other] * scale) * unit
            scores[at], codes[at], values[at] = sums[turn, path] + error * error, other, table[other] * scale
            count += 1
    return count


@_compiled
def _rank(count: Index, of: Candidates) -> None:
    """Places of the candidates, ascending by score, the first of equals first."""
    scores, order, before = of[0], of[3], of[4]
    whole, total = (count + _U(_UNROLLED - 1)) // _U(_UNROLLED), np.int64(0)
    for i in range(count, whole * _U(_UNROLLED)):
        scores[i] = np.inf
    for i in range(count):
        before[i] = 0
    for part in range(whole):
        j = part * _U(_UNROLLED)
        a, b, c, d = scores[j], scores[j + _U(1)], scores[j + _U(2)], scores[j + _U(3)]
        e, f, g, h = scores[j + _U(4)], scores[j + _U(5)], scores[j + _U(6)], scores[j + _U(7)]
        for i in range(count):
            mine = scores[i]
            less = np.int32(a < mine) + np.int32(b < mine) + np.int32(c < mine) + np.int32(d < mine)
            before[i] += less + np.int32(e < mine) + np.int32(f < mine) + np.int32(g < mine) + np.int32(h < mine)
    for i in range(count):
        total += np.int64(before[i])
    if total != np.int64(count * (count - _U(1)) // _U(2)):  # there are equals
        for i in range(count):
            for other in range(i):
                before[i] += np.int32(scores[other] == scores[i])
    for i in range(count):
        order[_U(before[i])] = i


@_compiled
def _extend(
    near: Floats,
    now: Index,
    inside: Index,
    sums: Floats,
    turn: Index,
    live: Index,
    kept: Index,
    local: Floats,
    of: Candidates,
    trace: Trace,
) -> None:
    """The candidates that are kept become the paths, in the other half of `near`, freed of what the column took."""
    (scores, codes, values, order, _), (parents, chosen, taken) = of, trace
    for path in range(kept):
        at = _U(order[path])
        parents[inside, path] = at if at < live else at - live
        chosen[inside, path], taken[inside, path], sums[turn, path] = codes[at], values[at], scores[at]
    for path in range(kept):
        parent, value = _U(parents[inside, path]), taken[inside, path]
        for place in range(inside):
            near[_U(1) - now, path, place] = near[now, parent, place] - value * local[inside, place]


@_compiled
def _near_by(factor: Floats, low: Index, high: Index, held: Index, local: Floats) -> None:
    """What a block needs of the factor, in rows that lie together: of its columns and of the `held` ones behind."""
    for at in range(high - low + held):
        for place in range(high - low if at >= high - low else at):
            local[at, place] = factor[low + at, low + place]


@_compiled
def _enter(
    near: Floats, left: Floats, turn: Index, live: Index, low: Index, width: Index, held: Index, state: Local
) -> None:
    """The targets of a block, freed of what each path has pending: the `held` columns behind it."""
    (local, pending, side), whole = state, held // _U(4) * _U(4)
    for path in range(live):
        for place in range(width):
            near[_U(0), path, place] = left[turn, low + place]
        for at in range(_U(0), whole, _U(4)):
            a, b = pending[side, turn, path, at], pending[side, turn, path, at + _U(1)]
            c, d = pending[side, turn, path, at + _U(2)], pending[side, turn, path, at + _U(3)]
            row = width + at
            for place in range(width):
                taken = a * local[row, place] + b * local[row + _U(1), place]
                taken += c * local[row + _U(2), place] + d * local[row + _U(3), place]
                near[_U(0), path, place] -= taken
        for at in range(whole, held):
            for place in range(width):
                near[_U(0), path, place] -= pending[side, turn, path, at] * local[width + at, place]


@_compiled
def _follow(trace: Trace, turn: Index, live: Index, width: Index, held: Index, pending: Pending, side: Index) -> None:
    """To the other half what the paths have pending after a block: its columns, and behind them their origins'."""
    (parents, chosen, taken), (codes, values), new = trace, pending, _U(1) - side
    for path in range(live):
        at = _U(path)
        for inside in range(width):
            codes[new, turn, path, inside], values[new, turn, path, inside] = chosen[inside, at], taken[inside, at]
            at = _U(parents[inside, at])
        for place in range(held):
            codes[new, turn, path, width + place] = codes[side, turn, at, place]
        for place in range(held):
            values[new, turn, path, width + place] = values[side, turn, at, place]


@_compiled
def _agreed(codes: Floats, side: Index, turn: Index, live: Index, held: Index) -> Any:
    """How many of the oldest pending codes are the same in all paths."""
    for back in range(held):
        place = held - back - _U(1)
        for path in range(_U(1), live):
            if codes[side, turn, path, place] != codes[side, turn, _U(0), place]:
                return back
    return held


@_compiled
def _agreeing(pending: Pending, side: Index, turn: Index, sums: Floats, live: Index, first: Index, last: Index) -> int:
    """Only the paths that have the best one's pending codes `first` to `last`; how many."""
    (codes, values), kept, best = pending, _U(0), sums[turn, _U(0)]
    for path in range(live):
        is_same = True
        for place in range(first, last):
            is_same &= codes[side, turn, path, place] == codes[side, turn, _U(0), place]
        if is_same:
            sums[turn, kept] = sums[turn, path] - best
            for place in range(first if kept != path else _U(0)):
                codes[side, turn, kept, place] = codes[side, turn, path, place]
                values[side, turn, kept, place] = values[side, turn, path, place]
            kept += _U(1)
    return int(kept)


@_compiled
def _free(
    left: Floats,
    turn: Index,
    to: Index,
    factor: Floats,
    row: Index,
    pending: Floats,
    side: Index,
    first: Index,
    last: Index,
) -> None:
    """Columns up to `to`, freed of the best path's pending `first` to `last`, the factor's rows from `row` on."""
    whole = first + (last - first) // _U(4) * _U(4)
    for at in range(first, whole, _U(4)):
        a, b = pending[side, turn, _U(0), at], pending[side, turn, _U(0), at + _U(1)]
        c, d = pending[side, turn, _U(0), at + _U(2)], pending[side, turn, _U(0), at + _U(3)]
        from_ = row + at - first
        for place in range(to):
            taken = a * factor[from_, place] + b * factor[from_ + _U(1), place]
            taken += c * factor[from_ + _U(2), place] + d * factor[from_ + _U(3), place]
            left[turn, place] -= taken
    for at in range(whole, last):
        for place in range(to):
            left[turn, place] -= pending[side, turn, _U(0), at] * factor[row + at - first, place]


@_compiled
def _room(paths: int, places: int) -> tuple[Floats, Floats, Floats, Pending, Floats, Candidates, Trace]:
    """Memory of the rows that take turns."""
    kind, most = np.float32, 2 * paths + _UNROLLED
    left, sums, local = (
        np.zeros((_TOGETHER, places), kind),
        np.zeros((_TOGETHER, paths), kind),
        np.zeros((LAG + BLOCK, BLOCK), kind),
    )
    size = (2, _TOGETHER, paths, LAG + BLOCK)
    scores = (np.zeros(most, kind), np.zeros(most, kind), np.zeros(most, kind))
    found = (*scores, np.zeros(most, np.int32), np.zeros(most, np.int32))
    trace = (np.zeros((BLOCK, paths), np.int32), np.zeros((BLOCK, paths), kind), np.zeros((BLOCK, paths), kind))
    near = np.zeros((2, paths, BLOCK), kind)
    return left, sums, local, (np.zeros(size, kind), np.zeros(size, kind)), near, found, trace


@_compiled
def _search(
    row: Index,
    turn: Index,
    low: Index,
    width: Index,
    live: Index,
    given: Given,
    state: tuple[Floats, Floats, Floats],
    found: Candidates,
    trace: Trace,
) -> Any:
    """The columns of a block, from the last one on; how many paths there are then."""
    (values, scales, blocks, units), (bits, classes, price), (levels, limits) = given
    (near, sums, local), now = state, _U(0)
    most = _U(sums.shape[1])
    for back in range(width):
        inside = width - back - _U(1)
        at = low + inside
        value, where = values[at] * scales[row, _U(blocks[at])], (near, now, inside, sums, turn, live)
        if levels.size:
            many = _U(_to_table(*where, units[at], value, levels, limits, found))
        else:
            many = _U(_to_numbers(*where, units[at] * value, value, bits, _U(classes[at]), price, found))
        kept = min(many, most)
        _rank(_U(2) * live, found)
        _extend(*where, kept, local, found, trace)
        live, now = kept, _U(1) - now
    return live


@_compiled
def _decide(
    codes: Floats, side: Index, turn: Index, live: Index, held: Index, low: Index, out: Integers, row: Index
) -> Any:
    """How many pending places are left once the oldest are decided; the best path's codes of these to `out`."""
    decided = _agreed(codes, side, turn, live, held)
    if low == _U(0):
        decided = held
    elif held > decided + _U(LAG):
        decided = held - _U(LAG)
    for place in range(held - decided, held):
        out[row, low + place] = np.int32(codes[side, turn, _U(0), place])
    return held - decided


@_compiled
def best_codes(
    targets: Floats,
    factor: Floats,
    values: tuple[Floats, Floats, Longs, Floats],
    costs: tuple[Floats, Integers, Real],
    table: tuple[Floats, Floats],
    paths: int,
    rows: tuple[int, int],
    out: Integers,
) -> None:
    """Codes (rows, places) of rows `rows[0]` to `rows[1]` for `targets` (rows, places).

    A code is an index into the first of `table`, values ascending with limits between them, or where it is empty any
    whole number; it is decoded as that, times the first of `values` (places,), times the scale of its row and block:
    scales (rows, blocks), blocks (places,); the last are the factor's diagonal (places,). `costs`, of whole numbers:
    (classes, numbers), bits of the magnitude of a number, of the last one for all beyond; the class of each place; the
    price.
    """
    left, sums, local, pending, near, found, trace = _room(paths, targets.shape[1])
    lives, helds = np.empty(_TOGETHER, np.uint64), np.empty(_TOGETHER, np.uint64)
    codes, drops = pending
    for start in range(_U(rows[0]), _U(rows[1]), _U(_TOGETHER)):
        count, high, side = min(_U(_TOGETHER), _U(rows[1]) - start), _U(targets.shape[1]), _U(0)
        for turn in range(count):
            left[turn], lives[turn], helds[turn], sums[turn, 0] = targets[start + turn], 1, 0, 0.0
        while high > _U(0):
            low, new = high - min(high, _U(BLOCK)), _U(1) - side
            width = high - low
            _near_by(factor, low, high, helds[:count].max(), local)
            for turn in range(count):
                row, live, held = start + turn, lives[turn], helds[turn]
                _enter(near, left, turn, live, low, width, held, (local, drops, side))
                live = _search(row, turn, low, width, live, (values, costs, table), (near, sums, local), found, trace)
                _follow(trace, turn, live, width, held, pending, side)
                held += width
                first = _decide(codes, new, turn, live, held, low, out, row)
                lives[turn], helds[turn] = _agreeing(pending, new, turn, sums, live, first, held), first
                _free(left, turn, low, factor, low + first, drops, new, first, held)
            side, high = new, low
