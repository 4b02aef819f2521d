"""Quantile codebooks: NF4 for Normal weights, SF4 for Student-t weights, and their rule for other numbers of codes.

Equal probability mass between codes, both ends at 1, an exact zero, and one code more on the positive side (QLoRA,
arXiv 2305.14314; SF4, arXiv 2405.03103). NF4 is a published table of float32 constants and is returned bit for bit:
regenerating it gives other last digits. All else follows the rule in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from core.errors import InvalidFormat

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_PUBLISHED_CODES = 16
_PUBLISHED_OFFSET = 0.9677083  # the rule's offset for 16 codes as the released code rounds it


@lru_cache(maxsize=64)
def normal_float(codes: int) -> tuple[float, ...]:
    """The `codes` values of the Normal's quantile codebook, ascending, in [-1, 1]; `codes` even and at least 4.

    For 16 codes the published NF4 constants.
    """
    from scipy import special

    if codes == _PUBLISHED_CODES:
        return _NF4
    return _by_rule(codes, lambda tail: -float(special.ndtri(tail)))


@lru_cache(maxsize=64)
def student_float(codes: int, nu: float) -> tuple[float, ...]:
    """The same construction with quantiles of Student's t with `nu` > 0 degrees of freedom (SF4 for 16 codes, nu 5)."""
    from scipy import special

    if not nu > 0:
        raise InvalidFormat(f"t with {nu:g} degrees of freedom", hint="sf4, sf4-nu4")
    return _by_rule(codes, lambda tail: -float(special.stdtrit(nu, tail)))


def _by_rule(codes: int, inverse_tail: Callable[[float], float]) -> tuple[float, ...]:
    """Quantiles at equal steps of probability from the offset to 1/2, on each side, divided by the largest.

    The offset is 1 - (1/(2 n) + 1/(2 n - 2))/2 for n codes. `inverse_tail(q)` is x with P(X > x) = q.
    """
    if codes % 2 or codes < 4:
        raise InvalidFormat(f"a quantile codebook of {codes} codes", hint="an even number of at least 4")
    half = codes // 2
    offset = 1 - 0.5 * (1 / (2 * codes) + 1 / (2 * codes - 2))
    offset = _PUBLISHED_OFFSET if codes == _PUBLISHED_CODES else offset

    def side(points: int) -> list[float]:
        """Quantiles from the outermost to the one before the centre, `points` in all."""
        step = (offset - 0.5) / points
        return [inverse_tail(1 - offset + step * k) for k in range(points)]

    positive, negative = side(half), side(half - 1)
    largest = positive[0]
    return (*(-one / largest for one in negative), 0.0, *(one / largest for one in reversed(positive)))
