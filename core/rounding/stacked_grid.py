"""Grids of a planned rate for tensors that hold several layers, or one whose inputs are rows: one step c for all of it.

Each layer's numbers come from successive rounding by its own objective; all of them share the entropy code, and c is
searched until everything that is stored takes the bytes that the format plans. Every token counts alike, whichever
expert it was routed to. `gptq` has the step c everywhere. `watersic` waterfills as far as its steps can be stored: with
inputs as columns, c over the root mean square of the experts' L_ii; with inputs as rows that have a scale each, c /
L_ii; one step for all inputs otherwise, which its notes say. Then steps are fitted to the numbers by least squares, all
of them by one factor or those of columns each by its own.

Promise: by the layers' objectives never worse than nearest rounding in the same bytes. Memory: the matrices of one
layer, or of all where they are small; the numbers of the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from core.formats.stored import CENTROIDS, matrix_shape, scale_dtype, scale_shape, stored_parts
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat
from core.rounding.descent import NEAREST_KEPT
from core.rounding.limit import SHAPE_GAP, distortion_at, water_level
from core.rounding.objective import Objective
from core.rounding.stacked_layer import StackLayer
from core.rounding.successive import Doubles, Integers, Scales
from core.rounding.views import Notes, View, of_experts, views
from core.tensors.blocks import BlockGrid
from core.tensors.coded import HEAD_BYTES, as_part, coded_bytes, shortest_form
from core.tensors.column_scales import as_stored, nearest_codes, stored_values
from core.tensors.dtypes import SAFETENSORS_NAMES, TORCH_DTYPES
from core.tensors.encoded import EncodedTensor
from core.tensors.entropy.loops_jit import Bytes
from core.tensors.nearest import Encoder, encode_nearest
from core.tensors.passes import require_finite

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity

Parts = dict[str, torch.Tensor]
FITTED_TOGETHER = "columns are fitted to the codes of all layers together, whatever rescale and shrinkage say"
ONE_STEP = "one step for all inputs, which are rows: the format has no scales of rows (a grid @channel has)"
_ONE, _COLUMNS, _ROWS = range(3)  # which steps differ: none, those of columns, those of rows
_SAMPLE_ROUNDS, _ROUNDS = 6, 6
_SAMPLED_LAYERS, _SAMPLED_ROWS = 8, 512
_CLOSE = 0.002  # bits of a sample's rate
_ALLOWED = 0.001  # bits per weight that may be left over
_LEAST_ALLOWED = 8  # bytes, likewise
_SIDE = (1000, 5, 0.001)  # bits that classes take: about so many, for each column, and for each weight
_MOST_BITS = 16.0  # of a number, however much room few weights have
_SPREAD = 2.0**14  # of steps, which scales can tell apart
_FARTHEST = 120  # of exponents, whose inverse fp32 holds
_LOW_RATE, _MMSE = 2.5, (0.5, 0.25)  # f up to that rate, and above it
_RIDGE, _FURTHEST = 1e-8, (0.1, 1.5)
_USUAL_TOKENS = 1024.0  # keeps sums over tokens near 1
_KEPT_ELEMENTS = 1 << 24  # of all layers' covariances, up to which they are kept


def round_on_grid(
    weight: torch.Tensor, fmt: TensorFormat, sensitivity: Sensitivity, spec: RoundingSpec
) -> EncodedTensor:
    """A tensor of several layers, or of one whose rows are inputs, in the bytes that the format plans.

    Raises NonFiniteWeights, and what `Objective.of` does.
    """
    stack = _Stack.of(_Tensor.of(weight, fmt, sensitivity, spec))
    shape, dtype = tuple(weight.shape), SAFETENSORS_NAMES[weight.dtype]
    made = EncodedTensor(fmt, shape, dtype, stack.parts(stack.solved()))
    nearest = encode_nearest(weight, fmt)
    if stack.cost(nearest) < stack.cost(made):
        return nearest.with_notes((*stack.survey.notes, NEAREST_KEPT))
    return made.with_notes(stack.survey.notes)


@dataclass(frozen=True)
class _Tensor:
    """A tensor as a matrix fp32 in units of `unit`, a power of two, and its layers as `views` gives them.

    `scales`: fp64 (rows, blocks) in that unit, of `width` columns each, which stand before the numbers; `stored`: they
    as parts. `differ`: which steps do.
    """

    matrix: torch.Tensor
    unit: float
    format: TensorFormat
    shape: tuple[int, ...]
    chosen: RoundingSpec
    views: Callable[[], Iterator[View]]
    scales: torch.Tensor
    width: int
    stored: Parts
    differ: int

    @classmethod
    def of(cls, weight: torch.Tensor, fmt: TensorFormat, sensitivity: Sensitivity, spec: RoundingSpec) -> _Tensor:
        require_finite(weight)
        shape, columns = tuple(weight.shape), max(matrix_shape(tuple(weight.shape))[1], 1)
        matrix = weight.detach().reshape(matrix_shape(shape)).float()
        unit = _power_of_two(matrix)
        differ, stored, scales, width = _ONE, Parts(), torch.ones(len(matrix), 1, dtype=torch.float64), columns
        if spec.name == "watersic" and not sensitivity.transposed:
            differ = _COLUMNS
        elif spec.name == "watersic" and fmt.granularity == "channel":
            differ = _ROWS
        if spec.name != "watersic":
            stored, factors = Encoder(weight.detach().reshape(-1), fmt, shape, None, None).chosen_scales()
            blocks = BlockGrid.of(fmt, shape)
            per_row, width = (1, columns) if blocks.one_scale else (blocks.blocks_per_row, blocks.width)
            scales = (factors.double() / unit).reshape(-1, per_row).expand(len(matrix), per_row)
        made = partial(views, shape, sensitivity)
        return cls(matrix / unit, unit, fmt, shape, spec.filled, made, scales, width, stored, differ)

    @property
    def room(self) -> int:
        """Bytes of the part `codes`."""
        return int(stored_parts(self.format, self.shape)["codes"][1][0])

    @property
    def allowed(self) -> int:
        """Bytes that may be left over."""
        return max(_LEAST_ALLOWED, int(_ALLOWED * self.matrix.numel() / 8))

    def objectives(self, silent: float = 1.0) -> Iterator[tuple[View, Objective]]:
        """Those of the layers; `silent`: what the inputs of experts without tokens are taken to have as variance."""
        chosen = self.chosen
        columns, damping = chosen.columns or "natural", chosen.damping or 0.0
        for view in self.views():
            view.sensitivity.check(*view.layer(self.matrix).shape)
            known = view.sensitivity
            given = known.in_units(self.unit, 1.0 / silent if view.notes else _units_of(known.tokens))
            yield view, Objective.of(given, columns=columns, damping=damping, diagonal=chosen.diagonal)

    def rate(self, live: int) -> float:
        """Bits for each of so many weights that are not left out."""
        total, columns = self.matrix.numel(), self.matrix.shape[1]
        side = _SIDE[0] + _SIDE[1] * columns + _SIDE[2] * total + 4 * self.allowed
        planned = min(max(8 * (self.room - HEAD_BYTES) - side, 0.0) / max(total, 1), _MOST_BITS)
        return planned * total / max(live, 1)

    def layer_scales(self, view: View, order: torch.Tensor) -> Scales:
        """The given scales as a layer sees them: a scale of a run of outputs for every input, or of a run of inputs."""
        rows, places = self.scales[view.first : view.last], order.numpy().astype(np.int64)
        if not view.transposed:
            return Scales(np.ascontiguousarray(rows.T.numpy()), places // self.width)
        wide = rows.repeat_interleave(self.width, dim=1)[:, : self.matrix.shape[1]]
        return Scales(np.ascontiguousarray(wide.numpy()), places)


def _units_of(tokens: int | None) -> float:
    """What a covariance is divided by, so that every token counts alike, whichever expert it was routed to."""
    return 1.0 if tokens is None else _USUAL_TOKENS / max(tokens, 1)


@dataclass(frozen=True)
class _Survey:
    """What is known of all layers before any is rounded.

    `live`: weights that are not left out. `silent`: the variance that inputs of experts without tokens are taken to
    have, the geometric mean of all L_ii^2, which gives them no more bits than others. `columns`: steps of the columns.
    `least`: the least L_ii. `inputs`: of each layer.
    """

    notes: Notes
    live: int
    silent: float
    columns: Doubles
    least: float
    inputs: tuple[int, ...]

    @classmethod
    def of(cls, tensor: _Tensor) -> _Survey:
        notes, logs, inputs, live, least = list[Notes](), list[float](), list[int](), 0, math.inf
        squares = torch.zeros(2, tensor.matrix.shape[1], dtype=torch.float64)
        for view, objective in tensor.objectives():
            notes.append(view.notes or objective.notes)
            inputs.append(objective.inputs)
            live += objective.inputs * len(view.layer(tensor.matrix))
            if view.notes or not objective.inputs:
                continue
            logs.append(float(objective.units.square().log().mean()))
            least = min(least, float(objective.units.min()))
            if tensor.differ == _COLUMNS:
                squares[0, objective.order] += objective.units.square()
                squares[1, objective.order] += 1
        said = of_experts(notes)
        if tensor.chosen.name == "watersic" and tensor.differ == _ONE:
            said = (ONE_STEP, *said)
        if tensor.chosen.rescale is False or tensor.chosen.shrinkage is False:
            said = (FITTED_TOGETHER, *said)
        silent = math.exp(float(np.mean(logs))) if logs else 1.0
        return cls(said, live, silent, _common_steps(*squares), least, tuple(inputs))


def _common_steps(squares: torch.Tensor, counts: torch.Tensor) -> Doubles:
    """1 over the root mean square of L_ii, by column, as it can be stored; the largest for columns that nobody has."""
    roots = (squares / counts.clamp(min=1)).sqrt()
    largest = float(roots.max()) if roots.numel() else 0.0
    if not largest > 0:
        return np.ones(len(roots))
    positive = roots[roots > 0].min()
    steps = 1 / torch.where(roots > 0, roots, positive).clamp(min=largest / _SPREAD)
    return stored_values(steps.numpy())


@dataclass(frozen=True)
class _Found:
    """Numbers (rows, columns) of the stored matrix, their code and c."""

    numbers: Integers
    data: Bytes
    step: float


@dataclass(frozen=True)
class _Stack:
    """A tensor with the steps of its layers, which are rounded at `rate` bits for each weight that is not left out."""

    tensor: _Tensor
    survey: _Survey
    rate: float

    @classmethod
    def of(cls, tensor: _Tensor) -> _Stack:
        survey = _Survey.of(tensor)
        return cls(tensor, survey, tensor.rate(survey.live))

    def layers(self) -> Iterable[StackLayer]:
        """One at a time; all of them kept where they take little memory."""
        return self._made() if self._kept is None else self._kept

    @cached_property
    def _kept(self) -> list[StackLayer] | None:
        few = sum(count**2 for count in self.survey.inputs) <= _KEPT_ELEMENTS
        return list(self._made()) if few else None

    def _made(self) -> Iterator[StackLayer]:
        for view, plain in self.tensor.objectives(self.survey.silent):
            weight = view.layer(self.tensor.matrix)
            objective = self._damped(plain, weight)
            scales = self.tensor.layer_scales(view, objective.order)
            yield StackLayer(view, weight, objective, scales, self._steps(objective))

    def _damped(self, objective: Objective, weight: torch.Tensor) -> Objective:
        """Towards zero, by f D / mean w^2 for the error D of the rate (MMSE damping); `gptq` has none."""
        share = self.tensor.chosen.mmse_damping
        if share is None:
            share = _MMSE[self.tensor.format.bits > _LOW_RATE]
        if self.tensor.chosen.name != "watersic" or not objective.inputs or not weight.numel():
            return objective
        squares = objective.rows(weight, 0, len(weight)).square().mean(dim=0)
        power = (squares * objective.units.square()).numpy()
        error = min(distortion_at(power, max(self.rate - SHAPE_GAP, 0.0)), float(power.mean()))
        amount = share * error / float(squares.mean()) if float(squares.mean()) > 0 else 0.0
        return objective.damped(amount) if amount > 0 else objective

    def _steps(self, objective: Objective) -> Doubles:
        """In units of c, as they can be stored."""
        if self.tensor.differ == _COLUMNS:
            return np.asarray(self.survey.columns[objective.order.numpy()], np.float64)
        if self.tensor.differ == _ROWS:
            wanted = torch.clamp(self.survey.least / objective.units, 1 / _SPREAD, 1.0)
            return np.asarray(wanted.half().double().numpy(), np.float64)
        return np.ones(objective.inputs)

    def solved(self) -> _Found:
        """The finest grid whose code, with its head, takes at most the bytes that are planned."""
        tensor = self.tensor
        power = np.concatenate([one.squares() for one in self.layers()] or [np.zeros(0)])
        if not power.size or not power.any():
            return self._at(1.0)
        step, elements, best = self._sampled_step(power), tensor.matrix.numel(), None
        fails, fits, slope, before = 0.0, math.inf, -1.0, (0.0, 0.0)
        for number in range(_ROUNDS):
            found = self._at(step)
            left = tensor.room - HEAD_BYTES - found.data.size
            if number and step != before[0]:
                slope = (8 * (before[1] - left) / elements) / math.log2(step / before[0])
            before = (step, left)
            best, fits, fails = (found, step, fails) if left >= 0 else (best, fits, step)
            if 0 <= left <= (1 + number) * tensor.allowed or not np.any(found.numbers):
                break
            change = 8 * (left - tensor.allowed / 2) / elements / min(max(slope, -2.0), -0.2)
            step = _between(step * 2.0 ** max(change, -1.0), fails, fits)
            if self.survey.live * _MOST_BITS < 8 * tensor.room:
                break
        while best is None:
            step *= 2
            found = self._at(step)
            best = found if found.data.size + HEAD_BYTES <= tensor.room else None
        return best

    def _sampled_step(self, power: Doubles) -> float:
        """The step at which some rows of some layers take the rate."""
        from core.tensors.entropy.matrix import class_bits

        every = max(1, len(self.survey.inputs) // _SAMPLED_LAYERS)
        rows = max(_SAMPLED_ROWS // min(len(self.survey.inputs), _SAMPLED_LAYERS), 1)
        sample = [one.sampled(rows) for at, one in enumerate(self.layers()) if not at % every]
        log = 0.5 * math.log2(12 * max(water_level(power, max(self.rate - SHAPE_GAP, 0.0)), 1e-300))
        known = list[tuple[float, float]]()
        for _ in range(_SAMPLE_ROUNDS):
            numbers = [one.numbers(2.0**log, self._paths)[:, one.objective.order.numpy()].T for one in sample]
            bits = sum(class_bits(one) for one in numbers) / max(sum(one.size for one in numbers), 1)
            known.append((log, bits))
            if abs(bits - self.rate) < _CLOSE:
                break
            slope = -1.0
            if len(known) > 1 and known[-1][0] != known[-2][0]:
                slope = (known[-1][1] - known[-2][1]) / (known[-1][0] - known[-2][0])
            log += min(max((self.rate - bits) / min(max(slope, -1.5), -0.3), -4.0), 4.0)
        return float(2.0 ** min(known, key=lambda one: abs(one[1] - self.rate))[0])

    @property
    def _paths(self) -> int:
        return self.tensor.chosen.paths or 1

    def _at(self, step: float) -> _Found:
        numbers = np.zeros(tuple(self.tensor.matrix.shape), np.int32)
        for one in self.layers():
            found = one.numbers(step, self._paths)
            numbers[one.view.first : one.view.last] = found.T if one.view.transposed else found
        if np.abs(numbers).max(initial=0) < 127:
            numbers = numbers.astype(np.int8)
        code, is_classed = self.tensor.format.entropy_code or "rans", self.tensor.chosen.classes is not False
        return _Found(numbers, shortest_form(numbers, code)[1] if is_classed else coded_bytes(numbers, code), step)

    def parts(self, found: _Found) -> Parts:
        """Everything that is stored."""
        tensor, fmt = self.tensor, self.tensor.format
        made = {"codes": as_part(found.data, tensor.room), "centroids": torch.zeros(CENTROIDS).half()}
        if tensor.chosen.name != "watersic":
            return made | tensor.stored | {"step": torch.tensor([found.step * self._factor(found)]).float()}
        scales = torch.ones(scale_shape(fmt, tensor.shape), dtype=TORCH_DTYPES[scale_dtype(fmt)])
        if tensor.differ == _COLUMNS:
            step, columns = as_stored(found.step * tensor.unit * self._fitted_columns(found))
        else:
            step = found.step * tensor.unit * self._factor(found)
            columns = nearest_codes(np.ones(tensor.matrix.shape[1]))
        if tensor.differ == _ROWS:
            for one in self.layers():
                scales[one.view.first + one.objective.order] = torch.from_numpy(one.steps).to(scales.dtype)
        return made | {
            "scales": scales,
            "step": torch.tensor([step], dtype=torch.float32),
            "column_scales": torch.from_numpy(columns),
        }

    def _layer_numbers(self, one: StackLayer, found: _Found) -> Integers:
        rows = found.numbers[one.view.first : one.view.last]
        return rows.T if one.view.transposed else rows

    def _factor(self, found: _Found) -> float:
        """By which all steps are multiplied, at the least squares."""
        square = along = 0.0
        for one in self.layers():
            matrix, wanted = one.normal_equations(self._layer_numbers(one, found))
            square, along = square + float(matrix.sum()), along + float(wanted.sum())
        factor = along / square / found.step if square > 0 else 1.0
        return min(max(factor, _FURTHEST[0]), _FURTHEST[1])

    def _fitted_columns(self, found: _Found) -> Doubles:
        """Steps of columns in units of c, as can be stored: as they are, by one factor, or by one for each."""
        count = self.tensor.matrix.shape[1]
        matrix, wanted = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        for one in self.layers():
            gram, along = one.normal_equations(self._layer_numbers(one, found))
            places = one.objective.order
            matrix[places[:, None], places] += gram * found.step**2
            wanted[places] += along * found.step
        steps = torch.from_numpy(self.survey.columns)
        single = float(wanted.sum() / matrix.sum()) if float(matrix.sum()) > 0 else 1.0
        ridge, unused = _RIDGE * matrix.diagonal().mean(), matrix.diagonal() <= 0
        each = torch.linalg.solve(matrix + torch.diag(torch.where(unused, 1.0, ridge)), wanted)
        each = torch.where(unused, 1.0, each.clamp(0.0, _FURTHEST[1]))
        offered = [steps, steps * min(max(single, _FURTHEST[0]), _FURTHEST[1]), steps * each]
        stored = [torch.from_numpy(stored_values(one.numpy())) for one in offered]

        def cost(one: torch.Tensor) -> float:
            gains = one / steps
            return float(gains @ (matrix @ gains) - 2 * (wanted @ gains))

        return np.asarray(min(stored, key=cost).numpy(), np.float64)

    def cost(self, encoded: EncodedTensor) -> float:
        """The objectives of all layers, without their constants."""
        decoded = encoded.decode().reshape(self.tensor.matrix.shape) / self.tensor.unit
        return sum(one.cost(one.view.layer(decoded)) for one in self.layers())


def _power_of_two(matrix: torch.Tensor) -> float:
    """That of the largest magnitude, so that dividing by it rounds nothing; 1 for zeros."""
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    return 2.0 ** max(math.frexp(largest)[1], -_FARTHEST) if largest > 0 else 1.0


def _between(step: float, fails: float, fits: float) -> float:
    """The step, kept inside what is known to be too fine and to fit."""
    if fails < step < fits:
        return step
    if not fails:
        return fits / 1.01
    return fails * 1.01 if math.isinf(fits) else math.sqrt(fails * fits)
