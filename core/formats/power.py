"""Power grids: symmetric levels sign(k) (|k|/L)^(1/alpha), k = -L..L, for weights scaled by their absmax to [-1, 1].

PowerQuant (arXiv 2301.09858): powers are the only continuous compandings that keep products as products. alpha = 1 is
the symmetric uniform grid, alpha < 1 puts more levels near zero. A weight either goes to the nearest level, which never
has the larger error, or is rounded in the power domain as published: `power_edges` are the ends of those cells.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from core.errors import InvalidFormat


@lru_cache(maxsize=256)
def power_levels(codes: int, alpha: float) -> tuple[float, ...]:
    """The 2 L + 1 levels, ascending from -1 to 1; an even number of codes leaves one unused: L = codes/2 - 1.

    For odd `codes` L = (codes - 1)/2. InvalidFormat for fewer than 3 codes, for an alpha that is not positive, and
    where levels coincide in float32, in which tables are stored.
    """
    steps = _steps(codes, alpha)
    positive = [(k / steps) ** (1 / alpha) for k in range(1, steps + 1)]
    stored = np.asarray([0.0, *positive], dtype=np.float32)
    if not np.all(np.diff(stored) > 0):
        raise InvalidFormat(f"{codes} levels with the exponent {alpha:g} coincide", hint="an exponent nearer to 1")
    return (*(-one for one in reversed(positive)), 0.0, *positive)


@lru_cache(maxsize=256)
def power_edges(codes: int, alpha: float) -> tuple[float, ...]:
    """The 2 L ends between cells when L |w|^alpha is rounded: +-((j + 1/2)/L)^(1/alpha), ascending."""
    steps = _steps(codes, alpha)
    positive = [((j + 0.5) / steps) ** (1 / alpha) for j in range(steps)]
    return (*(-one for one in reversed(positive)), *positive)


def _steps(codes: int, alpha: float) -> int:
    """L, the number of levels on either side of 0."""
    if codes < 3:
        raise InvalidFormat(f"a power grid of {codes} codes", hint="at least 3")
    if not 0 < alpha < math.inf:
        raise InvalidFormat(f"a power grid with the exponent {alpha:g}", hint="a positive exponent, for instance 0.7")
    return codes // 2 - 1 if codes % 2 == 0 else codes // 2
