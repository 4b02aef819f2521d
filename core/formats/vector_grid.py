"""Grids of vectors: points of p numbers that represent p independent standard Normal numbers with least squared error.

In one dimension that is the Lloyd-Max codebook. In more there is no formula: the points are trained by Lloyd's
iteration on quasi-random samples (HIGGS: Malinovskii and others, arXiv 2411.17525). Every round takes the same Halton
sequence shifted by another number, which shakes points out of poor arrangements, and steps grow shorter; the last
rounds keep to one larger sample. What is reached lies within 1.5 % of the best grids that are published.

Promise: nothing is drawn at random, so a grid is the same in every process, and on any machine but for samples exactly
between two points. Decoders never train: points are stored, in fp16. Float64, no torch. Once a process it takes up to
two seconds for 512 points, up to five for 1024, five to thirty for 4096.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from core.formats.block_lloyd import lloyd_max

Points = NDArray[np.float64]

_BASES = (2, 3, 5, 7, 11, 13)  # of the Halton sequence, one for each dimension
_MOST_ROUNDS, _LEAST_ROUNDS, _WORK = 200, 64, 102_400  # as many as the work of so many points allows
_SAMPLES = 32  # a point and round
_LEAST_SAMPLES = (1 << 13, 1 << 15)  # in a round; in one of the last rounds
_FIRST_STEP, _LAST_STEP = 1.5, 0.5  # of the way to the mean of a cell
_LAST_ROUNDS, _PLAIN_ROUNDS = 8, 3  # of one sample; of these with steps right to the mean
_EDGE = 1e-12  # of probability, beyond which no sample lies


@lru_cache(maxsize=64)
def vector_grid(dimension: int, points: int) -> Points:
    """`points` vectors of 1 to 6 numbers, (points, dimension), in units of the RMS; in lexicographic order as stored.

    A solved or trained grid, which nobody can change. InvalidFormat for one dimension with more than 1024 points.
    """
    if dimension == 1:
        found = np.array(lloyd_max("normal", None, points))[:, None]
    else:
        found = _trained(dimension, points)
        found = found[np.lexsort(found.astype(np.float16).T[::-1])]
    found.flags.writeable = False
    return found


def stored_grid(dimension: int, points: int) -> NDArray[np.float16]:
    """The same as it is stored."""
    return vector_grid(dimension, points).astype(np.float16)


def halton(count: int, dimension: int) -> Points:
    """The first `count` points of the Halton sequence in (0, 1)^dimension, from that of number 1 on."""
    found = np.zeros((count, dimension))
    for axis, base in enumerate(_BASES[:dimension]):
        rest, place = np.arange(1, count + 1), 1.0
        while rest.any():
            place /= base
            found[:, axis] += place * (rest % base)
            rest //= base
    return found


def _trained(dimension: int, points: int) -> Points:
    """From points of the density that is best for many of them: that of a Normal with variance (p + 2) / p."""
    rounds = min(_MOST_ROUNDS, max(_LEAST_ROUNDS, _WORK // points))
    grid = _normal(halton(points, dimension)) * math.sqrt((dimension + 2) / dimension)
    uniform = halton(max(_SAMPLES * points, _LEAST_SAMPLES[0]), dimension)
    for number, shift in enumerate(_shifts(rounds, dimension)):
        step = _FIRST_STEP + (_LAST_STEP - _FIRST_STEP) * number / rounds
        grid = grid + step * (_centres(grid, _normal((uniform + shift) % 1.0)) - grid)
    sample = _normal(halton(max(rounds * points, _LEAST_SAMPLES[1]), dimension))
    for number in range(_LAST_ROUNDS):
        step = _FIRST_STEP if number < _LAST_ROUNDS - _PLAIN_ROUNDS else 1.0
        grid = grid + step * (_centres(grid, sample) - grid)
    return grid


def _centres(grid: Points, sample: Points) -> Points:
    """The mean of the samples nearest to each point; a point to which none is nearest stays."""
    from scipy.spatial import cKDTree

    cells = cKDTree(grid).query(sample)[1]
    counts = np.bincount(cells, minlength=len(grid))[:, None]
    sums = np.stack([np.bincount(cells, axis, len(grid)) for axis in sample.T], axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), grid)


def _shifts(count: int, dimension: int) -> Points:
    """Multiples, modulo 1, of powers of the generalised golden ratio, x^(p + 1) = x + 1: evenly spread shifts."""
    ratio = 2.0
    for _ in range(64):
        ratio = (1 + ratio) ** (1 / (dimension + 1))
    multiples: Points = np.arange(1, count + 1)[:, None] * ratio ** -np.arange(1.0, dimension + 1) % 1.0
    return multiples


def _normal(uniform: Points) -> Points:
    """Normal quantiles."""
    from scipy import special

    found: Points = special.ndtri(np.clip(uniform, _EDGE, 1 - _EDGE))
    return found
