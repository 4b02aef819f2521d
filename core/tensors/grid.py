"""Grids of a given rate: numbers k = rint(weight / (scale * step)), entropy coded, in exactly the bytes planned.

The step is solved for: the smallest with which all parts fit, so that what is stored is the rate that was asked for.
Bits fall by one where the step doubles; the entropy of the numbers leads to the step, and two or three rounds that
really code them come within 0.0005 bits (optimal formats, section 8). Cells k = 1, 2 and all farther out are decoded at
the mean of what they hold, `centroids` steps nearer to zero than k steps; cells count by the square of their block's
scale, so the squared error is least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from core.formats.stored import CENTROIDS
from core.tensors.blocks import BlockGrid, Piece
from core.tensors.coded import HEAD_BYTES, coded_bytes, shortest_form
from core.tensors.kernels import cpu
from core.tensors.scales import sum_of_squares

if TYPE_CHECKING:
    from core.tensors.entropy.loops_jit import Bytes, Numbers

Result = TypeVar("Result")
Doubles = NDArray[np.float64]
Integer = type[np.int8] | type[np.int16] | type[np.int32]

MOST = (1 << 19) - 1  # steps: values of all numbers stand in a table
_MOST_HUFFMAN = 2047  # steps, which 4096 symbols hold
_CLOSE = 5e-4  # bits per weight that may be left over
_LEAST_LEFT = 8  # bytes, likewise
_ROUNDS = 12
_ENTROPY_ROUNDS = 4
_NUDGE = 1 + 2.0**-8
_SAME = 1 + 2.0**-13  # steps of this ratio are not told apart
_SAMPLED = 4  # pieces
_UNKNOWN = -1  # no form of a code
_SAMPLE_ROUNDS = 4
_NORMAL_STEP = 4.133  # sqrt(2 pi e): the step at 0 bits of entropy by the formula for fine grids


def grid_values(step: torch.Tensor, centroids: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """fp32 values of the numbers `low` to `high` for scale 1: fl32(sign(k) (|k| - centroid of |k|) step)."""
    numbers = torch.arange(low, high + 1, dtype=torch.float64, device=step.device)
    cells = numbers.abs().long().clamp(1, CENTROIDS) - 1
    magnitudes = numbers.abs() - centroids.double()[cells]
    return (torch.where(numbers == 0, 0.0, numbers.sign() * magnitudes) * step.double()).float()


@dataclass(frozen=True)
class Rounded:
    """Numbers of a tensor, flat, and the step."""

    numbers: Numbers
    step: float


@dataclass(frozen=True)
class CodedGrid:
    """A solution: the code without its head, and the parts `step` and `centroids`."""

    data: Bytes
    step: float
    centroids: torch.Tensor


class GridEncoder:
    """One tensor: `flat` weights of a matrix `shape`, `scales` as decoded, fp32, one per block of `grid`; its code."""

    def __init__(
        self, flat: torch.Tensor, shape: tuple[int, int], grid: BlockGrid, scales: torch.Tensor, method: str
    ) -> None:
        self.flat, self.shape, self.grid, self.scales, self.method = flat, shape, grid, scales, method
        self.pieces = list(grid.pieces(1))
        self.largest = max(self._over(self._farthest, self.pieces), default=0.0)

    def solved(self, room: int) -> CodedGrid:
        """The finest grid whose code, with its head, fits into `room` bytes."""
        found, data = self._fitting(room - HEAD_BYTES)
        return CodedGrid(data, found.step, self.centroids(found))

    def _fitting(self, room: int) -> tuple[Rounded, Bytes]:
        """Numbers and their code. Models and streams are left what the last code took above its numbers' entropy."""
        count = max(self.grid.elements, 1)
        allowed = max(_LEAST_LEFT, int(_CLOSE * count / 8))
        step = self._start(8 * room / count)
        form: int | None = _UNKNOWN
        best: tuple[Rounded, Bytes] | None = None
        fails, fits, above, margin = 0.0, math.inf, allowed / 4, allowed / 4
        for number in range(_ROUNDS):
            rounded, bits = self._with_entropy(8 * (room - above - margin) / count, step)
            # Sizes jump where weights are on a grid themselves, as 16-bit ones; where symbols are rare, models jump.
            if not fails < rounded.step < fits or (best and fails and number >= _ROUNDS // 3):
                between = math.sqrt(fails * fits) if best else fails * _NUDGE
                rounded = self.rounded(self._allowed(between))
                bits = _entropy(rounded.numbers)
            step = rounded.step
            form, data = self._code(rounded, form)
            if data.size <= room:
                best, fits = (rounded, data), step
            else:
                fails, margin = step, margin + allowed / 4
            is_close = 0 <= room - data.size <= (allowed if number < _ROUNDS // 2 else 4 * allowed)
            if is_close or fits < _SAME * fails or (best and step <= self._finest):
                break
            above = data.size - bits * count / 8
        return best or self._coarsened(step, room)

    def _code(self, rounded: Rounded, form: int | None) -> tuple[int | None, Bytes]:
        """In a form, or in the shortest."""
        matrix = rounded.numbers.reshape(self.shape)
        return (
            shortest_form(matrix, self.method) if form == _UNKNOWN else (form, coded_bytes(matrix, self.method, form))
        )

    def _with_entropy(self, rate: float, step: float) -> tuple[Rounded, float]:
        """Numbers for a step, from `step` on, with about `rate` bits of entropy each, and these bits."""
        slope, before = -1.0, (0.0, -1.0)
        for _ in range(_ENTROPY_ROUNDS):
            rounded = self.rounded(step)
            bits = _entropy(rounded.numbers)
            is_finest = bits < rate and step <= self._finest
            if abs(bits - rate) < _CLOSE / 8 or is_finest or not self.largest:
                break
            if before[0] not in (0.0, step):
                slope = min(max((bits - before[1]) / math.log2(step / before[0]), -2.0), -0.25)
            before = (step, bits)
            step = self._allowed(step * 2.0 ** min(max((rate - bits) / slope, -8.0), 8.0))
        return rounded, bits

    def _allowed(self, step: float) -> float:
        """fp32, as it is stored."""
        return float(np.float32(min(max(step, self._finest), 2.0**120)))

    def rounded(self, step: float, pieces: Iterable[Piece] | None = None) -> Rounded:
        """All numbers, or those of some pieces one after the other, for a step."""
        chosen = self.pieces if pieces is None else list(pieces)
        steps = self.largest / step + 1
        dtype = next(kind for kind in (np.int8, np.int16, np.int32) if steps < np.iinfo(kind).max)
        found = self._over(lambda piece: self._numbers(piece, step, dtype), chosen)
        return Rounded(np.concatenate(found or [np.empty(0, np.int8)]), step)

    def centroids(self, rounded: Rounded) -> torch.Tensor:
        """How many steps the means of the cells lie nearer to zero than their numbers, fp16 (CENTROIDS,)."""
        sums = sum(self._over(lambda piece: self._sums(piece, rounded), self.pieces), np.zeros(2 * CENTROIDS))
        away, weight = sums.reshape(2, -1)
        share = away / np.where(weight > 0, weight, 1.0)
        return torch.from_numpy(share.clip(-0.5, 0.5)).half()

    @property
    def _finest(self) -> float:
        """No step is smaller, so that no number is larger than what values stand in a table for, or have a code."""
        most = MOST if self.method == "rans" else _MOST_HUFFMAN
        return max(self.largest / most * (1 + 2.0**-20), 2.0**-120)

    def _start(self, rate: float) -> float:
        """A step for about that rate, by the entropy of a sample."""
        sample = self.pieces[:: max(1, len(self.pieces) // _SAMPLED)]
        count = sum(piece.stop - piece.start for piece in sample)
        power = sum(self._over(self._power, sample)) / max(count, 1)
        step = self._allowed(_NORMAL_STEP * math.sqrt(power) * 2.0**-rate)
        for _ in range(_SAMPLE_ROUNDS if self.largest and len(sample) < len(self.pieces) else 0):
            step = self._allowed(step * 2.0 ** (_entropy(self.rounded(step, sample).numbers) - rate))
        return step

    def _coarsened(self, step: float, room: int) -> tuple[Rounded, Bytes]:
        """The first that fits while the step doubles: in the end all numbers are 0."""
        while True:
            rounded = self.rounded(step := 2 * step)
            data = self._code(rounded, _UNKNOWN)[1]
            if data.size <= room:
                return rounded, data

    def _over(self, work: Callable[[Piece], Result], pieces: Iterable[Piece]) -> list[Result]:
        return cpu.over_pieces(work, pieces) if self.flat.device.type == "cpu" else [work(piece) for piece in pieces]

    def _blocks(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """(blocks, width) fp32 and their scales."""
        return self.grid.to_blocks(self.flat[piece.start : piece.stop].float()), self.scales[piece.first : piece.last]

    def _farthest(self, piece: Piece) -> float:
        """The largest |weight / scale|."""
        blocks, scales = self._blocks(piece)
        ends = blocks.abs().amax(dim=1).double() / scales.double()
        return float(torch.where(scales > 0, ends, 0.0).max())

    def _power(self, piece: Piece) -> float:
        """The sum of (weight / scale)^2."""
        blocks, scales = self._blocks(piece)
        squares = sum_of_squares(blocks) / scales.double().square()
        return float(torch.where(scales > 0, squares, 0.0).sum())

    def _numbers(self, piece: Piece, step: float, dtype: Integer) -> Numbers:
        if self.flat.device.type == "cpu":
            weights, scales = self.flat[piece.start : piece.stop], self.scales[piece.first : piece.last]
            return cpu.grid_numbers(weights, scales, *self.grid.kernel_blocks, step, MOST, dtype)
        numbers = nearest_numbers(*self._blocks(piece), step)
        return self.grid.from_blocks(numbers).cpu().numpy().astype(dtype)

    def _sums(self, piece: Piece, rounded: Rounded) -> Doubles:
        numbers, step = rounded.numbers[piece.start : piece.stop], rounded.step
        if self.flat.device.type == "cpu":
            weights, scales = self.flat[piece.start : piece.stop], self.scales[piece.first : piece.last]
            return cpu.grid_sums(weights, scales, *self.grid.kernel_blocks, step, numbers, CENTROIDS)
        return cell_sums(*self._blocks(piece), step)


def nearest_numbers(blocks: torch.Tensor, scales: torch.Tensor, step: float) -> torch.Tensor:
    """What `cpu.grid_numbers` gives, by torch's operations: int32 (blocks, width)."""
    return _quotients(blocks, scales, step).round_().clamp_(-MOST, MOST).int()


def cell_sums(blocks: torch.Tensor, scales: torch.Tensor, step: float) -> Doubles:
    """What `cpu.grid_sums` gives, likewise: fp64 (2 * CENTROIDS,)."""
    quotients, distances = _quotients(blocks, scales, step), nearest_numbers(blocks, scales, step).abs()
    weights = scales.double().square()[:, None].expand_as(quotients)
    cells = [distances == cell if cell < CENTROIDS else distances >= cell for cell in range(1, CENTROIDS + 1)]
    away = weights * (distances - quotients.abs())
    return np.array([float(values[inside].sum()) for values in (away, weights) for inside in cells])


def _quotients(blocks: torch.Tensor, scales: torch.Tensor, step: float) -> torch.Tensor:
    units = (scales.double() * step)[:, None]
    return torch.where(units > 0, blocks.double() / units, 0.0)


def _entropy(numbers: Numbers) -> float:
    """Bits per number of a code for these numbers alone."""
    from core.tensors.entropy.windows import counted

    if numbers.size == 0:
        return 0.0
    share = counted(numbers)[1] / numbers.size
    return float(-(share * np.log2(share)).sum())
