"""Which numbers get symbols of their own: all of them, or a window with an escape for the rest.

Any choice decodes; this one weighs size, and speed where two choices are nearly equal: tables of fewer symbols are
faster, and a number that hardly occurs takes more from the others as a symbol than it costs as an escape.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from core.tensors.entropy import layout
from core.tensors.entropy.loops_jit import Longs, Numbers
from core.tensors.entropy.models import MOST_SYMBOLS, SymbolModel, expected_bits, fitted_model, normalised

_WINDOWS = (32, 64, 128, 256, MOST_SYMBOLS)
_DENSE = 1 << 16  # spans up to this are counted in an array
_PRECISION = 14  # of the estimates
_RARE = tuple(4**i for i in range(9))  # fewer of a number than this may not deserve a symbol
_SYMBOL_BITS = 5  # of a symbol in the model, about
_FITTED = 4  # windows that are tried
_LARGE, _WORTH = 1 << 18, 1.0001  # of so many numbers a smaller window may cost this much more


def counted(codes: Numbers) -> tuple[Longs, Longs]:
    """The numbers that occur, ascending, and how often each does."""
    low, high = int(codes.min()), int(codes.max())
    if high - low >= _DENSE:
        values, counts = np.unique(codes, return_counts=True)
        return values.astype(np.int64), counts.astype(np.int64)
    from core.tensors.entropy.tables_jit import count_codes

    counts = np.zeros(high - low + 1, np.int64)
    count_codes(codes, low, counts)
    used = np.flatnonzero(counts)
    return used + low, counts[used]


def histogram_model(codes: Numbers) -> SymbolModel:
    """The model of these numbers, with an escape where that is shorter or needed."""
    return model_of_counts(*counted(codes))


def model_of_counts(values: Longs, counts: Longs, rest: int | None = None) -> SymbolModel:
    """The same for numbers that were counted; `rest`: how many others there are, so that there must be an escape."""
    windows = sorted(_windows(values, counts, rest), key=lambda window: _cost(values, counts, rest, *window))
    found = [_fitted(values, counts, rest, *window) for window in windows[:_FITTED]]
    least = min(bits for _, bits in found)
    worth = _WORTH if counts.sum() >= _LARGE else 1.0
    good = [(model.size, bits, model) for model, bits in found if bits <= least * worth]
    return min(good, key=lambda one: one[:2])[2]


def _fitted(values: Longs, counts: Longs, rest: int | None, low: int, high: int) -> tuple[SymbolModel, float]:
    """The best model of a window, and all bits that go with it."""
    dense = _dense(values, counts, rest, low, high)
    model = fitted_model(low, dense, has_escape=dense.size > high - low)
    bits = expected_bits(model, dense) + 8 * len(layout.model_bytes(model))
    return model, bits + _escape_bits(values, dense, low, high)


def _windows(values: Longs, counts: Longs, rest: int | None) -> list[tuple[int, int]]:
    """Half-open ranges that are worth a look."""
    found = []
    for times in _RARE:
        frequent = values[counts >= times]
        if frequent.size:
            found.append((int(frequent[0]), int(frequent[-1]) + 1))
    is_all = rest is None and found[0][1] - found[0][0] == MOST_SYMBOLS
    found = [(low, high) for low, high in found if high - low < MOST_SYMBOLS] + found[:1] * is_all
    sums = np.concatenate([[0], np.cumsum(counts)])
    for size in _WINDOWS:
        ends = np.searchsorted(values, values + (size - 1))
        start = int(np.argmax(sums[ends] - sums[: values.size]))
        found.append((int(values[start]), int(values[ends[start] - 1]) + 1))
    return list(dict.fromkeys(found))


def _dense(values: Longs, counts: Longs, rest: int | None, low: int, high: int) -> Longs:
    """Counts of low .. high - 1, then of all others where there are any."""
    inside = (values >= low) & (values < high)
    dense: NDArray[np.int64] = np.zeros(high - low, np.int64)
    dense[values[inside] - low] = counts[inside]
    others = int(counts[~inside].sum()) + (rest or 0)
    return np.append(dense, others) if others or rest is not None else dense


def _cost(values: Longs, counts: Longs, rest: int | None, low: int, high: int) -> float:
    """Bits, about, of all numbers coded by that window, and of its model."""
    dense = _dense(values, counts, rest, low, high)
    used = dense > 0
    bits = _PRECISION - np.log2(normalised(dense, _PRECISION)[used])
    return float(np.dot(dense[used], bits)) + _escape_bits(values, dense, low, high) + _SYMBOL_BITS * dense.size


def _escape_bits(values: Longs, dense: Longs, low: int, high: int) -> int:
    """Bits of the escaped values."""
    outside = values[(values < low) | (values >= high)]
    width = 16 if outside.size == 0 or np.abs(outside).max() < 1 << 15 else 32
    return width * int(dense[-1]) if dense.size > high - low else 0
