"""A histogram of a tensor divided by its scales: from it the squared error of any table follows without encoding again.

One pass over the tensor, piece by piece and always on the CPU, sums in fp64 in the order of the elements: the result
does not depend on threads or devices. An element x with scale s counts with the weight s² (an error of c - x/s is one
of s (c - x/s) in x) times its sensitivity, used once. Bins are at most 2^-13 of their values wide, from 2^-24 to 2^16:
as fine at the centre of a tensor with outliers as at the ends of a block.

How exact it is. The error of a table is exact but for the bins that a threshold cuts: such a bin goes to one side as a
whole, the side of its mean. That is the error of a possible assignment, so never below the true one, and the excess is
relative to the error about (bin width / distance of the codes)²: with codes on [-1, 1] or in units of the RMS 1e-6 of R
at 4 bits and below 1e-4 at 8. `Histogram.slack` bounds it. Of the fp32 rounding of x/s, of thresholds and of decoded
values it knows nothing: about 2^-23 of the RMS of the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import InvalidFormat, NonFiniteWeights
from core.tensors.blocks import BlockGrid, Piece

Vector = NDArray[np.float64]
# Sensitivities: one per element in the tensor's order, or (one per row, one per column) whose products count.
ErrorWeights = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

_MANTISSA = 13  # bits of the mantissa that tell bins apart
_SHIFT = 23 - _MANTISSA
_LOWEST, _HIGHEST = 127 - 24, 127 + 16  # biased exponents of fp32
_HALF = (_HIGHEST - _LOWEST) << _MANTISSA  # bins of one sign
_FAR = 2.0**64  # the outer edge of the outermost bins
_MAGNITUDE = 0x7FFFFFFF
_PIECE = 1 << 17  # elements in work at once: what a core's cache holds
_ROUNDING = 2.0**-21  # of the RMS: more than all fp32 roundings of an encoding together


@dataclass(frozen=True, eq=False)
class Histogram:
    """The bins that hold weight, ascending, fp64 (bins,): bounds and means of x/s, and prefix sums (bins + 1,).

    `mass_below`: sums of weights; `first_below`: of weight times x/s. `power`: sum of weight times (x/s)², which is
    the sum of sensitivity times x² over the tensor.
    """

    lower: Vector
    upper: Vector
    means: Vector
    mass_below: Vector
    first_below: Vector
    power: float

    @classmethod
    def from_sums(cls, lower: Vector, upper: Vector, mass: Vector, first: Vector, power: float) -> Histogram:
        """From sums per bin; bins without weight are left out."""
        held = mass > 0
        lower, upper, mass, first = (part[held] for part in (lower, upper, mass, first))
        return cls(lower, upper, np.clip(first / mass, lower, upper), _prefix(mass), _prefix(first), power)

    @property
    def is_empty(self) -> bool:
        """Whether no element has weight and a value other than 0: then every table is as good as any other."""
        return self.power == 0

    def cells(self, edges: Vector) -> tuple[Vector, Vector]:
        """Weight, and weight times x/s, of the cells between ascending thresholds: (..., n - 1) -> two of (..., n)."""
        cuts = np.searchsorted(self.means, edges, side="right")
        around = [(0, 0)] * (cuts.ndim - 1) + [(1, 1)]
        cuts = np.pad(cuts, around)
        cuts[..., -1] = len(self.means)
        return np.diff(self.mass_below[cuts]), np.diff(self.first_below[cuts])

    def error(self, values: Vector, edges: Vector | None = None) -> Vector:
        """Weighted squared error of tables of ascending values, (..., n) -> (...): an upper bound, see the module.

        `edges`: the thresholds between the values, (..., n - 1); the midpoints (nearest value) where None.
        """
        mass, first = self.cells(midpoints(values) if edges is None else edges)
        error: Vector = self.power - ((2 * first - values * mass) * values).sum(axis=-1)
        return np.maximum(error, 0.0)

    def r(self, values: Vector, edges: Vector | None = None) -> Vector:
        """R, the relative RMS error of tables (..., n) -> (...); 0 for an empty histogram."""
        found: Vector = np.sqrt(self.error(values, edges) / (self.power or 1.0))
        return found

    def slack(self, values: Vector) -> float:
        """How far the weighted squared error of one table may lie below `error`, before fp32 rounding.

        An element on the far side of threshold t adds 2 gap |x/s - t|; of a bin whose mean is known, the sum of these
        is largest when its weight sits on its bounds.
        """
        edges, gaps = midpoints(values), np.diff(values)
        index = np.searchsorted(self.lower, edges, side="right") - 1
        cut = (index >= 0) & (self.upper[index] > edges) if len(self.means) else np.zeros(len(edges), dtype=bool)
        index, edges, gaps = index[cut], edges[cut], gaps[cut]
        lower, upper, means = self.lower[index], self.upper[index], self.means[index]
        mass = self.mass_below[index + 1] - self.mass_below[index]
        above = (means - lower) * (upper - edges)
        below = (upper - means) * (edges - lower)
        return float(np.sum(2 * gaps * mass * np.where(means <= edges, above, below) / (upper - lower)))

    def surely_better(self, values: Vector, than: Vector) -> bool:
        """Whether encoding the tensor by `values` is sure to err less than by `than`, its fp32 arithmetic included.

        Holds as long as decoded values are normal numbers of fp32.
        """
        least = max(float(self.error(than)) - self.slack(than), 0.0)
        margin = 2 * _ROUNDING * math.sqrt(self.power)
        return math.sqrt(float(self.error(values))) + margin < math.sqrt(least)


def midpoints(values: Vector) -> Vector:
    """Thresholds of the nearest value: (..., n) -> (..., n - 1)."""
    middle: Vector = (values[..., 1:] + values[..., :-1]) / 2
    return middle


def scaled_histogram(
    flat: torch.Tensor, grid: BlockGrid, scales: torch.Tensor, *, weights: ErrorWeights | None = None
) -> Histogram:
    """The histogram of a flat tensor of floats, cut into blocks by `grid`, with a decoded scale (fp32) for each.

    Blocks of scale 0 do not count: no table changes how they are decoded. `weights`: sensitivities, finite and not
    negative; as (rows, columns) they belong to the tensor as a matrix of its last dimension. NonFiniteWeights for NaN
    or infinity in any of these, InvalidFormat where their sizes do not fit.
    """
    sums = torch.zeros(3, 2 * _HALF, dtype=torch.float64)
    scales = scales.detach().reshape(-1).cpu()
    if weights is not None:
        _require_fitting(weights, grid.elements)
    for piece in grid.pieces(1, _PIECE):
        ratios, costs = _scaled(flat[piece.start : piece.stop].detach(), grid, scales[piece.first : piece.last])
        if weights is not None:
            costs *= _piece_of(weights, piece)
        index = _bins(ratios)
        for moment in sums:
            moment.index_add_(0, index, costs)
            costs *= ratios
    mass, first, second = sums.numpy()
    power = float(second.sum())
    if not math.isfinite(power):
        raise NonFiniteWeights("NaN or infinity among the weights or their sensitivities", hint="look at their source")
    return Histogram.from_sums(*_bounds(), mass, first, power)


def _scaled(values: torch.Tensor, grid: BlockGrid, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x/s in fp32 and s² in fp64 of the elements of a piece."""
    blocks = grid.to_blocks(values.cpu().float())
    divisors = torch.where(scales == 0, torch.inf, scales)
    squares = scales.double().square()[:, None].expand_as(blocks)
    return grid.from_blocks(blocks / divisors[:, None]), grid.from_blocks(squares).contiguous()


def _bins(ratios: torch.Tensor) -> torch.Tensor:
    """Index of each number's bin, int32: the upper bits of its magnitude, mirrored for negative numbers."""
    bits = ratios.view(torch.int32)
    size = (bits & _MAGNITUDE).bitwise_right_shift_(_SHIFT).sub_(_LOWEST << _MANTISSA).clamp_(0, _HALF - 1)
    return size.bitwise_xor_(bits >> 31).add_(_HALF)  # xor with -1 is -1 - size


def _bounds() -> tuple[Vector, Vector]:
    """Lower and upper bounds of all bins."""
    patterns = (np.arange(1, _HALF, dtype=np.int32) + (_LOWEST << _MANTISSA)) << _SHIFT
    inner = patterns.view(np.float32).astype(np.float64)
    positive = np.concatenate(([0.0], inner, [_FAR]))
    edges = np.concatenate((-positive[:0:-1], positive))
    return edges[:-1], edges[1:]


def _piece_of(weights: ErrorWeights, piece: Piece) -> torch.Tensor:
    """The sensitivities of a piece's elements, fp64."""
    if isinstance(weights, torch.Tensor):
        found = weights.reshape(-1)[piece.start : piece.stop].detach().cpu().double()
    else:
        rows, columns = (part.detach().reshape(-1) for part in weights)
        width = columns.numel()
        first = piece.start // width
        products = torch.outer(rows[first : -(-piece.stop // width)].double(), columns.double()).reshape(-1)
        found = products[piece.start - first * width : piece.stop - first * width].cpu()
    if bool((found < 0).any()):
        raise NonFiniteWeights("negative sensitivities", hint="look at their source")
    return found


def _require_fitting(weights: ErrorWeights, elements: int) -> None:
    sizes = [part.numel() for part in (weights if isinstance(weights, tuple) else (weights,))]
    if math.prod(sizes) != elements:
        raise InvalidFormat(f"{' x '.join(map(str, sizes))} sensitivities for {elements} elements")


def _prefix(parts: Vector) -> Vector:
    return np.concatenate(([0.0], np.cumsum(parts)))
