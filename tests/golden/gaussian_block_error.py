"""Errors and stationarity of block codes on N(0, 1), exactly: an oracle by Gauss–Legendre over the block maximum.

The distribution of a block divided by its largest magnitude M, and the closed form of a cell's error for given M = m;
written from the formulas of the NF4/AF4/BOF4 literature, and sharing nothing with the solvers under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

Vector = NDArray[np.float64]
NODES = 300


def normal_density(x: Vector) -> Vector:
    return np.asarray(np.exp(-x * x / 2) / np.sqrt(2 * np.pi))


def quantile_of_maximum(block: int, probability: float) -> float:
    """The number below which the largest magnitude of a block stays with that probability."""
    return float(-special.ndtri(-np.expm1(np.log(probability) / block) / 2))


@lru_cache(maxsize=64)
def maxima(block: int) -> tuple[Vector, Vector, Vector]:
    """Values m of the maximum, their probabilities, and A(m), the mass of one draw inside [-m, m]."""
    low = quantile_of_maximum(block, 1e-18)
    high = float(-special.ndtri(1e-17 / (2 * block)))
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    m = (high - low) / 2 * nodes + (high + low) / 2
    inside = special.xlog1py(block - 1, -2 * special.ndtr(-m))
    probability = 2 * block * normal_density(m) * np.exp(inside) * weights * (high - low) / 2
    return m, probability, np.asarray(special.ndtr(m) - special.ndtr(-m))


def midpoints(values: Sequence[float]) -> Vector:
    table: Vector = np.asarray(values, dtype=np.float64)
    return (table[1:] + table[:-1]) / 2


def cells(values: Sequence[float], edges: Sequence[float] | None = None) -> Vector:
    """Ends of all cells on [-1, 1]; nearest values unless the edges between cells are given."""
    inner = midpoints(values) if edges is None else np.asarray(edges)
    return np.concatenate(([-1.0], np.clip(inner, -1, 1), [1.0]))


def block_error(
    values: Sequence[float],
    block: int,
    power: int,
    *,
    normalised: bool = False,
    edges: Sequence[float] | None = None,
) -> float:
    """E|W - Q|^power, or E|X - Q|^power where normalised; the maximum itself has no error."""
    m, probability, inside = maxima(block)
    ends = cells(values, edges)
    low, high = np.multiply.outer(m, ends[:-1]), np.multiply.outer(m, ends[1:])
    level = np.multiply.outer(m, np.asarray(values))
    mass = special.ndtr(high) - special.ndtr(low)
    first = normal_density(low) - normal_density(high)
    if power == 2:
        second = mass + low * normal_density(low) - high * normal_density(high)
        each = second - 2 * level * first + level**2 * mass
    else:
        cut = np.clip(level, low, high)
        below = level * (special.ndtr(cut) - special.ndtr(low)) - (normal_density(low) - normal_density(cut))
        above = normal_density(cut) - normal_density(high) - level * (special.ndtr(high) - special.ndtr(cut))
        each = below + above
    weight = probability / inside / (m**power if normalised else 1)
    return float((block - 1) / block * (weight @ each.sum(axis=1)))


def distribution(x: Vector, block: int, *, signed: bool = False) -> Vector:
    """F_X(x) of one element of a block, -1 <= x < 1, with the atoms of the maximum."""
    m, probability, inside = maxima(block)
    mx = np.multiply.outer(np.asarray(x), m)
    given = (special.ndtr(mx) - special.ndtr(-m)) / inside @ probability
    atom = 0.0 if signed else 1 / (2 * block)
    return np.asarray(atom + (block - 1) / block * given)


def index_probabilities(values: Sequence[float], block: int) -> Vector:
    """How often each index is used under absolute absmax."""
    inner = distribution(midpoints(values), block)
    return np.diff(np.concatenate(([0.0], inner, [1.0])))


def residuals(
    values: Sequence[float], block: int, power: int, metric: str, edges: Sequence[float] | None = None
) -> Vector:
    """How far each level is from stationary, blocks weighted by m^power (codes 4.3 and 4.4 of the literature).

    `mae`: 2 H(c) - H(b) - H(b'), H(x) the integral of m^power G(m x); `mse`: c (D(b') - D(b)) - (N(b) - N(b')).
    """
    m, probability, inside = maxima(block)
    weight, ends, levels = probability / inside * m**power, cells(values, edges), np.asarray(values)

    def mass(x: Vector) -> Vector:
        return np.asarray(special.ndtr(np.multiply.outer(x, m)) @ weight)

    if metric == "mae":
        return 2 * mass(levels) - mass(ends[:-1]) - mass(ends[1:])
    first = normal_density(np.multiply.outer(ends, m)) @ (weight / m)
    return levels * np.diff(mass(ends)) - (first[:-1] - first[1:])
