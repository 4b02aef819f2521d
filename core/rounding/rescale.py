"""Scales of rows and columns fitted to numbers that stand: What = T Z diag(values) at the least objective.

Alternating least squares (data-aware rounding, section 4.6): each half step is exact, so the objective never rises.
Memory: some matrices of the inputs and a tile of rows; what is formed of rows is summed up tile by tile in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from core.formats.stored import CENTROIDS
from core.rounding.objective import Objective, tiles
from core.tensors.column_scales import as_stored, stored_values

_RIDGE = 1e-8
_CLOSE = 3e-4
_FURTHEST = (-0.1, 1.5)
_SHORTER = (0.5, 0.25, 0.125, 0.0625)


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
    gains = torch.linalg.solve(ridged, wanted).clamp(*_FURTHEST)
    return torch.where(unused, 1.0, gains)


@dataclass(frozen=True)
class Numbers:
    """A weight fp32 (rows, columns), and its numbers (places, rows) as they were rounded."""

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
        return sum(self.objective.excess(self._decoded(fit, *rows), self._cross(*rows)) for rows in self._tiles)

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
        found = []
        for first, last in self._tiles:
            plain = self._decoded(replace(fit, rows=torch.ones_like(fit.rows)), first, last)
            along = (self._cross(first, last) * plain).sum(dim=1)
            square = ((plain @ self.objective.hessian) * plain).sum(dim=1)
            found.append(torch.where(square > 0, along / square.clamp(min=1e-300), 1.0))
        rows = torch.cat(found)
        mean = rows.abs().mean()
        return Fit(rows / mean, fit.columns * mean) if float(mean) > 0 else fit

    def fitted(self, fit: Fit, *, rounds: int) -> Fit:
        """Columns and rows in turn, until the objective stays."""
        before = self.excess(fit)
        for _ in range(rounds):
            fit = self.rows_fitted(self.columns_fitted(fit))
            now = self.excess(fit)
            if abs(before - now) <= _CLOSE * abs(now):
                break
            before = now
        return fit

    def _normal_equations(self, fit: Fit) -> tuple[torch.Tensor, torch.Tensor]:
        """(M, d) of M gains = d for the columns: H o (V^T V) and the columns' sums of C o V, V as decoded now."""
        places = self.objective.inputs
        gram = self.objective.hessian.new_zeros(places, places)
        along = self.objective.hessian.new_zeros(places)
        for rows in self._tiles:
            decoded = self._decoded(fit, *rows)
            gram.addmm_(decoded.T, decoded)
            along += (self._cross(*rows) * decoded).sum(dim=0)
        return gram.mul_(self.objective.hessian), along

    def _decoded(self, fit: Fit, first: int, last: int) -> torch.Tensor:
        values = self.numbers[:, first:last].T.double() * fit.columns
        return values * fit.rows[first:last, None]

    def _cross(self, first: int, last: int) -> torch.Tensor:
        return self.objective.cross(self.objective.rows(self.weight, first, last), first)

    @property
    def _tiles(self) -> list[tuple[int, int]]:
        return tiles(len(self.weight), self.objective.inputs)
