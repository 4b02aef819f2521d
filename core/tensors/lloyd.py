"""Lloyd-Max: a codebook fitted to a tensor, for the family `lloyd` (optimal formats, section 6.4).

Nearest assignment and weighted centroids alternate on a histogram of x/s, so an iteration costs the codes times the
logarithm of the bins, whatever the tensor's size. No random start: it begins at a codebook that is given, as a rule the
cube-root one of the fitted degrees of freedom.

Promise: encoding the tensor by what is returned never errs more (weighted as the histogram is) than by the start. The
fitted codebook is returned only if an upper bound of its error lies below a lower bound of the start's, bins that
thresholds cut and fp32 arithmetic included (`Histogram.surely_better`); otherwise the start is, as it came. Gains
that these bounds cannot tell from none (of R: 1e-5 at 4 bits, 2e-4 at 8) are forgone. Found values are ascending and
numbers of fp32, as they are stored.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidFormat
from core.tensors.histogram import Histogram, Vector, midpoints

ITERATIONS = 2000
STILL = 1e-6  # in units of x/s: the largest movement of a code that counts as none
Mask = NDArray[np.bool_]


def pinned_codes(statistic: str, codes: int) -> frozenset[int]:
    """Indices of the codes on which a statistic puts block maxima: they must not move (section 6.4).

    Both ends under absmax, the upper one under signmax, none under rms.
    """
    return {"absmax": frozenset({0, codes - 1}), "signmax": frozenset({codes - 1})}.get(statistic, frozenset())


def lloyd(histogram: Histogram, start: tuple[float, ...], *, pinned: frozenset[int] = frozenset()) -> tuple[float, ...]:
    """The codebook, ascending; codes of the indices `pinned` and of empty cells stay.

    Ends after 2000 iterations or when no code moves by 1e-6. InvalidFormat for a start that does not ascend.
    """
    initial = np.array(start, dtype=np.float64)
    if not _ascends(initial):
        raise InvalidFormat("a codebook to start from must ascend", hint="leave out repeat_zero")
    free = np.array([index not in pinned for index in range(len(start))], dtype=bool)
    if histogram.is_empty or not free.any():
        return start
    found = np.where(free, _iterated(histogram, initial, free).astype(np.float32), initial)
    if not _ascends(found.astype(np.float32)) or not histogram.surely_better(found, initial):
        return start
    return tuple(found.tolist())


def _iterated(histogram: Histogram, codes: Vector, free: Mask) -> Vector:
    """The fixed point near `codes`: each step leaves from a point ahead, as long as that lowers the error.

    Running ahead is Nesterov's momentum; where it fails (error up, or codes out of order) it starts anew from the last
    codes with a plain step, which never raises the error.
    """
    error, momentum, ahead = float(histogram.error(codes)), 1.0, codes
    for _ in range(ITERATIONS):
        stepped = _centroids(histogram, ahead, free)
        is_still = float(np.abs(stepped - ahead).max()) < STILL
        found = float(histogram.error(stepped))
        if found > error and ahead is not codes:
            momentum, ahead = 1.0, codes
            continue
        if is_still or found > error:
            return stepped if found <= error else codes
        following = (1 + math.sqrt(1 + 4 * momentum * momentum)) / 2
        leap = stepped + (momentum - 1) / following * (stepped - codes)
        codes, error, momentum = stepped, found, following
        ahead = leap if _ascends(leap) else codes
    return codes


def _centroids(histogram: Histogram, codes: Vector, free: Mask) -> Vector:
    """Each free code moved to the weighted mean of its cell."""
    edges = midpoints(codes)
    mass, first = histogram.cells(edges)
    moved = free & (mass > 0)
    means = first / np.where(moved, mass, 1.0)
    # prefix sums of far larger cells may leave a small one's mean outside it
    inside = np.clip(means, np.append(-np.inf, edges), np.append(edges, np.inf))
    return np.where(moved, inside, codes)


def _ascends(values: Vector | NDArray[np.float32]) -> bool:
    return bool((values[1:] > values[:-1]).all())
