"""Lloyd–Max codebooks without data: the least squared error for a known density, per tensor RMS and per block.

`lloyd_max` is the optimum of RMS scaling, `block_lloyd_max` that of blocks scaled by their largest magnitude with the
end codes pinned to it (Optimal Formats for Weight Quantisation, arXiv 2505.12988, sections 4 and 6.4). `solve_levels`
is the solver of both and of `core.formats.block_optimal`: Newton on the stationarity conditions, whose Jacobian is the
tridiagonal Hessian of the error, kept on the way down by Cholesky's refusal and a line search on the gradient.

Promise: a codebook that is returned is strictly ascending and stationary (residual below 1e-10); what cannot be solved
is InvalidFormat. Float64, no torch, no sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from core.errors import InvalidFormat
from core.formats import root_density
from core.formats.limits import Law, Vector, block_mixture, cell_moments, source

Metric = Literal["mse", "mae"]

MAX_CODES = 1024  # of a codebook that is solved for: up to seconds for heavy tails in blocks
_MOST_STEPS = 200
_CLOSE = 1e-7  # of the distance to the cell's nearer end: Newton squares it, so that this step is the last
_RESIDUAL = 1e-10
_OVERSHOOT = 0.5  # of the slope: how steeply the error may rise again at the end of a step
_SHIFTS = (0.0, 1e-3, 1e-2, 0.1, 0.5, 1.0, 4.0, 16.0, 256.0)
_HALVINGS = 30
_PLACES = 256


@dataclass(frozen=True)
class Boundary:
    """What lies next to the outermost free level: a fixed level, half-way to which its cell ends, or the cell's end."""

    position: float
    is_level: bool


@dataclass(frozen=True)
class _Iterate:
    """Free levels, the ends of their cells, the error's derivatives by them (halved for `mse`) and their scale.

    A step of -gradient / scale is one of Lloyd's iteration for `mse`, and the nearest thing to it for `mae`.
    """

    levels: Vector
    edges: Vector
    gradient: Vector
    scale: Vector

    @property
    def reach(self) -> tuple[Vector, Vector]:
        """Distances from the levels to the lower and the upper ends of their cells."""
        return self.levels - self.edges[:-1], self.edges[1:] - self.levels


@dataclass(frozen=True)
class _Problem:
    """The expected error as a function of the free levels between two boundaries."""

    law: Law
    left: Boundary
    right: Boundary
    metric: Metric

    def at(self, levels: Vector) -> _Iterate:
        """The levels with their first derivatives."""
        first = (self.left.position + levels[0]) / 2 if self.left.is_level else self.left.position
        last = (levels[-1] + self.right.position) / 2 if self.right.is_level else self.right.position
        edges = np.concatenate(([first], (levels[1:] + levels[:-1]) / 2, [last]))
        if self.metric == "mse":
            zeroth, odd, _ = cell_moments(self.law, edges)
            return _Iterate(levels, edges, levels * zeroth - odd, zeroth)
        ends = np.empty(2 * levels.size + 1)
        ends[::2], ends[1::2] = edges, levels
        mass = cell_moments(self.law, ends)[0]
        return _Iterate(levels, edges, mass[::2] - mass[1::2], 2 * self.law.density(levels))

    def hessian(self, point: _Iterate) -> tuple[Vector, Vector]:
        """Diagonal and off-diagonal; the end of a cell that is a constant does not move with its level."""
        slopes = np.full(point.edges.size, 0.5)
        slopes[0], slopes[-1] = 0.5 * self.left.is_level, 0.5 * self.right.is_level
        moved = self.law.density(point.edges) * slopes
        below, above = point.reach if self.metric == "mse" else (np.ones_like(point.levels),) * 2
        above = np.where(np.isinf(above), 0.0, above)
        return point.scale - below * moved[:-1] - above * moved[1:], -below[1:] * moved[1:-1]

    def is_ordered(self, levels: Vector) -> bool:
        """Whether the levels ascend strictly between the boundaries."""
        return bool(np.all(np.diff(np.concatenate(([self.left.position], levels, [self.right.position]))) > 0))


def solve_levels(law: Law, start: Vector, left: Boundary, right: Boundary, metric: Metric) -> Vector:
    """The levels between `left` and `right` with the least expected error under `law`, from ascending `start`.

    `mse`: every level is the mean of its cell, for the sum of (u - c)^2; `mae`: its median, for that of |u - c| (Lloyd
    1982, Max 1960). None for an empty start. InvalidFormat where no ascending stationary levels were found.
    """
    if not start.size:
        return start
    problem = _Problem(law, left, right, metric)
    point = problem.at(start)
    for _ in range(_MOST_STEPS):
        step = _downhill(problem, point)
        if np.all(np.abs(step) < _CLOSE * np.minimum(*point.reach)):
            return _checked(problem, point.levels + step)
        point = _next(problem, point, step)
    raise _unsolved(start.size)


def spread_levels(law: Law, count: int, left: Boundary, right: Boundary, metric: Metric) -> Vector:
    """`count` levels between finite boundaries with the point density of fine codes: a start for `solve_levels`.

    The density to the power 1/3 for squared errors (Panter and Dite 1951), 1/2 for absolute ones; sampled more densely
    near 0, where heavy tails put its peak, and never at 0, where it may be infinite.
    """
    ends = np.linspace(math.copysign(abs(left.position) ** (1 / 3), left.position), 1.0, 2 * _PLACES + 1) ** 3
    density = law.density(ends[1::2]) ** (1 / 3 if metric == "mse" else 1 / 2)
    share = np.concatenate(([0.0], np.cumsum(density * np.diff(ends[::2]))))
    before, after = (1.0 if end.is_level else 0.5 for end in (left, right))
    wanted = (before + np.arange(count)) / (before + count - 1 + after)
    return np.asarray(np.interp(wanted * share[-1], share, ends[::2]))


@lru_cache(maxsize=256)
def lloyd_max(family: str, nu: float | None, codes: int) -> tuple[float, ...]:
    """The `codes` values (2 to 1024), ascending and symmetric, in units of the RMS, with the least R for that source.

    From the cube-root codebook, which has their point density.
    """
    _require_codes(codes, 2)
    start = np.asarray(root_density.codebook(family, nu, "rms", "sym", codes)[(codes + 1) // 2 :])
    law, zero = source(family, nu), Boundary(0.0, codes % 2 == 1)
    return _mirrored(solve_levels(law, start, zero, Boundary(math.inf, False), "mse"), codes)


@lru_cache(maxsize=256)
def block_lloyd_max(family: str, nu: float | None, statistic: str, codes: int, block: int) -> tuple[float, ...]:
    """The `codes` values in [-1, 1], ascending, with the least R in blocks of `block` weights, unrounded scales.

    `statistic` absmax: symmetric, -1 and +1 pinned, at least 3 codes; signmax: +1 pinned, no zero among the values.
    Blocks of one weight, which any such table represents exactly, take the table of two.
    """
    law, one = block_mixture(family, nu, max(block, 2), 2), Boundary(1.0, True)
    if statistic == "signmax":
        _require_codes(codes, 2)
        end = Boundary(-1.0, False)
        return (*solve_levels(law, spread_levels(law, codes - 1, end, one, "mse"), end, one, "mse").tolist(), 1.0)
    _require_codes(codes, 3)
    zero = Boundary(0.0, codes % 2 == 1)
    start = spread_levels(law, codes // 2 - 1, zero, one, "mse")
    return _mirrored(np.append(solve_levels(law, start, zero, one, "mse"), 1.0), codes)


def _downhill(problem: _Problem, point: _Iterate) -> Vector:
    """Newton's step, or one between it and Lloyd's where the Hessian is not positive definite."""
    from scipy import linalg

    diagonal, off = problem.hessian(point)
    for shift in _SHIFTS:
        banded = np.stack((np.append(0.0, off), diagonal + shift * point.scale))
        try:
            return np.asarray(linalg.solveh_banded(banded[0 if off.size else 1 :], -point.gradient))
        except linalg.LinAlgError:
            continue
    raise _unsolved(point.levels.size)


def _next(problem: _Problem, point: _Iterate, step: Vector) -> _Iterate:
    """The end of the longest of step, step/2, ... that keeps the order and after which the error hardly rises."""
    slope = float(point.gradient @ step)
    for halvings in range(_HALVINGS):
        levels = point.levels + step / 2**halvings
        if not problem.is_ordered(levels):
            continue
        reached = problem.at(levels)
        if float(reached.gradient @ step) <= _OVERSHOOT * abs(slope):
            return reached
    raise _unsolved(step.size)


def _checked(problem: _Problem, levels: Vector) -> Vector:
    """The levels if they ascend and no gradient, relative to all mass, is above 1e-10."""
    if problem.is_ordered(levels):
        mass = 2 * float(problem.law.tails(np.zeros(1))[0][0])
        if np.max(np.abs(problem.at(levels).gradient)) < _RESIDUAL * mass:
            return levels
    raise _unsolved(levels.size)


def _unsolved(count: int) -> InvalidFormat:
    return InvalidFormat(
        f"{count} free levels that minimise the error were not found", hint="fewer bits, or a lighter tail"
    )


def _require_codes(codes: int, least: int) -> None:
    if not least <= codes <= MAX_CODES:
        raise InvalidFormat(f"an optimal codebook of {codes} codes", hint=f"{least} to {MAX_CODES} codes")


def _mirrored(positive: Vector, codes: int) -> tuple[float, ...]:
    """Positive values, ascending, with their exact negatives, and a zero for an odd number of codes."""
    half = positive.tolist()
    return (*(-one for one in reversed(half)), *((0.0,) if codes % 2 else ()), *half)
