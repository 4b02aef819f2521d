"""SignRound, layer-wise: offsets to rounding and scales learned by the signs of their gradients.

    What = s clip(round(w / s + V)),    s = the scale of rounding to nearest times f,    V in [-1/2, 1/2], f in [0, 1]

V for every weight and f for every scale start at 0 and 1, which is rounding to nearest, and move by the rate times the
sign of the straight-through gradient; the rate falls linearly from 1 / steps to 0 (from 2 / steps for 1000 steps or
more and at most 3 bits), and each row keeps the best state that it has been in (AutoRound, data-aware rounding, section
9.7). The formats have no zero point, so that the two ends of a range, alpha and beta of the paper, are one factor f.
Scales are rounded to how they are stored in every step. Where that is to powers of two or in two levels (e8m0, dq8),
or one scale serves the whole tensor, only V is learned.

The paper minimises the error of a block of the network's outputs, which takes the network; this is the error of one
layer's, E || W x + r - What h ||^2 from Gram matrices, which takes no more than these. It never ends above rounding to
nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat
from core.rounding.descent import NEAREST_KEPT, OutputCost, kept_nearest
from core.rounding.levels import Levels
from core.rounding.objective import tiles
from core.tensors.encoded import EncodedTensor, scales_like
from core.tensors.frame import Frame

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "e4m3": torch.float8_e4m3fn}
_MANY_STEPS, _FEW_BITS = 1000, 3
_LEAST_EXPONENT = -120  # whose inverse fp32 holds


def round_tensor(
    weight: torch.Tensor,
    fmt: TensorFormat,
    sensitivity: Sensitivity,
    spec: RoundingSpec,
    seed: int,
) -> EncodedTensor:
    """Learned codes and scales of an integer format; `spec.steps`: how many steps, 200 where it is left out."""
    frame = Frame.of(weight, fmt, seed=seed, row_weights=sensitivity.row_weights)
    cost = OutputCost.of(sensitivity, frame)
    indices, stored = _learned(frame, cost, spec.filled.steps or 0)
    parts = frame.parts if stored is None else {**frame.parts, "scales": scales_like(fmt, frame.shape, stored)}
    found = replace(frame, scales=frame.scales if stored is None else _as_decoded(stored, frame), parts=parts)
    if _gain(frame, found, indices, cost) > 0:
        return found.encoded(indices)
    return kept_nearest(weight, frame, sensitivity, seed, (NEAREST_KEPT,))


def first_rate(steps: int, bits: float) -> float:
    """The rate of the first step."""
    return (2 if steps >= _MANY_STEPS and bits <= _FEW_BITS else 1) / max(steps, 1)


@dataclass(frozen=True)
class _Grid:
    """Values `low` + k `step`, k = 0 to `top`, times scales of `width` columns. `rounded`: scales as decoded."""

    low: float
    step: float
    top: int
    width: int
    rounded: Callable[[torch.Tensor], torch.Tensor] | None


def _learned(frame: Frame, cost: OutputCost, steps: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Indices int32 (rows, columns), and scales as stored (rows, blocks) where they are learned."""
    device, values = frame.matrix.device, frame.table.values
    dtype = _DTYPES.get(frame.format.scale_format) if frame.format.granularity != "tensor" else None
    indices = torch.empty(tuple(frame.matrix.shape), dtype=torch.int32, device=device)
    stored = None if dtype is None else torch.empty(tuple(frame.scales.shape), dtype=dtype, device=device)
    grid = _Grid(values[0], values[1] - values[0], len(values) - 1, frame.width, None)
    if dtype is not None:
        grid = replace(grid, rounded=lambda scales: _as_decoded(_as_stored(scales, frame), frame))
    covariance, rate = cost.covariance.float().to(device), first_rate(steps, frame.format.bits)
    for first, last in tiles(*frame.matrix.shape):
        weight, scales = frame.matrix[first:last].float(), frame.scales[first:last]
        pull = cost.pull(weight.cpu().double(), first)
        state = _State.at_start(weight, scales, covariance, pull)
        for at in range(steps + 1):
            state.step(grid, rate * (1 - at / max(steps, 1)))
        indices[first:last] = state.best_indices
        if stored is not None:
            stored[first:last] = _as_stored(scales * state.best_factors, frame)
    return indices, stored


@dataclass
class _State:
    """Some rows while they are learned, fp32: the best of each row so far beside what is tried next.

    `unit`: errors are measured in it, a power of two, so that their squares stay within fp32.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    covariance: torch.Tensor
    pull: torch.Tensor | None
    unit: float
    offsets: torch.Tensor
    factors: torch.Tensor
    least: torch.Tensor
    best_indices: torch.Tensor
    best_factors: torch.Tensor

    @classmethod
    def at_start(
        cls, weight: torch.Tensor, scales: torch.Tensor, covariance: torch.Tensor, pull: torch.Tensor | None
    ) -> _State:
        """At rounding to nearest; `pull` in fp64."""
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        unit = 2.0 ** max(math.frexp(largest)[1], _LEAST_EXPONENT)
        factors, indices = torch.ones_like(scales), torch.zeros_like(weight, dtype=torch.int32)
        least = torch.full((len(weight), 1), torch.inf, device=weight.device)
        owed = None if pull is None else (pull / unit).float().to(weight.device)
        return cls(
            weight, scales, covariance, owed, unit, torch.zeros_like(weight), factors, least, indices, factors.clone()
        )

    def step(self, grid: _Grid, rate: float) -> None:
        """Measure what is tried, keep it in the rows where it is the best so far, and move on by `rate`."""
        scales = self.scales if grid.rounded is None else grid.rounded(self.scales * self.factors)
        wide = _widened(scales, grid.width, self.weight.shape[1])
        ratio = torch.where(wide == 0, 0.0, self.weight / wide)
        number = ((ratio - grid.low) / grid.step + self.offsets).round_()
        index = number.clamp(0, grid.top)
        value = grid.low + grid.step * index
        error = (self.weight - value * wide) / self.unit
        slope = error @ self.covariance
        linear = slope if self.pull is None else slope + 2 * self.pull
        self._keep((linear * error).sum(dim=1, keepdim=True), index)
        slope = slope.neg_() if self.pull is None else (slope + self.pull).neg_()
        is_inside = number == index
        self.offsets.sub_(rate * torch.sign(slope * wide * is_inside)).clamp_(-0.5, 0.5)
        if grid.rounded is not None:
            by_scale = slope * (value - ratio * is_inside)
            self.factors.sub_(rate * torch.sign(_narrowed(by_scale, grid.width) * self.scales)).clamp_(0, 1)

    def _keep(self, cost: torch.Tensor, index: torch.Tensor) -> None:
        better = cost < self.least
        self.least = torch.where(better, cost, self.least)
        self.best_indices = torch.where(better, index.int(), self.best_indices)
        self.best_factors = torch.where(better, self.factors, self.best_factors)


def _widened(scales: torch.Tensor, width: int, columns: int) -> torch.Tensor:
    """Scales (rows, blocks) as (rows, columns)."""
    return scales.repeat_interleave(width, dim=1)[:, :columns]


def _narrowed(values: torch.Tensor, width: int) -> torch.Tensor:
    """Sums over blocks of columns: (rows, columns) as (rows, blocks)."""
    rows, columns = values.shape
    filled = torch.nn.functional.pad(values, (0, -columns % width))
    return filled.reshape(rows, -1, width).sum(dim=2)


def _as_stored(scales: torch.Tensor, frame: Frame) -> torch.Tensor:
    """In the dtype of stored scales; none but those of zeros become 0."""
    dtype, unit = _DTYPES[frame.format.scale_format], frame.parts.get("tensor_scale")
    wanted = scales if unit is None else scales / unit
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    found = wanted.to(dtype)
    has_vanished = (found.float() == 0) & (scales != 0)
    return torch.where(has_vanished, torch.full_like(wanted, smallest).copysign(wanted), found.float()).to(dtype)


def _as_decoded(stored: torch.Tensor, frame: Frame) -> torch.Tensor:
    unit = frame.parts.get("tensor_scale")
    return stored.float() if unit is None else stored.float() * unit


def _gain(before: Frame, after: Frame, indices: torch.Tensor, cost: OutputCost) -> float:
    """By how much the cost lies below that of rounding to nearest, in fp64."""
    old, new, gain = Levels.of(before), Levels.of(after), 0.0
    for first, last in tiles(*before.matrix.shape):
        weight = before.matrix[first:last].cpu().double()
        pull = cost.pull(weight, first)
        learned = new.rows(first, last), indices[first:last].cpu().numpy()
        gain += cost.gain(weight, old.rows(first, last), learned, pull)
    return gain
