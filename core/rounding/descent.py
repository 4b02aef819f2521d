"""Coordinate descent over all levels of a format, and the cost that it lowers: of output errors, from Gram matrices.

With E = W - What, inputs h of the layer and x of the reference model, S = E[h h^T], D = E[(x - h) h^T] and what else
the output should make up for, r: E || W x + r - What h ||^2 is tr((E S + 2 P) E^T) and a constant, P = W D + E[r h^T].
Nothing is inverted or factored. `damping` on the diagonal of S and of E[x h^T] draws What towards W.

One step moves one weight of every row to the level at which the cost is least while all others stand still: the cost
never rises, and there is no rate to choose (power grids and error diffusion, A4 and B4). Rows do not depend on each
other. fp64 on the CPU; memory is a few matrices of the inputs and tiles of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from core.errors import InvalidCheckpoint
from core.rounding.levels import Indices, Levels
from core.rounding.objective import DEAD, tiles
from core.tensors.encoded import EncodedTensor
from core.tensors.frame import Frame
from core.tensors.nearest import encode_nearest

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity

BLOCK = 64  # columns of a compiled loop
NEAREST_KEPT = "rounded to nearest, which costs no more"
_DENSE = 0.1  # of the weights of a block, above which a product of matrices is faster than rows one by one


@dataclass(frozen=True)
class OutputCost:
    """`covariance`: S. `drift`: D, None for one stream. `residual`: E[r h^T] (rows, n) or None. All fp64 on the CPU, in
    the basis in which weights are coded, and in units of the largest mean square of an input. `damping`: on S's
    diagonal.
    """

    covariance: torch.Tensor
    drift: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    damping: float = 0.0

    @classmethod
    def of(cls, sensitivity: Sensitivity, frame: Frame) -> OutputCost:
        """Of the statistics of a layer, undamped; InvalidCheckpoint where there are none."""
        turned = sensitivity.turned(frame.turned, frame.turned_outputs)
        covariance, cross, residual = map(_on_cpu, (turned.covariance, turned.cross, turned.residual))
        if covariance is None or sensitivity.covariance is None:
            raise InvalidCheckpoint("there are no statistics of the layer's inputs", hint="nearest needs none")
        largest = float(sensitivity.covariance.diagonal().max()) if len(covariance) else 0.0
        unit = largest if largest > 0 else 1.0
        return cls(
            (covariance + covariance.T) / (2 * unit),
            None if cross is None else (cross - covariance) / unit,
            None if residual is None else residual / unit,
        )

    def damped(self, share: float) -> OutputCost:
        """With that share of the mean square of the inputs as damping."""
        mean = float(self.covariance.diagonal().mean()) if len(self.covariance) else 0.0
        return replace(self, damping=share * mean)

    @property
    def alive(self) -> torch.Tensor:
        """Inputs that are not always zero, bool (n,)."""
        return self.covariance.diagonal() > DEAD

    def pull(self, weight: torch.Tensor, first: int) -> torch.Tensor | None:
        """P of rows `first`... of W, fp64 (rows, n); None where it is 0."""
        moved = None if self.drift is None else weight @ self.drift
        if self.residual is None:
            return moved
        owed = self.residual[first : first + len(weight)]
        return owed if moved is None else moved + owed

    def slopes(self, error: torch.Tensor, pull: torch.Tensor | None) -> torch.Tensor:
        """-(E S + P), damped: half the derivative by What."""
        found = error @ self.covariance
        if self.damping:
            found += self.damping * error
        return found.neg_() if pull is None else found.add_(pull).neg_()

    def gain(
        self, weight: torch.Tensor, before: Levels, after: tuple[Levels, Indices], pull: torch.Tensor | None
    ) -> float:
        """By how much some rows of W cost less in the levels of other indices than in the nearest ones of `before`."""
        nearest, (levels, indices) = before.decoded(before.nearest(weight)), after
        return self.of_error(weight - nearest, pull) - self.of_error(weight - levels.decoded(indices), pull)

    def of_error(self, error: torch.Tensor, pull: torch.Tensor | None) -> float:
        """The damped cost of some rows."""
        slopes = self.slopes(error, pull)
        return -float(torch.sum((slopes if pull is None else slopes - pull) * error))


def kept_nearest(
    weight: torch.Tensor, frame: Frame, sensitivity: Sensitivity, seed: int, notes: tuple[str, ...]
) -> EncodedTensor:
    """The weight rounded to nearest in the frame's format, and why."""
    found = encode_nearest(weight, frame.format, seed=seed, row_weights=sensitivity.row_weights)
    return found.with_notes(notes)


def _on_cpu(statistic: torch.Tensor | None) -> torch.Tensor | None:
    return None if statistic is None else statistic.cpu().double()


def best_indices(
    frame: Frame,
    cost: OutputCost,
    start: Callable[[torch.Tensor, int, Levels], Indices],
    passes: int,
) -> torch.Tensor | None:
    """Indices (rows, columns) on the weight's device: `start`, then at most so many passes of descent.

    None where rounding to nearest costs no more. `start` takes some rows of W, fp64, the first one's number, and the
    levels of these rows.
    """
    levels, (rows, columns) = Levels.of(frame), frame.matrix.shape
    found = np.empty((rows, columns), np.int32)
    gain = 0.0
    for first, last in tiles(rows, columns):
        weight, here = frame.matrix[first:last].cpu().double(), levels.rows(first, last)
        pull = cost.pull(weight, first)
        indices = start(weight, first, here)
        descend(weight, indices, cost, pull, here, passes)
        gain += cost.gain(weight, here, (here, indices), pull)
        found[first:last] = indices
    return torch.from_numpy(found).to(frame.matrix.device) if gain > 0 else None


def descend(
    weight: torch.Tensor, indices: Indices, cost: OutputCost, pull: torch.Tensor | None, levels: Levels, passes: int
) -> int:
    """Improve the indices of some rows in place, until nothing moves or the passes are used up; answers how many moved.

    Columns in their order, first to last, in every pass.
    """
    from core.rounding.diffusion_jit import descend_block, pass_on

    if not passes or not indices.size:
        return 0
    levels, columns, total = levels.least_squares, indices.shape[1], 0
    slopes = cost.slopes(weight - levels.decoded(indices), pull)
    hessian, moves = cost.covariance, np.empty((len(indices), BLOCK))
    shared = (hessian.numpy(), cost.damping, levels.scales, levels.blocks, levels.rule)
    for _ in range(passes):
        before = total
        for low in range(0, columns, BLOCK):
            high = min(low + BLOCK, columns)
            here = moves[:, : high - low]
            moved = descend_block(slopes.numpy(), *shared, low, high, indices, here)
            total += moved
            if moved > _DENSE * here.size:
                slopes[:, :low].addmm_(torch.from_numpy(here), hessian[low:high, :low])
                slopes[:, high:].addmm_(torch.from_numpy(here), hessian[low:high, high:])
            elif moved:
                pass_on(slopes.numpy(), hessian.numpy(), low, high, here)
        if total == before:
            break
    return total
