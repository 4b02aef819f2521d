"""A weight and its statistics in units near 1, and whether its grid is worth more than one rounded to nearest.

Promise: no grid costs more than rounding to nearest does in the same bytes. Nearest is not worked out where some rows
show that it costs more: with the finest step that the entropy of its numbers allows, which is finer than any that fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from core.formats.stored import CENTROIDS, matrix_shape, stored_parts
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat
from core.rounding.descent import NEAREST_KEPT
from core.rounding.objective import Objective, tiles
from core.tensors.coded import HEAD_BYTES
from core.tensors.encoded import EncodedTensor
from core.tensors.nearest import Encoder, encode_nearest
from core.tensors.passes import require_finite

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity

_FARTHEST, _FARTHEST_DOUBLE = 120, 800  # of exponents, whose inverse fp32 holds, and fp64 that of a product of both
_LARGE = 1 << 18  # weights from which on nearest is estimated first
_LINES = 128  # rows and columns that it is estimated by
_DISTINCT, _LOOKED_AT = 512, 4096  # of so many weights; with fewer they may be a grid themselves, which a step fits
_STEPS, _CLOSE = 5, 0.01  # bits of entropy
_ERRORS = 4  # standard errors that tell for sure
_NORMAL_STEP = 4.133  # sqrt(2 pi e): of a Normal variable, at 0 bits by the formula for fine grids
_WIDEST = 1 << 12  # span of numbers that are counted


@dataclass(frozen=True)
class GridLayer:
    """A weight fp32 (rows, columns) and its objective, both in units near 1: the weight is `unit` times as large."""

    weight: torch.Tensor
    objective: Objective
    unit: float

    @classmethod
    def of(cls, weight: torch.Tensor, sensitivity: Sensitivity, chosen: RoundingSpec) -> GridLayer:
        """Of a weight of any shape, by the parameters of a method; NonFiniteWeights."""
        require_finite(weight)
        matrix = weight.detach().reshape(matrix_shape(tuple(weight.shape))).float()
        unit = _power_of_two(matrix)
        given = sensitivity.in_units(unit, _power_of_two(sensitivity.covariance, _FARTHEST_DOUBLE))
        objective = Objective.of(
            given, columns=chosen.columns or "natural", damping=chosen.damping or 0.0, diagonal=chosen.diagonal
        )
        return cls(matrix / unit, objective, unit)

    def or_nearest(self, weight: torch.Tensor, found: EncodedTensor, cost: float) -> EncodedTensor:
        """What was found with the objective's notes, or in the same bytes all weights to nearest where that costs less.

        `cost`: of what was found, `Objective.errors`.
        Errors that are carried on may end in columns of few bits: where inputs differ in scale by orders of magnitude,
        or single weights stand out.
        """
        if self.nearest_costs_at_least(weight, found.format) > cost:
            return found.with_notes(self.objective.notes)
        nearest = encode_nearest(weight, found.format)
        if self.cost(nearest) < cost:
            return nearest.with_notes((*self.objective.notes, NEAREST_KEPT))
        return found.with_notes(self.objective.notes)

    def nearest_costs_at_least(self, weight: torch.Tensor, fmt: TensorFormat) -> float:
        """A cost, in the measure of `cost`, that all weights to nearest have at least; -inf where nothing is known."""
        shape, generator = self.weight.shape, torch.Generator().manual_seed(0)
        if shape.numel() < _LARGE or len(set(weight.reshape(-1)[:_LOOKED_AT].tolist())) < _DISTINCT:
            return -math.inf
        rows, columns = (torch.randperm(count, generator=generator)[:_LINES] for count in shape)
        scales = (_scales(weight, fmt) / self.unit).expand(shape)
        across, down = self.weight[rows] / scales[rows], self.weight[:, columns] / scales[:, columns]
        rate = 8 * (stored_parts(fmt, tuple(weight.shape))["codes"][1][0] - HEAD_BYTES) / shape.numel()
        step = _finest_step(across, down.T.contiguous(), rate)
        if step is None:
            return -math.inf
        error = (across - _decoded(across, step)) * scales[rows]
        residual = None if self.objective.residual is None else self.objective.residual[rows]
        error, given = (self.objective.rows(one, 0, len(rows), torch.float32) for one in (error, self.weight[rows]))
        costs = replace(self.objective, residual=residual).errors(error, given)
        return float(shape[0] * (costs.mean() - _ERRORS * costs.std() / math.sqrt(len(rows))))

    def cost(self, encoded: EncodedTensor) -> float:
        """The sum of `Objective.errors` of a weight like this one."""
        decoded, total = encoded.decode().reshape(self.weight.shape) / self.unit, 0.0
        for first, last in tiles(len(self.weight), self.objective.inputs):
            weight, found = (self.objective.rows(one, first, last, torch.float32) for one in (self.weight, decoded))
            total += float(self.objective.errors(weight - found, weight, first).sum())
        return total


def _power_of_two(values: torch.Tensor | None, farthest: int = _FARTHEST) -> float:
    """That of the largest magnitude, so that dividing by it rounds nothing; 1 for zeros."""
    largest = float(values.abs().max()) if values is not None and values.numel() else 0.0
    return 2.0 ** max(math.frexp(largest)[1], -farthest) if largest > 0 else 1.0


def _scales(weight: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """What rounding to nearest divides weights by, fp32 (rows or 1, columns or 1)."""
    shape = tuple(weight.shape)
    encoder = Encoder(weight.detach().reshape(-1), fmt, shape, None, None)
    factors, grid = encoder.chosen_scales()[1].float(), encoder.grid
    factors = torch.where(factors > 0, factors, 1.0)
    if grid.one_scale:
        return factors.reshape(1, 1)
    blocks = torch.arange(grid.columns, device=factors.device) // grid.width
    factors = factors.view(-1, grid.blocks_per_row)
    return factors if grid.blocks_per_row == 1 else factors[:, blocks]


def _finest_step(across: torch.Tensor, down: torch.Tensor, rate: float) -> float | None:
    """The step at which numbers have `rate` bits of entropy each, taken line by line, below which no code of them goes.

    `across` some rows and `down` some columns of weights, each in units of their scales. None where it is not found.
    """
    power = float(across.square().mean())
    log = math.log2(_NORMAL_STEP * math.sqrt(power)) - rate if power > 0 else 0.0
    for _ in range(_STEPS if power > 0 else 0):
        found = [_line_entropy(torch.round(lines / 2.0**log)) for lines in (across, down)]
        bits = min(found)
        if abs(bits - rate) < _CLOSE:
            return float(2.0 ** (log - 2 * _CLOSE))
        log += bits - rate
    return None


def _line_entropy(numbers: torch.Tensor) -> float:
    """Bits per number, each line by its own counts; infinite for numbers that are far apart."""
    low, span = numbers.min(), float(numbers.max() - numbers.min()) + 1
    if span > _WIDEST:
        return math.inf
    lines = torch.arange(len(numbers))[:, None] * int(span)
    counts = np.bincount((lines + (numbers - low).long()).reshape(-1).numpy(), minlength=len(numbers) * int(span))
    used = counts[counts > 0]
    return float(math.log2(numbers.shape[1]) - (used * np.log2(used)).sum() / numbers.numel())


def _decoded(quotients: torch.Tensor, step: float) -> torch.Tensor:
    """Rounded to a step, cells at the mean of what they hold (`core.tensors.grid`)."""
    numbers, found = torch.round(quotients / step), torch.zeros_like(quotients)
    for cell in range(1, CENTROIDS + 1):
        inside = numbers.abs() == cell if cell < CENTROIDS else numbers.abs() >= cell
        away = torch.where(inside, numbers.abs() * step - quotients.abs(), 0.0).sum() / inside.sum().clamp(min=1)
        found += torch.where(inside, numbers.sign() * (numbers.abs() * step - away), 0.0)
    return found
