"""One layer of a tensor that shares its grid with others: its numbers for a common step, and what they cost.

`core.rounding.stacked_grid` searches the step and puts the layers together. Nothing here knows how they are stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from core.rounding.objective import Objective, tiles
from core.rounding.successive import Doubles, Integers, Scales, Search, best_numbers, round_to_steps
from core.rounding.views import View
from core.tensors.grid import MOST

_PRICE = math.log(2)  # half of what a bit is worth, 2 ln 2 D
_LEAST_STD = 0.05
_LOOKED_AT = 2048  # rows, for mean squares


@dataclass(frozen=True)
class StackLayer:
    """A layer's weight fp32 (out, in) and its objective; `scales` of its blocks, `steps` (places,) in units of c."""

    view: View
    weight: torch.Tensor
    objective: Objective
    scales: Scales
    steps: Doubles

    def sampled(self, rows: int) -> StackLayer:
        """The same of some rows, evenly spaced."""
        count = min(rows, len(self.weight))
        places = torch.arange(count) * len(self.weight) // max(count, 1)
        values = np.ascontiguousarray(self.scales.values[:, places.numpy()])
        residual = self.objective.residual
        objective = self.objective if residual is None else replace(self.objective, residual=residual[places])
        scales = Scales(values, self.scales.blocks)
        return replace(self, weight=self.weight[places], objective=objective, scales=scales)

    def squares(self) -> Doubles:
        """The mean square of the weights of each place in units of their scales and steps."""
        if not self.weight.numel():
            return np.zeros(self.objective.inputs)
        rows = self._rows(0, min(len(self.weight), _LOOKED_AT))
        over = (rows / self._scale_values(0, len(rows))).square().mean(dim=0).numpy()
        return np.asarray(over / self.steps**2, np.float64)

    def numbers(self, step: float, paths: int) -> Integers:
        """Numbers (out, in) for c = `step`; 0 for inputs that are always zero."""
        found, order = np.zeros(tuple(self.weight.shape), np.int32), self.objective.order.numpy()
        for first, last in self._tiles if len(order) else []:
            targets = self.objective.targets(self._rows(first, last), first).contiguous()
            steps, scales = step * self.steps, self.scales.of_rows(first, last)
            alone = round_to_steps(targets.clone(), self.objective.factor, steps, scales, np.ones(len(order))).numbers
            if paths > 1:
                search = Search(paths, _PRICE * self._error(steps, scales), _spreads(alone))
                alone = best_numbers(targets, self.objective.factor, steps, scales, search)
            found[first:last, order] = alone.T
        return np.clip(found, -MOST, MOST, out=found)

    def normal_equations(self, numbers: Integers) -> tuple[torch.Tensor, torch.Tensor]:
        """(M, d) of M gains = d for the places: H o (V^T V) and the sums over rows of C o V, V as decoded at c = 1."""
        gram = torch.zeros_like(self.objective.hessian)
        along = torch.zeros(self.objective.inputs, dtype=torch.float64)
        for first, last in self._tiles:
            decoded = self._values(numbers, first, last)
            gram.addmm_(decoded.T, decoded)
            along += (self.objective.cross(self._rows(first, last), first) * decoded).sum(dim=0)
        return gram.mul_(self.objective.hessian), along

    def cost(self, decoded: torch.Tensor) -> float:
        """The objective of a decoded layer (out, in) without its constant."""
        total = 0.0
        for first, last in self._tiles:
            cross = self.objective.cross(self._rows(first, last), first)
            total += self.objective.excess(self.objective.rows(decoded, first, last), cross)
        return total

    @property
    def _tiles(self) -> list[tuple[int, int]]:
        return tiles(len(self.weight), self.objective.inputs)

    def _rows(self, first: int, last: int) -> torch.Tensor:
        return self.objective.rows(self.weight, first, last)

    def _values(self, numbers: Integers, first: int, last: int) -> torch.Tensor:
        """What the numbers (out, in) of some rows stand for at c = 1, fp64 (rows, places)."""
        found = torch.from_numpy(numbers[first:last].astype(np.float64))[:, self.objective.order]
        return found * self._scale_values(first, last) * torch.from_numpy(self.steps)

    def _scale_values(self, first: int, last: int) -> torch.Tensor:
        values = torch.from_numpy(self.scales.values[:, first:last].T.copy())[:, torch.from_numpy(self.scales.blocks)]
        return torch.where(values > 0, values, 1.0)

    def _error(self, steps: Doubles, scales: Scales) -> float:
        """About the squared error per weight."""
        return float(np.mean((steps * self.objective.units.numpy()) ** 2) * (scales.values**2).mean()) / 12


def _spreads(numbers: Integers) -> Doubles:
    found: Doubles = np.maximum(np.sqrt((numbers.astype(np.float64) ** 2).mean(axis=1)), _LEAST_STD)
    return found
