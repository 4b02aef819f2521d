"""Which numbers get symbols of their own: all of them, or a window with an escape for the rest.

Any choice decodes; this one weighs size, and speed where two choices are nearly equal: tables of fewer symbols are
faster, and a number that hardly occurs takes more from the others as a symbol than it costs as an escape.
"""

from __future__ import annotations

import numpy as np

from core.tensors.entropy import models_jit
from core.tensors.entropy.loops_jit import Longs, Numbers
from core.tensors.entropy.models import MOST_SYMBOLS, SymbolModel

_DENSE = 1 << 16  # spans up to this are counted in an array


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
    best = np.empty(MOST_SYMBOLS, np.int64)
    given = np.ascontiguousarray(values, np.int64), np.ascontiguousarray(counts, np.int64)
    found = models_jit.best_window(*given, -1 if rest is None else rest, models_jit.LOGARITHMS, best)
    low, size, has_escape, precision = found
    return SymbolModel(low, precision, best[:size].copy(), has_escape)
