"""Scales of rows and columns fitted to numbers that stand: What = T Z diag(values) at the least objective.

Alternating least squares (data-aware rounding, section 4.6): each half step is exact, so the objective never rises.
Memory: some matrices of the inputs and a tile of rows. Products of rows have the weight's precision, which holds sums
of products of whole numbers exactly up to 2^24; what is summed up over rows, and all that is solved, is fp64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from core.formats.stored import CENTROIDS
from core.rounding.objective import Objective, tiles
from core.tensors.column_scales import as_stored, stored_values

_RIDGE = 1e-8
_CLOSE = 3e-4
_FURTHEST = (-0.1, 1.5)
_STRIP = 128  # columns of a product that are worked out together
_GRADIENTS, _SMALLEST_LEFT = 60, 1e-10
_SHORTER = (0.5, 0.25, 0.125, 0.0625)

Tile = tuple[int, int, torch.Tensor]


@dataclass(frozen=True)
class Fit:
    """`rows` (rows,) and `columns` (places,), fp64: a number z is decoded as rows * columns * z."""

    rows: torch.Tensor
    columns: torch.Tensor


def stored_fit(fit: Fit, *, has_rows: bool) -> Fit:
    """With the scales as they can be stored: rows fp16, columns a byte each."""
    columns = torch.from_numpy(stored_values(fit.columns.clamp(min=0).numpy()))
    return Fit(fit.rows.half().double() if has_rows else fit.rows, columns)


def scale_parts(fit: Fit, objective: Objective, columns: int) -> dict[str, torch.Tensor]:
    """The parts of a grid with scales of columns, but those of rows; inputs that were left out have 0."""
    step, codes = as_stored(fit.columns.clamp(min=0).numpy())
    stored = torch.zeros(columns, dtype=torch.uint8)
    stored[objective.order] = torch.from_numpy(codes)
    return {
        "step": torch.tensor([step], dtype=torch.float32),
        "centroids": torch.zeros(CENTROIDS, dtype=torch.float16),
        "column_scales": stored,
    }


def _quadratic(matrix: torch.Tensor, wanted: torch.Tensor, gains: torch.Tensor) -> float:
    """The objective, but for its constant, with the columns of normal equations multiplied by gains."""
    return float(gains @ (matrix @ gains) - 2 * (wanted @ gains))


def _solved(matrix: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Gains of the columns, 1 for columns of zeros."""
    ridge, unused = _RIDGE * matrix.diagonal().mean(), matrix.diagonal() <= 0
    ridged = matrix + torch.diag(torch.where(unused, torch.ones_like(ridge), ridge))
    gains = _by_gradients(ridged, wanted)
    gains = torch.linalg.solve(ridged, wanted) if gains is None else gains
    return torch.where(unused, 1.0, gains.clamp(*_FURTHEST))


def _by_gradients(matrix: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor | None:
    """The solution of a positive definite system by conjugate gradients, or None where these are slow.

    By the diagonal they are few: what numbers of two columns have in common is small.
    """
    inverse = 1 / matrix.diagonal()
    found, left = torch.ones_like(wanted), wanted - matrix.sum(dim=1)
    turned = left * inverse
    along, square = turned.clone(), float(left @ turned)
    least = _SMALLEST_LEFT**2 * float(wanted @ (wanted * inverse))
    for _ in range(_GRADIENTS):
        if square <= least:
            return found
        pushed = matrix @ along
        length = square / float(along @ pushed)
        found, left = found + length * along, left - length * pushed
        turned = left * inverse
        before, square = square, float(left @ turned)
        along = turned + (square / before) * along
    return None


@dataclass(frozen=True)
class Numbers:
    """A weight (rows, columns), and its numbers (places, rows) as they were rounded."""

    weight: torch.Tensor
    numbers: torch.Tensor
    objective: Objective

    def columns_stored(self, fit: Fit) -> Fit:
        """The best that can be stored for the columns: the least squares or one factor for all, if that is better."""
        matrix, wanted = self._normal_equations(fit)
        gains = _solved(matrix, wanted)
        single = float(wanted.sum() / matrix.sum()) if float(matrix.sum()) > 0 else 1.0
        offered = [fit.columns, fit.columns * max(single, 0.1), fit.columns * gains]
        stored = [stored_fit(replace(fit, columns=columns), has_rows=False) for columns in offered]

        def cost(one: Fit) -> float:
            return _quadratic(matrix, wanted, torch.where(fit.columns > 0, one.columns / fit.columns, 1.0))

        return min(stored, key=cost)

    def excess(self, fit: Fit) -> float:
        """The objective without its constant."""
        total = 0.0
        for first, last, numbers in self._tiles:
            decoded = numbers * (fit.rows[first:last, None] * fit.columns).to(numbers.dtype)
            total += float(
                torch.sum((self._spread(decoded) - 2 * self._cross(first, last)) * decoded, dtype=torch.float64)
            )
        return total

    def cost(self, fit: Fit) -> float:
        """The same with another constant: the sum of `Objective.errors`."""
        total = 0.0
        for first, last, numbers in self._tiles:
            decoded = numbers * (fit.rows[first:last, None] * fit.columns).to(numbers.dtype)
            weight = self.objective.rows(self.weight, first, last, numbers.dtype)
            total += float(self.objective.errors(weight - decoded, weight, first).sum())
        return total

    def columns_fitted(self, fit: Fit) -> Fit:
        """With the columns' scales at the least objective for these rows' scales; as they were where none is less."""
        matrix, wanted = self._normal_equations(fit)
        gains = _solved(matrix, wanted)
        offered = [1 + share * (gains - 1) for share in (1.0, *_SHORTER, 0.0)]
        before = _quadratic(matrix, wanted, offered[-1])
        chosen = next(one for one in offered if _quadratic(matrix, wanted, one) <= before)
        return replace(fit, columns=fit.columns * chosen)

    def rows_fitted(self, fit: Fit) -> Fit:
        """With the rows' scales at the least objective for these columns' scales, of mean magnitude 1."""
        return self._rows_solved(fit)[0]

    def fitted(self, fit: Fit, *, rounds: int) -> Fit:
        """Columns and rows in turn, until the objective stays."""
        before = self.excess(fit)
        for _ in range(rounds):
            fit, now = self._rows_solved(self.columns_fitted(fit))
            if abs(before - now) <= _CLOSE * abs(now):
                break
            before = now
        return fit

    def _rows_solved(self, fit: Fit) -> tuple[Fit, float]:
        """The rows' scales that are best for these columns' scales, and the objective without its constant."""
        found, excess = [], 0.0
        for first, last, numbers in self._tiles:
            plain = numbers * fit.columns.to(numbers.dtype)
            along = torch.sum(self._cross(first, last) * plain, dim=1, dtype=torch.float64)
            square = torch.sum(self._spread(plain) * plain, dim=1, dtype=torch.float64)
            rows = torch.where(square > 0, along / square.clamp(min=1e-300), 1.0)
            excess += float(torch.sum(rows * (rows * square - 2 * along)))
            found.append(rows)
        rows = torch.cat(found)
        mean = rows.abs().mean()
        return (Fit(rows / mean, fit.columns * mean) if float(mean) > 0 else fit), excess

    def _normal_equations(self, fit: Fit) -> tuple[torch.Tensor, torch.Tensor]:
        """(M, d) of M gains = d for the columns: H o (V^T V) and the columns' sums of C o V, V as decoded now."""
        places = self.objective.inputs
        gram = self.objective.hessian.new_zeros(places, places)
        along = self.objective.hessian.new_zeros(places)
        for first, last, numbers in self._tiles:
            scaled = numbers * fit.rows[first:last, None].to(numbers.dtype)
            gram += _gram(scaled)
            along += torch.sum(self._cross(first, last) * scaled, dim=0, dtype=torch.float64)
        gram.mul_(self.objective.hessian).mul_(fit.columns).mul_(fit.columns[:, None])
        return gram, along * fit.columns

    def _spread(self, decoded: torch.Tensor) -> torch.Tensor:
        """What H."""
        return decoded @ self.objective.hessian.to(decoded.dtype)

    @cached_property
    def _runs(self) -> list[tuple[int, int]]:
        return tiles(len(self.weight), self.objective.inputs)

    @property
    def _tiles(self) -> Iterable[Tile]:
        """Numbers of runs of rows, (rows, places); where there is one run, they are kept, and so is its C."""
        return [self._whole] if len(self._runs) == 1 else (self._tile(*run) for run in self._runs)

    @cached_property
    def _whole(self) -> Tile:
        return self._tile(*self._runs[0])

    def _tile(self, first: int, last: int) -> Tile:
        numbers = self.numbers[:, first:last].T
        return first, last, numbers.to(self.weight.dtype, memory_format=torch.contiguous_format)

    def _cross(self, first: int, last: int) -> torch.Tensor:
        return self._whole_cross if len(self._runs) == 1 else self._cross_of(first, last)

    @cached_property
    def _whole_cross(self) -> torch.Tensor:
        return self._cross_of(*self._runs[0])

    def _cross_of(self, first: int, last: int) -> torch.Tensor:
        return self.objective.cross(self.objective.rows(self.weight, first, last, self.weight.dtype), first)


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """V^T V; of the two products that are alike one is computed."""
    places = rows.shape[1]
    found, turned = rows.new_empty(places, places), rows.T.contiguous()
    for low in range(0, places, _STRIP):
        high = min(low + _STRIP, places)
        torch.mm(turned[low:high], rows[:, :high], out=found[low:high, :high])
        found[:low, low:high] = found[low:high, :low].T
    return found
