"""The compiled search for the classes of a matrix: how many there should be, and which group of lines has which.

Sizes are counted in bits, those of the classes' models and of their numbers among them. `core.tensors.kernels.cpu_jit`
explains the style.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from core.tensors.entropy.loops_jit import Longs
from core.tensors.kernels.cpu_jit import compiled, inlined

Doubles = NDArray[np.float64]
Marks = NDArray[np.bool_]

_HEAD, _SYMBOL = 104.0, 6.0  # bits that a code for class numbers takes more than a plain list, and for each class


@compiled
def best_classes(bits: Doubles, fixed: float, found: Longs) -> float:
    """Classes of least total size to `found` (groups,); that size.

    `bits` (groups, classes): of the numbers of each group in each class. `fixed`: of each class that is used. Classes
    are left out one at a time, the one that saves least first, and the best stage is taken, the later one of equals.
    """
    best, second = np.empty_like(found), np.empty_like(found)
    is_kept, least, left = np.ones(bits.shape[1], np.bool_), np.inf, bits.shape[1]
    for g in range(found.size):
        best[g], second[g] = _ranked(bits, g, is_kept)
    while left > 0:
        saved, counts, total = np.zeros(bits.shape[1]), np.zeros(bits.shape[1], np.int64), 0.0
        for g in range(found.size):
            counts[best[g]] += 1
            total += bits[g, best[g]]
            saved[best[g]] += bits[g, second[g]] - bits[g, best[g]]
        used = int(np.count_nonzero(counts))
        total += fixed * used + _number_bits(counts, used)
        if total <= least:
            least = total
            for g in range(found.size):
                found[g] = best[g]
        out = _least_saving(saved, is_kept)
        is_kept[out] = False
        left -= 1
        for g in range(found.size if left else 0):
            if best[g] == out or second[g] == out:
                best[g], second[g] = _ranked(bits, g, is_kept)
    return least


@inlined
def _ranked(bits: Doubles, g: int, is_kept: Marks) -> tuple[int, int]:
    """The best and the second best class of a group; the same twice where there is only one."""
    best, second = -1, -1
    for k in range(is_kept.size):
        if is_kept[k] and (best < 0 or bits[g, k] < bits[g, best]):
            best, second = k, best
        elif is_kept[k] and (second < 0 or bits[g, k] < bits[g, second]):
            second = k
    return best, second if second >= 0 else best


@inlined
def _least_saving(saved: Doubles, is_kept: Marks) -> int:
    found = -1
    for k in range(is_kept.size):
        if is_kept[k] and (found < 0 or saved[k] < saved[found]):
            found = k
    return found


@inlined
def _number_bits(counts: Longs, used: int) -> float:
    """Bits of the numbers of the classes: by a plain list or a code, whichever is shorter."""
    groups, coded, width = counts.sum(), _HEAD + _SYMBOL * used, 0
    for k in range(counts.size):
        if counts[k] > 0:
            coded += counts[k] * np.log2(groups / counts[k])
    while 1 << width < used:
        width += 1
    return min(coded, float(width * groups))
