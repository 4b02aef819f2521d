"""What formats can reach on Normal, Laplace and Student-t weights: exact errors, and the limits of scalar coding.

R is the RMS error over the RMS of the weights. Everything is closed form, but for blocks, where the distribution of
the largest magnitude M of B draws is integrated by a trapezoid rule in log M (spectrally accurate: the integrand is
analytic and vanishes at both ends). Section numbers are those of Optimal Formats for Weight Quantisation,
arXiv 2505.12988. No sampling, no torch; scipy is loaded at the first call.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidFormat
from core.formats import root_density

Vector = NDArray[np.float64]

_NEGLIGIBLE = 1e-18  # of the mass of block maxima, at either end
_LARGEST = 1e100  # of a block maximum: the nearly infinite variance of t with nu < 2.2 is cut off there
_NODES_PER_SPREAD = 8  # quadrature nodes between the quartiles of log M
_GRID_TAIL = 1e-13  # of the mass of a grid's listed cells
_MOST_CELLS = 1 << 16  # of a grid on each side


class Law(Protocol):
    """A symmetric measure on the real line.

    `tails(x)`: the integrals of 1, u and u^2 over (|x|, infinity), `x` of any shape; all 0 for infinite x.
    """

    def density(self, x: Vector) -> Vector: ...

    def tails(self, x: Vector) -> tuple[Vector, Vector, Vector]: ...


@dataclass(frozen=True)
class Source:
    """A zero-mean probability density with RMS 1; `log_density` and `upper` take finite x >= 0."""

    log_density: Callable[[Vector], Vector]
    upper: Callable[[Vector], tuple[Vector, Vector, Vector]]

    def density(self, x: Vector) -> Vector:
        """f(x), 0 for infinite x."""
        return np.asarray(np.exp(self.log_density(np.abs(x))))

    def tails(self, x: Vector) -> tuple[Vector, Vector, Vector]:
        """Integrals of f, u f and u^2 f from |x| to infinity."""
        far = np.isinf(x)
        zeroth, first, second = self.upper(np.where(far, 0.0, np.abs(x)))
        return np.where(far, 0.0, zeroth), np.where(far, 0.0, first), np.where(far, 0.0, second)


@dataclass(frozen=True)
class BlockMixture:
    """The weights of a block over its largest magnitude, the largest one left out, weighted by M^power.

    A sum over values m of the maximum: m times the density of a draw at m x, with weight (probability of m) / (mass of
    a draw inside [-m, m]) * m^power. Meaningful on [-1, 1]. Power 2 gives squared errors in units of the weights' RMS.
    """

    source: Source
    maxima: Vector
    weights: Vector

    def density(self, x: Vector) -> Vector:
        """The weighted density at x."""
        return np.asarray(self.source.density(np.multiply.outer(x, self.maxima)) @ (self.weights * self.maxima))

    def tails(self, x: Vector) -> tuple[Vector, Vector, Vector]:
        """Integrals of the density, and of it times u and u^2, from |x| to infinity."""
        zeroth, first, second = self.source.tails(np.multiply.outer(x, self.maxima))
        weights = self.weights
        return zeroth @ weights, first @ (weights / self.maxima), second @ (weights / self.maxima**2)


@lru_cache(maxsize=64)
def source(family: str, nu: float | None) -> Source:
    """The density of `normal`, `laplace` or `t` (`nu` > 2) with its closed-form partial moments."""
    if family == "normal":
        return _normal()
    if family == "laplace":
        return _laplace()
    if family != "t" or nu is None or not 2 < nu < math.inf:
        raise InvalidFormat(f"no source {family!r} with nu {nu} and a variance", hint="normal, laplace, t with nu > 2")
    return _student(nu)


@lru_cache(maxsize=64)
def block_mixture(family: str, nu: float | None, block: int, power: int) -> BlockMixture:
    """The mixture of blocks of `block` >= 2 weights; see BlockMixture."""
    from scipy import special

    draws = source(family, nu)
    nodes, step = _log_maxima(family, nu, block, power)
    maxima = np.exp(nodes)
    inside = special.xlog1py(block - 2, -2 * draws.tails(maxima)[0])  # log A(m)^(B-2)
    logarithm = math.log(2 * block) + draws.log_density(maxima) + inside + (1 + power) * nodes
    return BlockMixture(draws, maxima, np.exp(logarithm) * step)


def cell_moments(law: Law, edges: Vector) -> tuple[Vector, Vector, Vector]:
    """Integrals of 1, u and u^2 over the cells between ascending `edges`, one fewer than edges.

    Differences are taken between tails of the same side, so that far cells keep their relative accuracy.
    """
    zeroth, first, second = law.tails(np.append(edges, 0.0))
    across = np.sign(edges[:-1]) * np.sign(edges[1:]) < 0

    def even(tail: Vector) -> Vector:
        low, high = tail[:-2], tail[1:-1]
        return np.where(across, 2 * tail[-1] - low - high, np.abs(low - high))

    return even(zeroth), first[:-2] - first[1:-1], even(second)


def r_of_table(family: str, nu: float | None, values: Sequence[float]) -> float:
    """R of the table `values` (ascending, in units of the RMS) with nearest values, scaled by the true RMS."""
    return math.sqrt(_squared_error(source(family, nu), values, math.inf))


def r_of_blocks(family: str, nu: float | None, values: Sequence[float], block: int) -> float:
    """R of the table `values` (ascending, in [-1, 1]) in blocks of `block` with unrounded scales.

    The scale takes the largest magnitude of a block to an end of the table without error (absmax to -1 and +1,
    signmax to +1): R^2 = (B-1)/B E_M[E[(x - q(x))^2 | |x| <= M]].
    """
    if block < 2:
        return 0.0
    error = _squared_error(block_mixture(family, nu, block, 2), values, 1.0)
    return math.sqrt((block - 1) / block * error)


def panter_dite(family: str, nu: float | None) -> float:
    """The limit of R 2^b for fixed-length codes: sqrt((integral of f^(1/3))^3 / 12) (section 2)."""
    if family == "normal":
        return math.sqrt(math.sqrt(3) * math.pi / 2)
    if family == "laplace":
        return math.sqrt(4.5)
    from scipy import special

    source(family, nu)
    freedom = nu or 0.0
    spread = math.sqrt(freedom) * float(special.beta(0.5, (freedom - 2) / 6))
    cubed = spread**3 * math.exp(_log_peak(freedom))
    return math.sqrt(cubed / 12 * (freedom - 2) / freedom)


def entropy_coded_uniform_limit(family: str, nu: float | None) -> float:
    """The limit of R 2^H for a uniform grid with an ideal entropy code: 2^h / sqrt(12) (section 2)."""
    return math.exp(_differential_entropy(family, nu)) / math.sqrt(12)


def shannon(family: str, nu: float | None) -> float:
    """Shannon's lower bound on R 2^b: 2^h / sqrt(2 pi e) (section 2)."""
    return math.exp(_differential_entropy(family, nu)) / math.sqrt(2 * math.pi * math.e)


@dataclass(frozen=True)
class EntropyCodedGrid:
    """The grid k delta, k any integer, with an ideal entropy code; `delta` in units of the weights' RMS.

    `r`: values at k delta; `r_centroid`: values at the means of the cells, at the same rate. `probabilities[i]` is that
    of k = `lowest` + i; what is missing to 1 lies further out, as much on either side.
    """

    delta: float
    r: float
    r_centroid: float
    lowest: int
    probabilities: tuple[float, ...]


@lru_cache(maxsize=256)
def entropy_coded_grid(family: str, nu: float | None, bits: float) -> EntropyCodedGrid:
    """The grid whose cells have an entropy of exactly `bits` > 0 (section 8); InvalidFormat over 14 bits."""
    from scipy import optimize

    if not 0 < bits <= 14:
        raise InvalidFormat(f"a grid of {bits:g} bits", hint="more than 0 and at most 14 bits")

    def excess(log_delta: float) -> float:
        return _grid_entropy(family, nu, math.exp(log_delta)) - bits

    low = _differential_entropy(family, nu) - bits * math.log(2) - 0.5  # the limit's delta, and a margin
    high = low + 1.5
    while excess(high) > 0:
        high += 1
    return _grid(family, nu, math.exp(optimize.brentq(excess, low, high, xtol=1e-13)))


def huffman_overhead(probabilities: Sequence[float]) -> float:
    """Mean length of an optimal Huffman code, symbol by symbol, minus the entropy, in bits; zeros do not count."""
    heap = [one for one in probabilities if one > 0]
    entropy = -sum(one * math.log2(one) for one in heap)
    heapq.heapify(heap)
    length = 0.0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        length += merged
        heapq.heappush(heap, merged)
    return length - entropy


def _squared_error(law: Law, values: Sequence[float], end: float) -> float:
    """Integral of (u - nearest value)^2 over [-end, end]."""
    table = np.asarray(values, dtype=np.float64)
    edges = np.clip((table[1:] + table[:-1]) / 2, -end, end)
    zeroth, first, second = cell_moments(law, np.concatenate(([-end], edges, [end])))
    return float((second - 2 * table * first + table**2 * zeroth).sum())


def _normal() -> Source:
    from scipy import special

    constant = 0.5 * math.log(2 * math.pi)

    def upper(x: Vector) -> tuple[Vector, Vector, Vector]:
        beyond, density = special.ndtr(-x), np.exp(-x * x / 2 - constant)
        return beyond, density, beyond + x * density

    return Source(lambda x: -x * x / 2 - constant, upper)


def _laplace() -> Source:
    rate, constant = math.sqrt(2), 0.5 * math.log(2)

    def upper(x: Vector) -> tuple[Vector, Vector, Vector]:
        beyond = np.exp(-rate * x) / 2
        return beyond, beyond * (x + 1 / rate), beyond * (x * x + rate * x + 1)

    return Source(lambda x: -rate * x - constant, upper)


def _student(nu: float) -> Source:
    """t with `nu` degrees of freedom divided by its standard deviation; z is the number before division."""
    from scipy import special

    deviation = math.sqrt(nu / (nu - 2))
    peak = _log_peak(nu)

    def log_standard(z: Vector) -> Vector:
        return np.asarray(peak - (nu + 1) / 2 * np.log1p(z * z / nu))

    def upper(x: Vector) -> tuple[Vector, Vector, Vector]:
        z = x * deviation
        beyond, flank = special.stdtr(nu, -z), (nu + z * z) * np.exp(log_standard(z))
        return beyond, flank / ((nu - 1) * deviation), (nu * beyond + z * flank) / ((nu - 2) * deviation**2)

    return Source(lambda x: log_standard(x * deviation) + math.log(deviation), upper)


def _log_peak(nu: float) -> float:
    """log of the density of the standard t at 0."""
    from scipy import special

    return -float(special.betaln(nu / 2, 0.5)) - 0.5 * math.log(nu)


def _differential_entropy(family: str, nu: float | None) -> float:
    """h of the source with RMS 1, in nats."""
    from scipy import special

    source(family, nu)
    if family == "normal":
        return 0.5 * math.log(2 * math.pi * math.e)
    if family == "laplace":
        return 1 + 0.5 * math.log(2)
    freedom = nu or 0.0
    digammas = float(special.digamma((freedom + 1) / 2) - special.digamma(freedom / 2))
    return (freedom + 1) / 2 * digammas - _log_peak(freedom) - 0.5 * math.log(freedom / (freedom - 2))


def _log_maxima(family: str, nu: float | None, block: int, power: int) -> tuple[Vector, float]:
    """Equidistant nodes in log M over all that matters, and their distance."""
    law = root_density.density(family, nu, 1.0)

    def quantile(log_probability: float) -> float:
        """The value below which all of `block` draws stay with that probability."""
        return law.inverse_tail(-math.expm1(log_probability / block) / 2)

    middle = quantile(math.log(0.5))
    spread = math.log(quantile(math.log(0.75)) / quantile(math.log(0.25)))
    low, high = quantile(math.log(_NEGLIGIBLE)), middle
    while block * law.upper_tail(high) * (high / middle) ** power > _NEGLIGIBLE and high < _LARGEST:
        high *= 1.1
    start, end = math.log(low), math.log(high)
    count = 2 + math.ceil((end - start) / spread * _NODES_PER_SPREAD)
    return np.linspace(start, end, count), (end - start) / (count - 1)


def _grid_cells(family: str, nu: float | None, delta: float) -> tuple[Vector, tuple[Vector, Vector, Vector]]:
    """k = 0, 1, ... up to where hardly any mass is left, and the moments of their cells."""
    edge = root_density.density(family, nu, 1.0).inverse_tail(_GRID_TAIL)
    count = min(math.ceil(edge / delta), _MOST_CELLS)
    index = np.arange(count + 1, dtype=np.float64)
    edges = np.concatenate(([-0.5], index + 0.5)) * delta
    return index, cell_moments(source(family, nu), edges)


def _grid_entropy(family: str, nu: float | None, delta: float) -> float:
    """Entropy of all cells in bits; beyond the listed ones density follows its power law (t) or nothing is left."""
    index, (probability, _, _) = _grid_cells(family, nu, delta)
    from scipy import special

    entropy = special.entr(probability)
    listed = float(entropy[0] + 2 * entropy[1:].sum())
    if nu is not None:
        edge = np.asarray([(index[-1] + 0.5) * delta])
        law = source(family, nu)
        beyond = float(law.tails(edge)[0][0])
        listed += 2 * beyond * ((nu + 1) / nu - float(law.log_density(edge)[0]) - math.log(delta))
    return listed / math.log(2)


def _grid(family: str, nu: float | None, delta: float) -> EntropyCodedGrid:
    index, (zeroth, first, second) = _grid_cells(family, nu, delta)
    sides = np.where(index == 0, 1.0, 2.0)
    at_grid = second - 2 * index * delta * first + (index * delta) ** 2 * zeroth
    at_mean = second - np.divide(first**2, zeroth, out=np.zeros_like(first), where=zeroth > 0)
    beyond = 2 * float(source(family, nu).tails(np.asarray([(index[-1] + 0.5) * delta]))[0][0]) * delta**2 / 12
    return EntropyCodedGrid(
        delta=delta,
        r=math.sqrt(float(sides @ at_grid) + beyond),
        r_centroid=math.sqrt(float(sides @ at_mean) + beyond),
        lowest=-len(index) + 1,
        probabilities=(*zeroth[:0:-1].tolist(), *zeroth.tolist()),
    )
