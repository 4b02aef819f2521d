"""Grids of a planned rate whose numbers come from successive rounding; GPTQ's one step, or WaterSIC's for each column.

The step c is searched so that everything that is stored takes the bytes that the format plans (data-aware rounding,
section 4.4): on some rows by the cost of the coder's own classes, then on all of them by the code itself. Column i has
the step c (GPTQ) or c / L_ii (WaterSIC), on which every column adds the same distortion. With more than one path the
numbers of a row are searched together, at a price of 2 ln 2 D / 2 for each bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from core.rounding.limit import SHAPE_GAP, distortion_at, water_level
from core.rounding.objective import Objective, tiles
from core.rounding.successive import Doubles, Integers, Numbers, Scales, Search, best_numbers, round_to_steps
from core.tensors.coded import COLUMNS, FORMS, HEAD_BYTES, ROWS, coded_bytes
from core.tensors.column_scales import stored_values
from core.tensors.entropy.loops_jit import Bytes
from core.tensors.grid import MOST

_SAMPLED_ROWS = 512  # that gains are found by
_PROBED_ROWS = 128  # of these, by which the step is searched
_PROBES, _ROUNDS = 6, 8
_NEAR = 0.05  # bits of a probe's rate from which a straight line leads on
_CHOICE = 1.1  # bits that the choice of a class seems to save for a line of numbers: the fewer, the more it is
_SAME_GAINS = 0.05  # of log2 of a step, within which gains hold
_ALIKE = 1.01  # of estimated sizes of forms of a code, which do not tell which is the shortest
_ALLOWED = 0.001  # bits per weight that may be left over
_LEAST_ALLOWED = 8  # bytes, likewise
_SINGLE = 2.0**12  # cells of the largest target, up to which roundings of fp32 move next to no number
_SIDE = (1000, 5, 0.001)  # bits that classes take: about so many, for each column, and for each weight
_PRICE = math.log(2)  # half of what a bit is worth, 2 ln 2 D: the best of those tried (1/4, 1/2, 3/4, 1)
_LEAST_STD = 0.05
_SPREAD = 2.0**14  # of steps, which scales of a byte can tell apart
_SMALL = 127  # magnitude that a byte holds
_MOST_BITS = 16.0  # of a number, however much room few weights have

Small = NDArray[np.int8] | NDArray[np.int32]


@dataclass(frozen=True)
class GridSettings:
    """How numbers are chosen.

    `waterfilled`: steps c / L_ii, else c. `shrinks`: each column's numbers are decoded at their least squares, all at
    their common one (None), or as they are. `paths`: see `core.rounding.successive`. `mmse`: f of the damping f D.
    `classes`: columns have models by classes where that is shorter; else one model for all. `code`: rans or huffman.
    """

    waterfilled: bool
    shrinks: bool | None
    paths: int
    mmse: float
    classes: bool
    code: str = "rans"


@dataclass(frozen=True)
class Found:
    """`numbers` (places, rows); `values` fp64 (places,): what a number 1 stands for; `data`: the code, in a `form`."""

    numbers: Small
    values: Doubles
    data: Bytes
    form: int | None


@dataclass(frozen=True)
class Shrinkage:
    """What one path finds at a step: `numbers` (places, rows) of some rows, their standard deviations, `spreads`, and
    `gains`, by which places shrink.
    """

    step: float
    numbers: Integers
    spreads: Doubles
    gains: Doubles


@dataclass(frozen=True)
class GridRounding:
    """One weight, fp32 (rows, columns), whose numbers are searched for; `scales` of its blocks, places in order.

    `precision`: of its targets. `known`: Y^T (places, rows), where it is known already.
    """

    weight: torch.Tensor
    objective: Objective
    scales: Scales
    settings: GridSettings
    seed: int
    precision: torch.dtype = torch.float32
    known: torch.Tensor | None = None

    def solved(self, room: int) -> Found:
        """The finest grid whose code, with its head, takes at most `room` bytes."""
        if not self.weight.numel() or not self.objective.inputs or not self._power.any():
            nothing = np.zeros((self.objective.inputs, len(self.weight)), np.int32)
            return self._coded(nothing, np.ones(self.objective.inputs), FORMS)
        rows, columns = self.weight.shape
        elements, allowed = rows * columns, max(_LEAST_ALLOWED, int(_ALLOWED * rows * columns / 8))
        side = _SIDE[0] + _SIDE[1] * columns + _SIDE[2] * elements + 4 * allowed
        rate = min(max(8 * (room - HEAD_BYTES) - side, 0.0) / elements, _MOST_BITS)
        live = max(self.objective.inputs / max(columns, 1), 1e-9)
        solver = self._prepared(rate / live)
        step, slope = solver.probed_step(rate / live)
        shrinkage = solver.sample.shrinkage(step)
        step *= 2.0 ** (-solver.beyond_probe(shrinkage) / slope)
        best: Found | None = None
        fails, fits, slope, before = 0.0, math.inf, slope * live, (0.0, 0.0)
        forms: tuple[int | None, ...] = FORMS
        for number in range(_ROUNDS):
            if abs(math.log2(step / shrinkage.step)) > _SAME_GAINS:
                shrinkage = solver.sample.shrinkage(step)
            found = solver.at(step, shrinkage, forms)
            left, forms = room - HEAD_BYTES - found.data.size, (found.form,)
            if number and step != before[0]:
                slope = (8 * (before[1] - left) / elements) / math.log2(step / before[0])
            before = (step, left)
            if left >= 0:
                best, fits = found, step
            else:
                fails = step
            if 0 <= left <= (1 + number // 2) * allowed or not np.any(found.numbers):
                break
            change = 8 * (left - allowed / 2) / elements / min(max(slope, -2.0), -0.2)
            step = _between(step * 2.0 ** max(change, -1.0), fails, fits)
            if elements * live * _MOST_BITS < 8 * room:
                break
        return best or solver.coarsened(step, room)

    def _prepared(self, rate: float) -> GridRounding:
        """With the damping that suits a rate per live weight, and the precision."""
        power = float(self._squares.mean())
        amount = self.settings.mmse * self._expected(rate) / power if power > 0 else 0.0
        damped = replace(self, objective=self.objective.damped(amount)) if amount > 0 else self
        widths = damped.scales.values[damped.scales.values > 0]
        cells = damped.steps(damped._nominal(rate)) * damped.objective.units.numpy() * widths.min(initial=np.inf)
        largest = damped.sample.targets.abs().amax(dim=1).numpy()
        is_single = bool((largest <= _SINGLE * cells).all())
        return damped if is_single else replace(damped, precision=torch.float64)

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

    @cached_property
    def _squares(self) -> torch.Tensor:
        """s_i^2 (places,): the mean square of the weights of a column, in units of their scales."""
        chosen = self._some_rows(_SAMPLED_ROWS)
        weights = self.objective.rows(self.weight[chosen], 0, len(chosen), torch.float32)
        return (weights / self._scale_values[chosen].float()).square_().mean(dim=0, dtype=torch.float64)

    @cached_property
    def _scale_values(self) -> torch.Tensor:
        """Of all weights (rows, places), or (rows, 1) where they are the same along a row."""
        scales = torch.from_numpy(self.scales.values.T.copy())
        values: torch.Tensor = scales if scales.shape[1] == 1 else scales[:, torch.from_numpy(self.scales.blocks)]
        return torch.where(values > 0, values, 1.0)

    def _tile(self, first: int, last: int) -> torch.Tensor:
        return self.objective.rows(self.weight, first, last, self.precision)

    def steps(self, step: float) -> Doubles:
        """alpha (places,)."""
        units = self.objective.units.numpy()
        least = units.max(initial=0.0) / _SPREAD
        return step / np.maximum(units, least) if self.settings.waterfilled else np.full(len(units), step)

    @cached_property
    def sample(self) -> GridRounding:
        """The same of some rows, drawn by the seed."""
        return self._of_some(_SAMPLED_ROWS)

    @cached_property
    def probe(self) -> GridRounding:
        """The same of fewer rows."""
        return self.sample._of_some(_PROBED_ROWS)

    def _of_some(self, count: int) -> GridRounding:
        if len(self.weight) <= count:
            return self
        chosen = self._some_rows(count)
        residual = self.objective.residual
        objective = self.objective if residual is None else replace(self.objective, residual=residual[chosen])
        scales = Scales(np.ascontiguousarray(self.scales.values[:, chosen.numpy()]), self.scales.blocks)
        known = self.targets[:, chosen] if len(self._tiles) == 1 else None
        return replace(self, weight=self.weight[chosen], objective=objective, scales=scales, known=known)

    def _some_rows(self, count: int) -> torch.Tensor:
        chance = torch.Generator().manual_seed(self.seed % (1 << 63))
        return torch.randperm(len(self.weight), generator=chance)[:count].sort().values

    @cached_property
    def _tiles(self) -> list[tuple[int, int]]:
        return tiles(len(self.weight), self.objective.inputs)

    def probed_step(self, rate: float) -> tuple[float, float]:
        """The step at which the numbers of the probe take `rate` bits each, and bits by log2 of a step about there."""
        log, slope, before = math.log2(self._nominal(rate)), -1.0, (0.0, -1.0)
        for number in range(_PROBES):
            bits = self._probed(2.0**log)
            if number and log != before[0]:
                slope = min(max((bits - before[1]) / (log - before[0]), -1.5), -0.3)
            before = (log, bits)
            log += min(max((rate - bits) / slope, -4.0), 4.0)
            if abs(bits - rate) < _NEAR and number:
                break
        return float(2.0**log), slope

    def beyond_probe(self, shrinkage: Shrinkage) -> float:
        """By how many bits a number takes more than one of the probe, by the sample, of which that is but a part."""
        numbers, rows = shrinkage.numbers, self.sample._some_rows(_PROBED_ROWS).numpy()
        chosen = _CHOICE * (1 / len(self.sample.weight) - 1 / len(self.weight))
        return self._bits(numbers) - self._bits(np.ascontiguousarray(numbers[:, rows])) + chosen

    def _probed(self, step: float) -> float:
        """About how many bits the code takes for each number of the probe; of one path, before scales are stored."""
        if self.settings.paths == 1:
            return self._bits(self.probe._alone(step).numbers)
        return self._bits(self.probe.numbers(step, self.sample.shrinkage(step))[0])

    def _bits(self, numbers: Integers) -> float:
        from core.tensors.entropy.matrix import class_bits

        lines = numbers if self.settings.classes else numbers.reshape(1, -1)
        return class_bits(lines) / max(numbers.size, 1)

    def numbers(self, step: float, shrinkage: Shrinkage) -> tuple[Integers, Doubles]:
        """Numbers (places, rows) and what 1 of each place stands for, as it will be stored."""
        steps, gains = self.steps(step), shrinkage.gains
        values = stored_values(steps * gains) if self.settings.waterfilled else steps * gains
        found = [self._tile_numbers(*tile, steps, values, shrinkage) for tile in self._tiles]
        return found[0] if len(found) == 1 else np.concatenate(found, axis=1), values

    def _tile_numbers(self, first: int, last: int, steps: Doubles, values: Doubles, shrinkage: Shrinkage) -> Integers:
        is_whole, scales = len(self._tiles) == 1, self.scales.of_rows(first, last)
        targets = self.targets if is_whole else self.objective.targets(self._tile(first, last), first)
        if self.settings.paths == 1:
            given = (self._factor, values / shrinkage.gains, scales, shrinkage.gains)
            return round_to_steps(targets.clone() if is_whole else targets, *given).numbers
        price, spreads = _PRICE * self._error(steps), np.maximum(shrinkage.spreads, _LEAST_STD)
        search = Search(self.settings.paths, price, spreads)
        return best_numbers(targets, self._factor, values, scales, search)

    def shrinkage(self, step: float) -> Shrinkage:
        """By a single path; gains are above 0."""
        found = self._alone(step)
        powers = np.square(found.numbers, dtype=np.float32).mean(axis=1, dtype=np.float64)
        if self.settings.shrinks is None:
            common = (found.gains * powers).sum() / powers.sum() if powers.any() else 1.0
            gains = np.full(len(powers), common if common > 0 else 1.0)
        elif self.settings.shrinks:
            gains = np.where(found.gains > 0, found.gains, 1.0)
        else:
            gains = np.ones(len(powers))
        return Shrinkage(step, found.numbers, np.sqrt(powers), gains)

    def _alone(self, step: float) -> Numbers:
        return round_to_steps(self.targets.clone(), self._factor, self.steps(step), self.scales)

    @cached_property
    def targets(self) -> torch.Tensor:
        """Y^T (places, rows) of all rows, where they are no more than a tile."""
        return self.objective.targets(self._tile(0, len(self.weight))) if self.known is None else self.known

    @cached_property
    def _factor(self) -> torch.Tensor:
        return self.objective.factor.to(self.precision)

    def _error(self, steps: Doubles) -> float:
        """About the squared error per weight: c^2 / 12."""
        return float(np.mean((steps * self.objective.units.numpy()) ** 2)) * self._scale_power / 12

    @cached_property
    def _scale_power(self) -> float:
        return float(self._scale_values[self._some_rows(_SAMPLED_ROWS)].square().mean())

    def at(self, step: float, shrinkage: Shrinkage, forms: Sequence[int | None] = FORMS) -> Found:
        """Numbers and code for a step, in the shortest of some forms."""
        return self._coded(*self.numbers(step, shrinkage), forms)

    def _coded(self, numbers: Integers, values: Doubles, forms: Sequence[int | None]) -> Found:
        from core.tensors.entropy.tables_jit import transpose

        is_small = numbers.size and numbers.min() > -_SMALL and numbers.max() < _SMALL
        clipped = np.clip(numbers, -MOST, MOST)
        small: Small = clipped.astype(np.int8) if is_small else clipped
        turned = np.zeros(self.weight.shape[::-1], small.dtype)
        turned[self.objective.order.numpy()] = small
        matrix = np.empty(self.weight.shape, small.dtype)
        transpose(turned, matrix)
        form, data = _shortest(matrix, forms if self.settings.classes else (None,), self.settings.code)
        return Found(small, values, data, form)

    def coarsened(self, step: float, room: int) -> Found:
        """The first that fits while the step doubles: in the end all numbers are 0."""
        while True:
            step *= 2
            found = self.at(step, self.sample.shrinkage(step))
            if found.data.size + HEAD_BYTES <= room:
                return found


def _shortest(matrix: Small, forms: Sequence[int | None], code: str) -> tuple[int | None, Bytes]:
    """The form in which the matrix takes least, and its code; those that cannot be the shortest are not tried."""
    from core.tensors.entropy.matrix import class_bits

    if 1 in matrix.shape or not matrix.size or code == "huffman":
        forms = (None,)
    if len(forms) > 1:
        lines = {None: matrix.reshape(1, -1), ROWS: matrix, COLUMNS: matrix.T}
        bits = {form: class_bits(lines[form]) for form in forms}
        forms = [form for form in forms if bits[form] <= _ALIKE * min(bits.values()) + _SIDE[0]]
    found = [(form, coded_bytes(matrix, code, form)) for form in forms]
    return min(found, key=lambda one: one[1].size)


def _between(step: float, fails: float, fits: float) -> float:
    """The step, kept inside what is known to be too fine and to fit."""
    if fails < step < fits:
        return step
    if not fails:
        return fits / 1.01
    return fails * 1.01 if math.isinf(fits) else math.sqrt(fails * fits)
