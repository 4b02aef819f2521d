"""Expected squared error of an element with a scale per block on N(0, 1), by quadrature over the block's maximum.

Given the maximum m, the other B - 1 weights are independent Normals truncated to [-m, m]: their error has a closed form
for every cell. The maximum itself is rounded too. Both are integrated over the density of m between the places where
the scale or the maximum's value jumps, so that Gauss-Legendre sees smooth functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special

from tests.golden.exact_error import Source, cell_errors

Vector = NDArray[np.float64]
_NODES = 10
_NEGLIGIBLE = 1e-17
_NORMAL = Source("normal")


def expected_mse(
    values: Sequence[float], scale_of: Callable[[Vector], Vector], block: int, thresholds: Sequence[float] = ()
) -> float:
    """`scale_of` maximum: a power of two that jumps where the maximum is a threshold times a power of two.

    Without thresholds: proportional to the maximum.
    """
    table = np.asarray(values)
    middles = (table[1:] + table[:-1]) / 2
    maxima, weights = _nodes(block, [*thresholds, *middles[middles > 0]] if thresholds else [])
    inside = special.erf(maxima / np.sqrt(2))
    density = 2 * block * _NORMAL.density(maxima) * np.exp((block - 1) * np.log1p(-special.erfc(maxima / np.sqrt(2))))
    scales = scale_of(maxima)
    edges = np.clip(middles * scales[:, None], -maxima[:, None], maxima[:, None])
    edges = np.concatenate((-maxima[:, None], edges, maxima[:, None]), axis=1)
    others = cell_errors(_NORMAL, table * scales[:, None], edges).sum(axis=1) / inside
    top = maxima - table[np.searchsorted(middles, maxima / scales)] * scales
    return float((weights * density * ((block - 1) * others + top**2)).sum() / block)


def _nodes(block: int, breaks: Sequence[float]) -> tuple[Vector, Vector]:
    """Places and weights of the quadrature between all breaks * 2^k where the maximum of a block is to be found."""
    low = float(special.ndtri((1 + _NEGLIGIBLE ** (1 / block)) / 2)) if block > 1 else 1e-9
    high = float(-special.ndtri(_NEGLIGIBLE / (2 * block)))
    powers = 2.0 ** np.arange(-40, 41)
    even = np.linspace(low, high, 12)
    ends = np.unique(np.concatenate(([low, high], even, *(powers * one for one in breaks))))
    ends = ends[(ends >= low) & (ends <= high)]
    places, weights = np.polynomial.legendre.leggauss(_NODES)
    half, middle = np.diff(ends) / 2, (ends[1:] + ends[:-1]) / 2
    return (middle[:, None] + half[:, None] * places).ravel(), (half[:, None] * weights).ravel()
