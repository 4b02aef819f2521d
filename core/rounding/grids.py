"""Grids of a planned rate whose numbers come from successive rounding; GPTQ's one step, or WaterSIC's for each column.

The step c is searched so that everything that is stored takes the bytes that the format plans (data-aware rounding,
section 4.4): on some rows by the cost of the coder's own classes, then on all of them by the code itself. Column i has
the step c (GPTQ) or c / L_ii (WaterSIC), on which every column adds the same distortion. With more than one path the
numbers of a row are searched together, at a price of 2 ln 2 D / 2 for each bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from core.formats.stored import matrix_shape
from core.recipe.rounding import RoundingSpec
from core.rounding.descent import NEAREST_KEPT
from core.rounding.limit import SHAPE_GAP, distortion_at, water_level
from core.rounding.objective import Objective, tiles
from core.rounding.successive import Doubles, Integers, Numbers, Scales, Search, best_numbers, round_to_steps
from core.tensors.coded import HEAD_BYTES, coded_bytes, shortest_form
from core.tensors.column_scales import stored_values
from core.tensors.encoded import EncodedTensor
from core.tensors.entropy.loops_jit import Bytes
from core.tensors.grid import MOST
from core.tensors.nearest import encode_nearest
from core.tensors.passes import require_finite

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity

_SAMPLED_ROWS = 512
_SAMPLE_ROUNDS, _ROUNDS = 6, 8
_CLOSE = 0.002  # bits of a sample's rate
_ALLOWED = 0.001  # bits per weight that may be left over
_LEAST_ALLOWED = 8  # bytes, likewise
_SIDE = (1000, 5, 0.001)  # bits that classes take: about so many, for each column, and for each weight
_PRICE = math.log(2)  # half of what a bit is worth, 2 ln 2 D: the best of those tried (1/4, 1/2, 3/4, 1)
_LEAST_STD = 0.05
_SPREAD = 2.0**14  # of steps, which scales of a byte can tell apart
_FARTHEST = 120  # of exponents, whose inverse fp32 holds
_MOST_BITS = 16.0  # of a number, however much room few weights have


@dataclass(frozen=True)
class GridSettings:
    """How numbers are chosen.

    `waterfilled`: steps c / L_ii, else c. `shrinks`: each column's numbers are decoded at their least squares, all at
    their common one (None), or as they are. `paths`: see `core.rounding.successive`. `mmse`: f of the damping f D.
    `classes`: columns have models by classes where that is shorter; else one model for all.
    """

    waterfilled: bool
    shrinks: bool | None
    paths: int
    mmse: float
    classes: bool


@dataclass(frozen=True)
class Found:
    """`numbers` int32 (rows, columns) of W, `values` fp64 (places,): what a number 1 stands for; `data`: their code."""

    numbers: Integers
    values: Doubles
    step: float
    data: Bytes


@dataclass(frozen=True)
class GridRounding:
    """One weight, fp32 (rows, columns), whose numbers are searched for; `scales` of its blocks, places in order."""

    weight: torch.Tensor
    objective: Objective
    scales: Scales
    settings: GridSettings
    seed: int

    def solved(self, room: int) -> Found:
        """The finest grid whose code, with its head, takes at most `room` bytes."""
        if not self.weight.numel() or not self.objective.inputs or not self._power.any():
            return self._coded(np.zeros((self.objective.inputs, len(self.weight))), np.ones(self.objective.inputs), 1.0)
        rows, columns = self.weight.shape
        elements, allowed = rows * columns, max(_LEAST_ALLOWED, int(_ALLOWED * rows * columns / 8))
        side = _SIDE[0] + _SIDE[1] * columns + _SIDE[2] * elements + 4 * allowed
        rate = min(max(8 * (room - HEAD_BYTES) - side, 0.0) / elements, _MOST_BITS)
        live = max(self.objective.inputs / max(columns, 1), 1e-9)
        solver = self._prepared(rate / live)
        step = solver.sampled_step(rate / live)
        best: Found | None = None
        fails, fits, slope, before = 0.0, math.inf, -1.0, (0.0, 0.0)
        for number in range(_ROUNDS):
            found = solver.at(step)
            left = room - HEAD_BYTES - found.data.size
            if number and step != before[0]:
                slope = (8 * (before[1] - left) / elements) / math.log2(step / before[0])
            before = (step, left)
            if left >= 0:
                best, fits = found, step
            else:
                fails = step
            if 0 <= left <= (1 + number) * allowed or not np.any(found.numbers):
                break
            change = 8 * (left - allowed / 2) / elements / min(max(slope, -2.0), -0.2)
            step = _between(step * 2.0 ** max(change, -1.0), fails, fits)
            if elements * live * _MOST_BITS < 8 * room:
                break
        return best or solver.coarsened(step, room)

    def _prepared(self, rate: float) -> GridRounding:
        """With the damping that suits a rate per live weight."""
        power = self._weight_power
        amount = self.settings.mmse * self._expected(rate) / power if power > 0 else 0.0
        return replace(self, objective=self.objective.damped(amount)) if amount > 0 else self

    def _expected(self, rate: float) -> float:
        """About the squared error per weight at that rate, in the objective's measure."""
        return float(min(distortion_at(self._power, max(rate - SHAPE_GAP, 0.0)), self._power.mean()))

    def _nominal(self, rate: float) -> float:
        """The step c of a rate: its cells are as wide as the water level of s_i^2 L_ii^2 asks for (section 4.4)."""
        return math.sqrt(12 * water_level(self._power, max(rate - SHAPE_GAP, 0.0)))

    @cached_property
    def _power(self) -> Doubles:
        """s_i^2 L_ii^2, or s_i^2 under one step for all columns; weights counted in units of their scales."""
        power = self._squares
        if self.settings.waterfilled:
            power = power * self.objective.units.square()
        return np.asarray(power.numpy(), np.float64)

    @property
    def _weight_power(self) -> float:
        return float(self._squares.mean())

    @cached_property
    def _squares(self) -> torch.Tensor:
        """s_i^2 (places,): the mean square of the weights of a column, in units of their scales."""
        return (self._tile(*self._rows)[1] / self._scale_values(*self._rows)).square().mean(dim=0)

    @property
    def _rows(self) -> tuple[int, int]:
        return 0, min(len(self.weight), 4 * _SAMPLED_ROWS)

    def _scale_values(self, first: int, last: int) -> torch.Tensor:
        scales = torch.from_numpy(self.scales.values[:, first:last].T.copy())
        values: torch.Tensor = scales[:, torch.from_numpy(self.scales.blocks)]
        return torch.where(values > 0, values, 1.0)

    def _tile(self, first: int, last: int) -> tuple[int, torch.Tensor]:
        return first, self.objective.rows(self.weight, first, last)

    def steps(self, step: float) -> Doubles:
        """alpha (places,)."""
        units = self.objective.units.numpy()
        least = units.max(initial=0.0) / _SPREAD
        return step / np.maximum(units, least) if self.settings.waterfilled else np.full(len(units), step)

    @cached_property
    def sample(self) -> GridRounding:
        """The same of some rows, drawn by the seed."""
        if len(self.weight) <= _SAMPLED_ROWS:
            return self
        chance = torch.Generator().manual_seed(self.seed % (1 << 63))
        chosen = torch.randperm(len(self.weight), generator=chance)[:_SAMPLED_ROWS].sort().values
        residual = self.objective.residual
        objective = self.objective if residual is None else replace(self.objective, residual=residual[chosen])
        scales = Scales(np.ascontiguousarray(self.scales.values[:, chosen.numpy()]), self.scales.blocks)
        return GridRounding(self.weight[chosen], objective, scales, self.settings, self.seed)

    def sampled_step(self, rate: float) -> float:
        """The step at which the numbers of the sample take `rate` bits each."""
        from core.tensors.entropy.matrix import class_bits

        log, known = math.log2(self._nominal(rate)), list[tuple[float, float]]()
        for _ in range(_SAMPLE_ROUNDS):
            numbers = self.sample.trial(2.0**log)
            bits = class_bits(numbers) / max(numbers.size, 1)
            known.append((log, bits))
            if abs(bits - rate) < _CLOSE:
                break
            slope = -1.0
            if len(known) > 1 and known[-1][0] != known[-2][0]:
                slope = (known[-1][1] - known[-2][1]) / (known[-1][0] - known[-2][0])
            log += min(max((rate - bits) / min(max(slope, -1.5), -0.3), -4.0), 4.0)
        return float(2.0 ** min(known, key=lambda one: abs(one[1] - rate))[0])

    def trial(self, step: float) -> Integers:
        """Numbers (places, rows) with as many bits as those of `numbers`; of one path, before scales are stored."""
        return self._alone(step).numbers if self.settings.paths == 1 else self.numbers(step)[0]

    def numbers(self, step: float) -> tuple[Integers, Doubles]:
        """Numbers (places, rows) and what 1 of each place stands for, as it will be stored."""
        steps, (spreads, gains) = self.steps(step), self.sample.found_gains(step)
        values = steps * gains
        if self.settings.waterfilled:
            values = stored_values(values)
        found = np.empty((self.objective.inputs, len(self.weight)), np.int32)
        for first, last in tiles(len(self.weight), self.objective.inputs):
            is_whole = last - first == len(self.weight)
            targets = self.targets if is_whole else self.objective.targets(self._tile(first, last)[1], first)
            scales = self.scales.of_rows(first, last)
            if self.settings.paths == 1:
                given = (self.objective.factor, values / gains, scales, gains)
                found[:, first:last] = round_to_steps(targets.clone(), *given).numbers
            else:
                search = Search(self.settings.paths, _PRICE * self._error(steps), np.maximum(spreads, _LEAST_STD))
                found[:, first:last] = best_numbers(targets, self.objective.factor, values, scales, search)
        return found, values

    def found_gains(self, step: float) -> tuple[Doubles, Doubles]:
        """Standard deviations of the numbers, and by how much each place shrinks, above 0; found by a single path."""
        found = self._alone(step)
        powers = (found.numbers.astype(np.float64) ** 2).mean(axis=1)
        if self.settings.shrinks is None:
            common = (found.gains * powers).sum() / powers.sum() if powers.any() else 1.0
            common = common if common > 0 else 1.0
            return np.sqrt(powers), np.full(len(powers), common)
        gains = np.where(found.gains > 0, found.gains, 1.0) if self.settings.shrinks else np.ones(len(powers))
        return np.sqrt(powers), gains

    def _alone(self, step: float) -> Numbers:
        return round_to_steps(self.targets.clone(), self.objective.factor, self.steps(step), self.scales)

    @cached_property
    def targets(self) -> torch.Tensor:
        """Y^T (places, rows) of all rows, where they are no more than a tile."""
        return self.objective.targets(*self._tile(0, len(self.weight))[::-1]).contiguous()

    def _error(self, steps: Doubles) -> float:
        """About the squared error per weight: c^2 / 12."""
        return float(np.mean((steps * self.objective.units.numpy()) ** 2)) * self._scale_power / 12

    @cached_property
    def _scale_power(self) -> float:
        return float(self._scale_values(*self._rows).square().mean())

    def at(self, step: float) -> Found:
        """Numbers and code for a step."""
        return self._coded(*self.numbers(step), step)

    def _coded(self, numbers: Doubles | Integers, values: Doubles, step: float) -> Found:
        matrix = np.zeros(self.weight.shape, np.int32)
        matrix[:, self.objective.order.numpy()] = numbers.T
        np.clip(matrix, -MOST, MOST, out=matrix)
        matrix = matrix.astype(np.int8 if np.abs(matrix).max(initial=0) < 127 else np.int32)
        data = shortest_form(matrix, "rans")[1] if self.settings.classes else coded_bytes(matrix, "rans")
        return Found(matrix, values, step, data)

    def coarsened(self, step: float, room: int) -> Found:
        """The first that fits while the step doubles: in the end all numbers are 0."""
        while True:
            found = self.at(step := 2 * step)
            if found.data.size + HEAD_BYTES <= room:
                return found


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
        given = sensitivity.in_units(unit, _power_of_two(sensitivity.covariance))
        objective = Objective.of(
            given, columns=chosen.columns or "natural", damping=chosen.damping or 0.0, diagonal=chosen.diagonal
        )
        return cls(matrix / unit, objective, unit)

    def or_nearest(self, weight: torch.Tensor, found: EncodedTensor) -> EncodedTensor:
        """What was found with the objective's notes, or in the same bytes all weights to nearest where that costs less.

        Errors that are carried on may end in columns of few bits: where inputs differ in scale by orders of magnitude,
        or single weights stand out.
        """
        nearest = encode_nearest(weight, found.format)
        if self._cost(nearest) < self._cost(found):
            return nearest.with_notes((*self.objective.notes, NEAREST_KEPT))
        return found.with_notes(self.objective.notes)

    def _cost(self, encoded: EncodedTensor) -> float:
        decoded, total = encoded.decode().reshape(self.weight.shape) / self.unit, 0.0
        for first, last in tiles(len(self.weight), self.objective.inputs):
            cross = self.objective.cross(self.objective.rows(self.weight, first, last), first)
            total += self.objective.excess(self.objective.rows(decoded, first, last), cross)
        return total


def _power_of_two(values: torch.Tensor | None) -> float:
    """That of the largest magnitude, so that dividing by it rounds nothing; 1 for zeros."""
    largest = float(values.abs().max()) if values is not None and values.numel() else 0.0
    return 2.0 ** max(math.frexp(largest)[1], -_FARTHEST) if largest > 0 else 1.0


def _between(step: float, fails: float, fits: float) -> float:
    """The step, kept inside what is known to be too fine and to fit."""
    if fails < step < fits:
        return step
    if not fails:
        return fits / 1.01
    return fails * 1.01 if math.isinf(fits) else math.sqrt(fails * fits)
