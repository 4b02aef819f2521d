"""Models of a known distribution: numbers that are a Normal, Laplace or Student-t variable rounded to integers.

P(z) = F((z + 1/2) / s) - F((z - 1/2) / s), computed by survival functions, so that tails keep their digits. A family
only chooses integer frequencies; these are what is stored, so special functions need not agree between machines.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidFormat
from core.tensors.entropy.models import MOST_SYMBOLS, SymbolModel
from core.tensors.entropy.windows import model_of_counts

FAMILIES = ("normal", "laplace", "t")
_WEIGHT = 1 << 24
Doubles = NDArray[np.float64]


def probabilities(family: str, std: float, numbers: NDArray[np.int64], nu: float = 5.0) -> Doubles:
    """P of integers, float64; `std` > 0 in units of the step, `nu` > 2 the degrees of freedom of "t"."""
    magnitude = np.abs(numbers).astype(np.float64)
    inner = _upper_tail(family, (magnitude - 0.5) / std, nu)
    outer = _upper_tail(family, (magnitude + 0.5) / std, nu)
    return np.where(magnitude == 0, 1 - 2 * outer, inner - outer)


def _upper_tail(family: str, x: Doubles, nu: float) -> Doubles:
    """P(X > x) at unit standard deviation."""
    from scipy import special

    if family == "normal":
        return np.asarray(special.ndtr(-x), np.float64)
    if family == "laplace":
        scaled = x * math.sqrt(2)
        return np.where(scaled < 0, 1 - 0.5 * np.exp(np.minimum(scaled, 0)), 0.5 * np.exp(-np.maximum(scaled, 0)))
    if family == "t" and nu > 2:
        return np.asarray(special.stdtr(nu, -x * math.sqrt(nu / (nu - 2))), np.float64)
    raise InvalidFormat(f"no distribution {family} with {nu:g} degrees of freedom", hint=", ".join(FAMILIES))


def parametric_model(family: str, std: float, nu: float = 5.0, weight: int = _WEIGHT) -> SymbolModel:
    """The model of such numbers, with an escape for what is farther out.

    `std` in units of the step. `weight` is about how many numbers will be coded: fewer justify fewer bits of model.
    """
    if not 0 < std < math.inf:
        raise InvalidFormat(f"a standard deviation of {std:g} steps")
    one_side = _one_side(family, std, nu, weight)
    counts = np.rint(one_side * weight).astype(np.int64)
    counts = np.concatenate([counts[:0:-1], [max(1, counts[0])], counts[1:]])
    numbers = np.arange(1 - one_side.size, one_side.size)
    rest = max(0, weight - int(counts.sum()))
    return model_of_counts(numbers[counts > 0], counts[counts > 0], rest)


def _one_side(family: str, std: float, nu: float, weight: int) -> Doubles:
    """P of 0, 1, ... up to where no number is counted, or no symbol can be.

    Beyond x >= 2 standard deviations the families with light tails have less than exp(-x), which rounds to no number.
    """
    half = MOST_SYMBOLS // 2
    farthest = half if family == "t" else min(half, math.ceil(math.log(max(2 * weight, 8)) * std) + 2)
    tails = _upper_tail(family, (np.arange(farthest, dtype=np.float64) + 0.5) / std, nu)
    return np.concatenate([1 - 2 * tails[:1], tails[:-1] - tails[1:]])
