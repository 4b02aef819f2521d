"""GGUF's IQ4_NL: 32 elements, one fp16 scale, codes into a fixed table of sixteen uneven, unsymmetric levels.

Reading is bit-identical to ggml's decoder. Writing looks for the smallest (weighted) squared error: inverse scales
around the one that puts the largest magnitude at -127 or at +127, each with its least-squares scale rounded to fp16 and
the elements assigned anew.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from core.formats.block_types import IQ4_NL_LEVELS
from core.tensors.block_types.fields import (
    Bytes,
    Floats,
    counted,
    half_bytes,
    halves,
    inverse,
    join_halves,
    nearest_half,
    relative_weights,
    split_halves,
)

_LEVELS = np.array(IQ4_NL_LEVELS, dtype=np.float32)
_REACH = 160  # what lies further out takes the outermost level
# All midpoints are multiples of one half: codes by floor(2 y), ties to the upper level.
_HALF_STEPS = np.arange(-2 * _REACH, 2 * _REACH + 1) / 2
_CODES = np.searchsorted((_LEVELS[1:] + _LEVELS[:-1]) / 2, _HALF_STEPS, side="right").astype(np.uint8)
_NEAREST = _LEVELS[_CODES]
_TRIES = 15


def decode(data: Bytes) -> Floats:
    return halves(data[:, :2]) * _LEVELS[split_halves(data[:, 2:])]


def encode(values: Floats, importance: Floats | None) -> Bytes:
    x = np.ascontiguousarray(values.T)
    w = None if importance is None else np.ascontiguousarray(relative_weights(importance).T)
    d = _best_scale(x, w)
    codes = _CODES[_steps(x, inverse(d))].T
    return np.concatenate((half_bytes(d[:, None]), join_halves(codes)), axis=1)


def _best_scale(x: Floats, w: Floats | None) -> Floats:
    """The scale of each column, an fp16 number."""
    considered = counted(x, w)
    largest = np.take_along_axis(considered, np.abs(considered).argmax(axis=0)[None], axis=0)[0]
    y = x * inverse(largest)
    best, scale = np.full(x.shape[1], np.inf, dtype=np.float32), np.zeros(x.shape[1], dtype=np.float32)
    for step in range(_TRIES):
        for end in (127, -127):
            levels = _NEAREST[_steps(y, np.float32(end * (1 + 0.02 * (step - 7))))]
            d = nearest_half(_least_squares(y, w, levels) * largest)
            error = _NEAREST[_steps(x, inverse(d))] * d - x
            total = np.einsum("eb,eb->b", error, error if w is None else error * w)
            better = total < best
            best, scale = np.where(better, total, best), np.where(better, d, scale)
    return scale


def _least_squares(x: Floats, w: Floats | None, levels: Floats) -> Floats:
    weighted = levels if w is None else levels * w
    found: Floats = np.einsum("eb,eb->b", weighted, x) * inverse(np.einsum("eb,eb->b", weighted, levels))
    return found


def _steps(x: Floats, inverse_scale: Floats | np.float32) -> NDArray[np.intp]:
    """Places in the tables of half steps."""
    steps = x * (inverse_scale * np.float32(2))
    np.clip(steps, -2 * _REACH, 2 * _REACH, out=steps)
    steps += np.float32(2 * _REACH)
    return steps.astype(np.intp)
