"""R of a table of values, exactly, from closed-form partial moments of the sources: an oracle without sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Vector = NDArray[np.float64]


class Source:
    """A zero-mean density of unit variance: normal, laplace or t<nu>."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nu = float(name[1:]) if name.startswith("t") else 0.0

    def density(self, x: Vector) -> Vector:
        if self.name == "normal":
            return np.asarray(np.exp(-x * x / 2) / np.sqrt(2 * np.pi))
        if self.name == "laplace":
            return np.asarray(np.exp(-np.sqrt(2) * np.abs(x)) / np.sqrt(2))
        return np.asarray(stats.t.pdf(x * self._sigma, self.nu) * self._sigma)

    @property
    def _sigma(self) -> float:
        """Standard deviation of the standard t."""
        return float(np.sqrt(self.nu / (self.nu - 2)))

    def moments(self, x: Vector) -> tuple[Vector, Vector, Vector]:
        """Integrals of f, u f and u^2 f from -infinity to x (the odd one up to its constant, which is 0)."""
        if self.name == "normal":
            below = special.ndtr(x)
            return below, -self.density(x), below - np.where(np.isinf(x), 0, x) * self.density(x)
        if self.name == "laplace":
            return self._laplace(x)
        return self._student(x)

    def _laplace(self, x: Vector) -> tuple[Vector, Vector, Vector]:
        rate, size = np.sqrt(2), np.abs(np.where(np.isinf(x), 0, x))
        tail = np.where(np.isinf(x), 0, np.exp(-rate * np.abs(x)) / 2)  # mass beyond |x|
        first = tail * (size + 1 / rate)
        second = tail * (size**2 + 2 * size / rate + 2 / rate**2)
        negative = x < 0
        return np.where(negative, tail, 1 - tail), -first, np.where(negative, second, 1 - second)

    def _student(self, x: Vector) -> tuple[Vector, Vector, Vector]:
        nu, z = self.nu, x * self._sigma
        finite = np.where(np.isinf(z), 0, z)
        pdf = np.where(np.isinf(z), 0, stats.t.pdf(finite, nu))
        zeroth = np.asarray(stats.t.cdf(z, nu))
        first = -(nu + finite**2) * pdf / (nu - 1)
        second = (nu * zeroth - finite * (nu + finite**2) * pdf) / (nu - 2)
        return zeroth, first / self._sigma, second / self._sigma**2


def cell_errors(source: Source, values: Vector, edges: Vector) -> Vector:
    """Integral of (x - value)^2 f over cells; `edges` has one more entry than `values` on the last axis."""
    zeroth, first, second = (np.diff(moment, axis=-1) for moment in source.moments(edges))
    return np.asarray(second - 2 * values * first + values**2 * zeroth)


def r_of_table(source: Source, values: Sequence[float]) -> float:
    """R when the scale is the true standard deviation."""
    table = np.asarray(values)
    edges = np.concatenate(([-np.inf], (table[1:] + table[:-1]) / 2, [np.inf]))
    return float(np.sqrt(cell_errors(source, table, edges).sum()))


def r_of_blocks(source: Source, values: Sequence[float], block: int, points: int = 4001) -> float:
    """R when blocks of `block` are divided by their largest magnitude, which lands on an end code without error.

    R^2 = (B-1)/B E_M[E[(x - q(x))^2 | |x| <= M]], M the absmax of B draws; trapezoid rule in log M.
    """
    table = np.asarray(values)
    grid = np.linspace(np.log(1e-3), np.log(1e4), points)
    maxima = np.exp(grid)
    inside = source.moments(maxima)[0] - source.moments(-maxima)[0]
    weight = block * inside ** (block - 1) * 2 * source.density(maxima) * maxima  # dM = M dlog M
    inner = np.clip((table[1:] + table[:-1]) / 2, -1, 1)
    edges = np.concatenate(([-1.0], inner, [1.0])) * maxima[:, None]
    errors = cell_errors(source, table[None, :] * maxima[:, None], edges).sum(axis=1) / inside
    return float(np.sqrt((block - 1) / block * np.trapezoid(weight * errors, grid)))


def expected_absmax(source: Source, block: int) -> float:
    """E[max|x|] of `block` draws."""
    grid = np.linspace(np.log(1e-3), np.log(1e4), 20001)
    maxima = np.exp(grid)
    inside = source.moments(maxima)[0] - source.moments(-maxima)[0]
    weight = block * inside ** (block - 1) * 2 * source.density(maxima) * maxima
    return float(np.trapezoid(weight * maxima, grid))
