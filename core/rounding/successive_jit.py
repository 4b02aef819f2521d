"""Compiled loops of successive rounding, over columns that are rows of the transposed arrays, fp64 or fp32.

What is rounded is `targets`, (columns, rows): Y^T of W L, whose last row is rounded first; what a column's rounding
leaves over goes into the rows above it by the factor's row (data-aware rounding, sections 4.1, 4.3 and 6). A call
handles the columns `low` to `high` of a block and leaves in `steps` what the rows above the block are still to be
freed of. Numbers are rounded half to even by division, in all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Reals = NDArray[np.float64] | NDArray[np.float32]

_ANY_ORDER = {"contract", "reassoc"}


@njit(nogil=True, cache=True, fastmath={"contract"})
def _free_rows(targets: Reals, factor: Reals, low: int, at: int, taken: Reals) -> None:
    """targets[low:at] -= factor[at, low:at] x taken."""
    count = targets.shape[1]
    for row in range(low, at):
        share = factor[at, row]
        into = targets[row]
        for place in range(count):
            into[place] -= share * taken[place]


@njit(nogil=True, cache=True, fastmath=_ANY_ORDER)
def _rounded(target: Reals, unit: Any, scale: Reals, found: NDArray[np.int32]) -> tuple[float, float]:
    """The numbers z of a column to `found`; <z, y> and <z, z>, z in units of the weights' scales."""
    along, square, real = 0.0, 0.0, target.dtype.type
    for place in range(target.size):
        cell = unit * scale[place]
        number = np.rint(target[place] / cell) if cell > 0.0 else real(0.0)
        found[place] = np.int32(number)
        scaled = number * scale[place]
        along += scaled * target[place]
        square += scaled * scaled
    return along, square


@njit(nogil=True, cache=True, fastmath={"contract"})
def round_numbers(
    targets: Reals,
    factor: Reals,
    steps: Doubles,
    scales: Reals,
    blocks: NDArray[np.int64],
    shrinks: bool,
    low: int,
    high: int,
    numbers: NDArray[np.int32],
    gains: Doubles,
    taken: Reals,
) -> None:
    """Unbounded z = rint(y / step L_ii) of the columns of a block, and their gains <z, y> / step L_ii <z, z>.

    `steps` (columns,): alpha, times the scale of a weight's block: `scales` (blocks, rows), `blocks` (columns,).
    `numbers` (columns, rows). `gains` (columns,): gamma, as given, or found where it `shrinks`, 0 for a column of
    zeros. `taken` (high - low, rows): what the columns are decoded as, gamma alpha z.
    """
    count, real = targets.shape[1], targets.dtype.type
    for at in range(high - 1, low - 1, -1):
        unit, scale = real(steps[at] * factor[at, at]), scales[blocks[at]]
        target, found, values = targets[at], numbers[at], taken[at - low]
        along, square = _rounded(target, unit, scale, found)
        if shrinks:
            gains[at] = along / (unit * square) if square > 0.0 else 0.0
        value = real(gains[at] * steps[at])
        for place in range(count):
            values[place] = value * scale[place] * real(found[place])
        if value != 0.0:
            _free_rows(targets, factor, low, at, values)
