"""Parameters of element formats that are chosen from the tensor: nu, exponent, exponent bits, scale multiplier.

Every candidate is judged on one histogram of x/s (`core.tensors.histogram`), by its error there, weighted as the
histogram is; the tensor is encoded for none. All searches are over grids that belong to the formats' definition, with a
rule for ties, so a fit is the same wherever it is made. With nothing to fit to (a tensor of zeros) all candidates tie.

Multipliers are for the rms statistic only: what absmax and signmax put on their end codes must stay there (optimal
formats, section 12). A value is decoded as multiplier times table value times scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from core.errors import InvalidFormat
from core.formats import floating, power, root_density
from core.tensors.blocks import BlockGrid
from core.tensors.histogram import Histogram, Vector, scaled_histogram

NUS = tuple(3 * (100 / 3) ** (k / 11) for k in range(12))
MULTIPLIERS = tuple(2 ** (k / 4) for k in range(-8, 9))
ALPHAS = tuple(k / 100 for k in range(20, 121))
MOST_EXPONENT_BITS = 8
LIKELY_NUS = tuple(range(3, 101))
UNKNOWN_NU = 7.0  # of typical weights, where there is nothing to fit

_BY_DISTANCE = tuple(sorted(MULTIPLIERS, key=lambda factor: abs(math.log2(factor))))
_SETTLED = 1e-6  # relative change of the scale at which a maximum-likelihood fit ends
_MOST_STEPS = 200
_LEAST_VARIANCE = 1e-200  # data that are mostly zeros have no scale: it shrinks without end


@dataclass(frozen=True)
class Fit:
    """What was chosen: the parameter, the multiplier that goes with it, and the R that the histogram promises."""

    parameter: float
    multiplier: float
    r: float


def fit_nu(histogram: Histogram, statistic: str, mode: str, codes: int, block: int | None = None) -> Fit:
    """Degrees of freedom of the cube-root t codebook, on the grid 3 (100/3)^(k/11), the smallest of equals.

    `block`: the weights that share a scale, for absmax and signmax. Under rms each is tried with all multipliers.
    """

    def table(nu: float) -> tuple[float, ...]:
        return root_density.codebook("t", nu, statistic, mode, codes, None if statistic == "rms" else block)

    return _least(histogram, NUS, table, _factors(statistic))


def fit_exponent_bits(histogram: Histogram, bits: int, *, mode: str = "", statistic: str = "absmax") -> Fit:
    """Exponent bits e of a float with 1 + e + m = bits: 1 to 8 (from 2 in modes ns and ieee), the fewest of equals.

    Under absmax and signmax the histogram is of x divided by the block's extreme itself: tables are compared with their
    largest value at 1. Under rms they are used as they are, with all multipliers. InvalidFormat for too few bits.
    """
    splits = range(2 if mode else 1, min(MOST_EXPONENT_BITS, bits - 1) + 1)
    if not splits:
        raise InvalidFormat(f"no float has {bits} bits", hint="sign, exponent and mantissa: 3 bits or more")

    def table(exponent_bits: float) -> tuple[float, ...]:
        values = floating.values(int(exponent_bits), bits - 1 - int(exponent_bits), mode)
        return values if statistic == "rms" else tuple(value / values[-1] for value in values)

    return _least(histogram, splits, table, _factors(statistic))


def fit_alpha(histogram: Histogram, codes: int, *, rounding: str = "nearest") -> Fit:
    """Exponent of the power family on the grid 0.20 to 1.20 in steps of 0.01, the smallest of equals.

    Power grids (PowerQuant, arXiv 2301.09858), p = 2. `rounding`: "nearest" level, or "power" for rounding |x/s|^alpha.
    The histogram is of x divided by the absmax of its block.
    """

    def r(alpha: float) -> float:
        edges = np.array(power.power_edges(codes, alpha)) if rounding == "power" else None
        return float(histogram.r(np.array(power.power_levels(codes, alpha)), edges))

    found = [r(alpha) for alpha in ALPHAS]
    least = min(found)
    return Fit(ALPHAS[found.index(least)], 1.0, least)


def fit_student_t(values: torch.Tensor) -> tuple[float, float]:
    """Maximum-likelihood degrees of freedom (integers 3 to 100) and scale of a zero-mean t.

    For each nu the scale is the fixed point s² = mean(w x²), w = (nu + 1) s² / (x² + nu s²) (optimal formats, section
    12). Zeros or nothing at all: (7, 0). NonFiniteWeights for NaN or infinity.
    """
    flat = values.detach().reshape(-1)
    grid = BlockGrid(flat.numel(), max(flat.numel(), 1), max(flat.numel(), 1), one_scale=True)
    unit = max(float(end.abs()) for end in flat.aminmax()) if flat.numel() else 0.0
    histogram = scaled_histogram(flat, grid, torch.tensor([unit]))
    if histogram.is_empty:
        return UNKNOWN_NU, 0.0
    shares = np.diff(histogram.mass_below) / histogram.mass_below[-1]
    squares = histogram.means**2
    variance, best = float(np.sum(shares * squares)), (-math.inf, UNKNOWN_NU, 0.0)
    for nu in reversed(LIKELY_NUS):  # from the Normal down, each scale starts from its neighbour's
        variance = _scale_of(nu, squares, shares, variance)
        best = max(best, (_likelihood(nu, squares, shares, variance), float(nu), math.sqrt(variance) * unit))
    return best[1], best[2]


def _factors(statistic: str) -> tuple[float, ...]:
    return _BY_DISTANCE if statistic == "rms" else (1.0,)


def _scaled(histogram: Histogram, table: tuple[float, ...], factors: tuple[float, ...]) -> tuple[float, float]:
    """(factor, R) of the least R, the first one of equals."""
    found = histogram.r(np.multiply.outer(np.array(factors), np.array(table)))
    best = int(np.argmin(found))
    return factors[best], float(found[best])


def _least(
    histogram: Histogram,
    candidates: Iterable[float],
    table: Callable[[float], tuple[float, ...]],
    factors: tuple[float, ...],
) -> Fit:
    """The candidate of least R, the first one of equals."""
    fits = [Fit(one, *_scaled(histogram, table(one), factors)) for one in candidates]
    return min(fits, key=lambda fit: fit.r)


def _scale_of(nu: int, squares: Vector, shares: Vector, variance: float) -> float:
    """s² of the most likely t with `nu` degrees of freedom."""
    for _ in range(_MOST_STEPS):
        weights = (nu + 1) * variance / (squares + nu * variance)
        found = max(float(np.sum(shares * weights * squares)), _LEAST_VARIANCE)
        if abs(found - variance) <= 2 * _SETTLED * variance:
            return found
        variance = found
    return variance


def _likelihood(nu: int, squares: Vector, shares: Vector, variance: float) -> float:
    """Mean log density."""
    constant = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi * variance)
    return constant - (nu + 1) / 2 * float(np.sum(shares * np.log1p(squares / (nu * variance))))
