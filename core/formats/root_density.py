"""Cube-root-density codebooks: `normal`, `laplace` and `t<nu>` for RMS, absmax and signmax scaling.

The codepoint density that minimises the squared error of a fixed-length code is proportional to p^(1/3) (Panter and
Dite); for these three families that density is of the same family again, so a codebook is an inverse CDF on a grid of
probabilities (Optimal Formats for Weight Quantisation, arXiv 2505.12988). Under absmax and signmax the density is
truncated where the largest of B draws is expected and divided by it, so codebooks lie in [-1, 1].

Promise: float64 throughout, mirrored codes are exact negatives, a zero is 0.0 and the ends of block codebooks are
exactly 1. No torch; scipy is loaded when a codebook is first asked for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from core.errors import InvalidFormat

CUBE_ROOT = 1 / 3
_EULER = 0.5772156649015329
_LEAST_BLOCK = 4  # the closed forms of E[max|x|] hold from here on
_CENTRE = 0.5
_FP32_LARGEST = 3.4e38


@dataclass(frozen=True)
class Density:
    """A zero-mean density proportional to p^alpha, for data of the family with RMS 1.

    `upper_tail(x)` is P(X > x) and `inverse_tail(q)` its inverse, both for x >= 0.
    """

    upper_tail: Callable[[float], float]
    inverse_tail: Callable[[float], float]


def density(family: str, nu: float | None, alpha: float = CUBE_ROOT) -> Density:
    """The density of codepoints (optimal formats, section 3). `nu` > 2 for family `t`; alpha > 1/(nu + 1)."""
    from scipy import special

    if family == "normal":
        scale = alpha**-0.5
        return Density(lambda x: float(special.ndtr(-x / scale)), lambda q: -scale * float(special.ndtri(q)))
    if family == "laplace":
        scale = 1 / (alpha * math.sqrt(2))
        return Density(lambda x: 0.5 * math.exp(-x / scale), lambda q: -scale * math.log(2 * q))
    if nu is None or alpha * (nu + 1) <= 1:
        raise InvalidFormat(f"the density of {family} to the power {alpha:g} cannot be normalised", hint="t5_4")
    freedom = alpha * (nu + 1) - 1
    scale = math.sqrt((nu - 2) / freedom)
    return Density(
        lambda x: float(special.stdtr(freedom, -x / scale)), lambda q: -scale * float(special.stdtrit(freedom, q))
    )


def expected_absmax(family: str, nu: float | None, block: int) -> float:
    """m(B): the closed form for E[max|x|]/sigma of B draws that is part of the formats' identity (section 4)."""
    block = max(block, _LEAST_BLOCK)
    if family == "laplace":
        return (_EULER + math.log(block)) / math.sqrt(2)
    spread = 2 * math.log(block / math.pi)
    if family == "normal":
        return math.sqrt(spread)
    if nu is None:
        raise InvalidFormat("t has degrees of freedom", hint="t5_4")
    power: float = spread ** ((nu - 3) / (2 * nu)) * block ** (1 / nu)
    return power


@lru_cache(maxsize=1024)
def codebook(
    family: str,
    nu: float | None,
    statistic: str,
    mode: str,
    codes: int,
    block: int | None = None,
    alpha: float = CUBE_ROOT,
) -> tuple[float, ...]:
    """The `codes` values, ascending (`repeat_zero` has 0.0 twice).

    `statistic` rms: values in units of the data's RMS; absmax and signmax: values in [-1, 1] for `block` weights that
    share a scale. `mode`: sym, asym, repeat_zero, or "" under signmax. InvalidFormat where values would coincide.
    """
    if statistic == "rms":
        values = _rms_values(density(family, nu, alpha), mode, codes)
    else:
        values = _block_values(family, nu, mode, codes, block or _LEAST_BLOCK, alpha)
    if not _are_apart(values, codes - (mode == "repeat_zero")):
        name = family if nu is None else f"{family} with nu {nu:g}"
        raise InvalidFormat(
            f"{codes} codes of {name} are too many to tell apart in fp32", hint="fewer bits, a larger nu"
        )
    return values


def _are_apart(values: tuple[float, ...], count: int) -> bool:
    """Whether so many different numbers of fp32, none of them infinite, ascend."""
    if max(map(abs, values)) >= _FP32_LARGEST:
        return False
    stored = struct.unpack(f"{len(values)}f", struct.pack(f"{len(values)}f", *values))
    return list(stored) == sorted(stored) and len(set(stored)) == count


def _rms_values(law: Density, mode: str, codes: int) -> tuple[float, ...]:
    """Section 3: probabilities k/(n+1) for sym; each side on its own for the modes with a zero."""
    half = codes // 2

    def value(offset: float) -> float:
        """The value at probability 1/2 + offset."""
        return math.copysign(law.inverse_tail(_CENTRE - abs(offset)), offset) if offset else 0.0

    if mode == "sym":
        return _mirrored([value(_CENTRE * (codes + 1 - 2 * k) / (codes + 1)) for k in range(1, half + 1)], codes)
    inner = [value(_CENTRE * (half - k) / half) for k in range(1, half + 1)]  # the last one is 0
    negative = tuple(-one if one else 0.0 for one in inner)
    if mode == "repeat_zero":
        return negative + tuple(reversed(inner))
    return negative + tuple(value(_CENTRE * k / (half + 1)) for k in range(1, half + 1))


def _block_values(family: str, nu: float | None, mode: str, codes: int, block: int, alpha: float) -> tuple[float, ...]:
    """Section 4: the density truncated to [-m, m] and divided by m."""
    law, limit, half = density(family, nu, alpha), expected_absmax(family, nu, block), codes // 2
    mass = _CENTRE - law.upper_tail(limit)  # of one side

    def value(share: float) -> float:
        """The positive value below which lies `share` of the positive side."""
        return 1.0 if share == 1 else law.inverse_tail(_CENTRE - share * mass) / limit if share else 0.0

    if mode == "sym":
        return _mirrored([value((codes - 1 - 2 * k) / (codes - 1)) for k in range(half)], codes)
    positive = tuple(value(k / half) for k in range(1, half + 1))
    if mode == "":
        return (*(-one for one in reversed(positive[:-1])), 0.0, *positive)
    negative = tuple(-value(1 - k / (half - 1)) if k < half - 1 else 0.0 for k in range(half))
    if mode == "repeat_zero":
        return negative + tuple(-one if one else 0.0 for one in reversed(negative))
    return negative + positive


def _mirrored(outer: list[float], codes: int) -> tuple[float, ...]:
    """Positive values, largest first, with their exact negatives, and a zero for an odd number of codes."""
    return (*(-one for one in outer), *((0.0,) if codes % 2 else ()), *reversed(outer))
