"""Which model is the shortest for numbers that were counted: one of their own, or one of the classes.

A model of their own costs some tens of bytes and fits; a class costs two and may be a little wrong.
"""

from __future__ import annotations

import math

import numpy as np

from core.tensors.entropy.classes import (
    CLASSES,
    LAPLACE,
    NORMAL,
    STORED_BYTES,
    ClassModel,
    class_model,
    class_number_bits,
)
from core.tensors.entropy.loops_jit import Longs
from core.tensors.entropy.models import SymbolModel, expected_bits
from core.tensors.entropy.models_jit import model_bytes
from core.tensors.entropy.windows import model_of_counts

_SHEPPARD, _LEAST_VARIANCE = 1 / 12, 1 / 16  # what rounding adds to a variance, and where that is no guide
_DIRECTORY_BITS = 32  # of a stream, for how many numbers it escapes
_ESCAPED_BITS = 16


def shortest_model(values: Longs, counts: Longs) -> SymbolModel:
    """The model of least total size for so many of each number, ascending, all in one stream or a few."""
    own, named = model_of_counts(values, counts), nearest_class(values, counts)
    if named is None:
        return own
    more = 0 if own.has_escape else _DIRECTORY_BITS
    return named if total_bits(named, values, counts) + more < total_bits(own, values, counts) else own


def nearest_class(values: Longs, counts: Longs) -> ClassModel | None:
    """The class of least size, found downhill from the deviation; None for codes of a table, which are never negative.

    A class would give symbols to numbers that are no codes.
    """
    if values[0] >= 0:
        return None
    squares = float(np.dot(counts, values.astype(np.float64) ** 2)) / float(counts.sum())
    first = round(4 * math.log2(max(squares - _SHEPPARD, _LEAST_VARIANCE)))
    first, magnitudes = min(max(first, CLASSES.start), CLASSES.stop - 1), np.abs(values)
    _, family, k = min(_descended(family, first, magnitudes, counts) for family in (NORMAL, LAPLACE))
    return class_model(family, k)


def _descended(family: int, k: int, magnitudes: Longs, counts: Longs) -> tuple[float, int, int]:
    """Bits, family and k of the best class near k."""
    best = _class_bits(family, k, magnitudes, counts)
    for step in (1, -1):
        while best[2] + step in CLASSES:
            other = _class_bits(family, best[2] + step, magnitudes, counts)
            if other >= best:
                break
            best = other
    return best


def _class_bits(family: int, k: int, magnitudes: Longs, counts: Longs) -> tuple[float, int, int]:
    costs = class_number_bits(family, k)
    escaped = counts[magnitudes >= costs.size - 1].sum()
    bits = np.dot(counts, costs[np.minimum(magnitudes, costs.size - 1)])
    return float(bits + _ESCAPED_BITS * escaped), family, k


def total_bits(model: SymbolModel, values: Longs, counts: Longs) -> float:
    """Bits of so many of each number, ascending, by a model, its own bytes counted."""
    first, beyond = np.searchsorted(values, [model.low, model.high + 1])
    dense = np.zeros(model.size, np.int64)
    dense[values[first:beyond] - model.low] = counts[first:beyond]
    outside = int(counts.sum() - counts[first:beyond].sum())
    if outside and not model.has_escape:
        return float("inf")
    dense[-1] += outside
    stored = STORED_BYTES if isinstance(model, ClassModel) else model_bytes(model.low, model.frequencies)
    return expected_bits(model, dense) + _ESCAPED_BITS * outside + 8 * stored
