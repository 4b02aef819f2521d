"""Compiled loops of successive rounding, over columns that are rows of the transposed arrays, in fp64.

What is rounded is `targets`, (columns, rows): Y^T of W L, whose last row is rounded first; what a column's rounding
leaves over goes into the rows above it by the factor's row (data-aware rounding, sections 4.1, 4.3 and 6). A call
handles the columns `low` to `high` of a block and leaves in `steps` what the rows above the block are still to be
freed of. Numbers are rounded half to even by division, in all of them.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


@njit(nogil=True, cache=True, fastmath={"contract"})
def _free_rows(targets: Doubles, factor: Doubles, low: int, at: int, taken: Doubles) -> None:
    """targets[low:at] -= factor[at, low:at] x taken."""
    count = targets.shape[1]
    for row in range(low, at):
        share = factor[at, row]
        into = targets[row]
        for place in range(count):
            into[place] -= share * taken[place]


@njit(nogil=True, cache=True, fastmath={"contract"})
def round_numbers(
    targets: Doubles,
    factor: Doubles,
    steps: Doubles,
    scales: Doubles,
    blocks: NDArray[np.int64],
    shrinks: bool,
    low: int,
    high: int,
    numbers: NDArray[np.int32],
    gains: Doubles,
    taken: Doubles,
) -> None:
    """Unbounded z = rint(y / step L_ii) of the columns of a block, and their gains <z, y> / step L_ii <z, z>.

    `steps` (columns,): alpha, times the scale of a weight's block: `scales` (blocks, rows), `blocks` (columns,).
    `numbers` (columns, rows). `gains` (columns,): gamma, as given, or found where it `shrinks`, 0 for a column of
    zeros. `taken` (high - low, rows): what the columns are decoded as, gamma alpha z.
    """
    count = targets.shape[1]
    for at in range(high - 1, low - 1, -1):
        unit, scale = steps[at] * factor[at, at], scales[blocks[at]]
        target, found, values = targets[at], numbers[at], taken[at - low]
        along, square = 0.0, 0.0
        for place in range(count):
            cell = unit * scale[place]
            number = np.rint(target[place] / cell) if cell > 0.0 else 0.0
            found[place] = np.int32(number)
            along += number * scale[place] * target[place]
            square += number * scale[place] * number * scale[place]
        if shrinks:
            gains[at] = along / (unit * square) if square > 0.0 else 0.0
        value = gains[at] * steps[at]
        for place in range(count):
            values[place] = value * scale[place] * found[place]
        if value != 0.0:
            _free_rows(targets, factor, low, at, values)
