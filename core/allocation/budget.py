"""The solver: widths under a budget, as real numbers or from a list of points per group. Knows no tensors and no torch.

Promises: never above the budget; a pure function of its inputs, whatever the order they come in; ties go to the name
that sorts first. `choose` is exact (to a millionth of the loss) as long as fewer than 2^14 partial solutions are worth
keeping at once, which the bound of the lower convex hull sees to; beyond that they are thinned to one per cell of the
budget. It does not know where costs and losses come from. Source: fisher-and-allocation, section 7.2; the bound is the
linear relaxation of the multiple-choice knapsack (Sinha and Zoltners 1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from core.errors import InfeasibleTarget

_MAX_STATES = 1 << 14
_CLOSE_ENOUGH = 1e-6
_ROUNDING = 1e-12  # of a sum of N_t b_t in fp64

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
_Number = TypeVar("_Number", np.int64, np.float64)


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a group: `cost` in bytes (or any unit that the budget has), `loss` in nats per token."""

    cost: int
    loss: float
    label: str


def bounded_widths(
    gains: Sequence[float], elements: Sequence[int], low: Sequence[float], high: Sequence[float], budget: float
) -> list[float]:
    """Widths b_t = clip(b0 + g_t, lo_t, hi_t) in bits, with Σ N_t b_t equal to `budget` bits (all hi_t if it is more).

    Exact: the sum is piecewise linear in b0, so it is solved between two of its 2T breakpoints. This is the KKT optimum
    of Σ N_t c_t 4^-b_t with g_t = ½ log2 c_t (sections 7.1 and 7.2). InfeasibleTarget names the least Σ N_t lo_t.
    """
    g, n, lo, hi = (np.asarray(list(values), dtype=np.float64) for values in (gains, elements, low, high))
    least, most = float(n @ lo), float(n @ hi)
    if budget < least * (1 - _ROUNDING):
        raise InfeasibleTarget(f"the budget is {budget:g} bits, the smallest that can be met is {least:g}")
    if budget >= most:
        return [float(bits) for bits in hi]
    starts = np.concatenate([lo - g, hi - g])
    order = np.argsort(starts, kind="stable")
    starts = starts[order]
    slopes = np.cumsum(np.concatenate([n, -n])[order])
    sums = least + np.concatenate([[0.0], np.cumsum(slopes[:-1] * np.diff(starts))])
    at = min(max(int(np.searchsorted(sums, budget, side="right")) - 1, 0), len(starts) - 2)
    b0 = starts[at] + (budget - sums[at]) / slopes[at] if slopes[at] > 0 else starts[at]
    return [float(bits) for bits in np.clip(b0 + g, lo, hi)]


def choose(groups: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """One option per group with Σ cost <= budget and the least Σ loss; InfeasibleTarget names the least Σ cost."""
    if not groups:
        return {}
    table = _Table.of(groups)
    least = int(table.costs[:, 0].sum())
    if least > budget:
        raise InfeasibleTarget(f"the budget is {budget}, the smallest that can be met is {least}")
    return table.options_of(_improve(table, _start(table, budget), budget))


def hull_start(groups: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """The greedy answer: along the lower convex hulls, steepest first, then the best single steps that still fit.

    It is where `choose` starts from, and on its own not enough when one group holds much of the weights (7.2.3).
    """
    table = _Table.of(groups)
    return table.options_of(_start(table, budget).picks)


@dataclass(frozen=True)
class _Table:
    """The undominated options, groups by name, options by rising cost and falling loss, padded to one width.

    Padding has an endless loss and the cost of the last option, so it is never chosen.
    """

    names: list[str]
    options: list[list[Option]]
    costs: Integers
    losses: Floats

    @classmethod
    def of(cls, groups: Mapping[str, Sequence[Option]]) -> _Table:
        names = sorted(groups)
        options = [_undominated(groups[name]) for name in names]
        width = max(map(len, options))
        costs = np.array([[one.cost for one in row] + [row[-1].cost] * (width - len(row)) for row in options], np.int64)
        losses = np.array([[one.loss for one in row] + [np.inf] * (width - len(row)) for row in options], np.float64)
        return cls(names, options, costs, losses)

    def options_of(self, picks: Integers) -> dict[str, Option]:
        return {name: row[at] for name, row, at in zip(self.names, self.options, picks, strict=True)}

    def cost(self, picks: Integers) -> int:
        return int(_at(self.costs, picks).sum())

    def loss(self, picks: Integers) -> float:
        return float(_at(self.losses, picks).sum())


@dataclass(frozen=True)
class _Start:
    """A solution, and the price of a byte at which the hull's steps ran out of budget (0 when all of them fit)."""

    picks: Integers
    price: float


def _at(values: npt.NDArray[_Number], picks: Integers) -> npt.NDArray[_Number]:
    """The entry of each row that is picked."""
    found: npt.NDArray[_Number] = np.take_along_axis(values, picks[:, None], axis=1)[:, 0]
    return found


def _undominated(options: Sequence[Option]) -> list[Option]:
    """Options that no cheaper or equally dear one beats, by rising cost."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda one: (one.cost, one.loss, one.label)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _hull(row: Sequence[Option]) -> list[int]:
    """Positions of the vertices of the lower convex hull of an undominated row."""
    kept: list[int] = []
    for at, option in enumerate(row):
        while len(kept) > 1 and _price(row[kept[-2]], row[kept[-1]]) <= _price(row[kept[-2]], option):
            kept.pop()
        kept.append(at)
    return kept


def _price(cheap: Option, dear: Option) -> float:
    """Loss saved per unit of cost."""
    return (cheap.loss - dear.loss) / (dear.cost - cheap.cost)


def _start(table: _Table, budget: int) -> _Start:
    """Hull steps, steepest first and by name, up to the first that does not fit; then whatever single steps fit."""
    steps = []
    for group, row in enumerate(table.options):
        vertices = _hull(row)
        for before, after in pairwise(vertices):
            steps.append((-_price(row[before], row[after]), group, after, row[after].cost - row[before].cost))
    steps.sort()
    picks = np.zeros(len(table.names), np.int64)
    slack, price = budget - table.cost(picks), 0.0
    for negative, group, after, extra in steps:
        if extra > slack:
            price = -negative
            break
        picks[group], slack = after, slack - extra
    return _Start(_filled(table, picks, budget), price)


def _filled(table: _Table, picks: Integers, budget: int) -> Integers:
    """Single steps that fit, the largest drop of the loss per cost first, until none is left."""
    picks = picks.copy()
    slack = budget - table.cost(picks)
    while True:
        extra = table.costs - _at(table.costs, picks)[:, None]
        drop = _at(table.losses, picks)[:, None] - table.losses
        fits = (extra > 0) & (extra <= slack) & (drop > 0)
        if not fits.any():
            return picks
        rates = np.where(fits, drop / np.where(fits, extra, 1), -np.inf)
        group, option = np.unravel_index(int(rates.argmax()), rates.shape)
        slack -= int(extra[group, option])
        picks[group] = option


def _improve(table: _Table, start: _Start, budget: int) -> Integers:
    """The best solution, searched only among options whose reduced cost could still beat the start.

    At price λ, Σ min(loss + λ cost) − λ budget is a lower bound of the loss (Lagrange), and what an option lies above
    its group's minimum adds to it: options and partial solutions beyond the start's own gap to the bound cannot win.
    """
    lagrangian = table.losses + start.price * table.costs
    reduced = lagrangian - lagrangian.min(axis=1, keepdims=True)
    found = table.loss(start.picks)
    gap = found - (float(lagrangian.min(axis=1).sum()) - start.price * budget)
    if gap <= _CLOSE_ENOUGH * abs(found):
        return start.picks
    picks = _search(table, reduced, gap * (1 + _CLOSE_ENOUGH), budget)
    if picks is None or table.loss(picks) >= found:
        return start.picks
    return _filled(table, picks, budget)


def _search(table: _Table, reduced: Floats, gap: float, budget: int) -> Integers | None:
    """Dynamic programming over the undecided groups on the front of partial solutions (cost, loss, reduced cost)."""
    picks = (reduced <= gap).argmax(axis=1)
    undecided = [group for group, row in enumerate(reduced) if (row <= gap).sum() > 1]
    least = _at(table.costs, picks)
    decided = np.ones(len(picks), np.bool_)
    decided[undecided] = False
    costs = np.array([least[decided].sum()], np.int64)
    losses, excess = (np.array([_at(values, picks)[decided].sum()]) for values in (table.losses, reduced))
    later = int(least[undecided].sum())
    trail: list[tuple[Integers, Integers]] = []
    for group in undecided:
        options = np.flatnonzero(reduced[group] <= gap)
        later -= int(least[group])
        sums = (costs[:, None] + table.costs[group, options]).ravel()
        loss = (losses[:, None] + table.losses[group, options]).ravel()
        over = (excess[:, None] + reduced[group, options]).ravel()
        front = _front(sums, loss, (sums + later <= budget) & (over <= gap))
        if not len(front):
            return None
        costs, losses, excess = sums[front], loss[front], over[front]
        trail.append((front // len(options), options[front % len(options)]))
    if undecided:
        picks[undecided] = _traced(trail, int(losses.argmin()))
    return picks if table.cost(picks) <= budget else None


def _front(costs: Integers, losses: Floats, allowed: npt.NDArray[np.bool_]) -> Integers:
    """Positions of the allowed partial solutions that no cheaper one beats; thinned when there are too many."""
    there = np.flatnonzero(allowed)
    if len(there) < 2:
        return there
    order = there[np.lexsort((losses[there], costs[there]))]
    best = np.minimum.accumulate(losses[order])
    front: Integers = order[np.concatenate([[True], losses[order][1:] < best[:-1]])]
    if len(front) <= _MAX_STATES:
        return front
    first, last = int(costs[front[0]]), int(costs[front[-1]])
    cells = (costs[front] - first) * _MAX_STATES // (last - first + 1)
    new_cell = np.concatenate([[True], np.diff(cells) > 0])
    return np.compress(new_cell, front)


def _traced(trail: list[tuple[Integers, Integers]], state: int) -> Integers:
    """The options that led to the last state."""
    picks = np.zeros(len(trail), np.int64)
    for group in range(len(trail) - 1, -1, -1):
        parents, options = trail[group]
        picks[group], state = options[state], int(parents[state])
    return picks
