"""Quantile codebooks of the NF4 rule: equal probability mass between codes, both ends at 1, an exact zero.

The rule of QLoRA (arXiv 2305.14314) for any even number of codes: the positive side has one code more than the negative
one. For 16 codes it gives the published NF4 table to 2e-7 (optimal formats, section 6.3).
"""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=64)
def normal_float(codes: int) -> tuple[float, ...]:
    """The `codes` values of the Normal's quantile codebook, ascending, in [-1, 1]; `codes` even and at least 4."""
    from scipy import special

    half = codes // 2
    offset = 1 - 0.5 * (1 / (2 * codes) + 1 / (2 * codes - 2))

    def side(points: int) -> list[float]:
        """Quantiles from the outermost to the one before the centre."""
        step = (offset - 0.5) / (points - 1)
        return [float(special.ndtri(offset - step * k)) for k in range(points - 1)]

    positive, negative = side(half + 1), side(half)
    largest = positive[0]
    return (*(-one / largest for one in negative), 0.0, *(one / largest for one in reversed(positive)))
