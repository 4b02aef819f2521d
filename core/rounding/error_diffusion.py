"""Error diffusion (reconstruction): what a column leaves over of the layer's output is given to the next column.

The paper (arXiv 2410.11203) publishes aims and constraints; this is the reconstruction of power grids and error
diffusion, B2, in Gram form, and is to be reported as such. Column t is rounded at the value that makes up best for the
output error of the columns before it,

    v = (W E[x h_t] - What_(<t) S_(<t) t) / S_tt,    W and E[x h_t] up to column t

in natural order, with the scales that rounding to nearest has, fixed beforehand. Nothing is inverted: there is no
Cholesky factorisation that could fail. With inputs that are orthogonal, or all zero, it is rounding to nearest. Inputs
that are always zero are rounded directly. Then come `refine` passes of coordinate descent (B4; ours, not the paper's)
under a damping of 1 % of the mean square of the inputs.

Whether a layer gains is not certain, and with Gram matrices alone no columns are held back to measure it: the whole
tensor keeps the codes of rounding to nearest where these cost less by the damped cost. With fewer than 256 tokens,
where they are counted, there is too little to learn from, and the tensor is rounded to nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat
from core.rounding.descent import NEAREST_KEPT, OutputCost, best_indices, kept_nearest
from core.rounding.levels import Indices, Levels
from core.rounding.successive import spread
from core.tensors.encoded import EncodedTensor
from core.tensors.frame import Frame

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity

DAMPING = 0.01
LEAST_TOKENS = 256


def round_tensor(
    weight: torch.Tensor,
    fmt: TensorFormat,
    sensitivity: Sensitivity,
    spec: RoundingSpec,
    seed: int,
) -> EncodedTensor:
    """Codes by error diffusion and coordinate descent; `spec.refine`: passes, 10 where it is left out.

    With `cross` in the statistics two streams, one without. `residual` counts in the descent. InvalidFormat for a
    format without fixed table and scales, or for statistics of other inputs; InvalidCheckpoint without statistics.
    """
    frame = Frame.of(weight, fmt, seed=seed, row_weights=sensitivity.row_weights)
    indices, notes = frame_codes(frame, sensitivity, spec)
    return kept_nearest(weight, frame, sensitivity, seed, notes) if indices is None else frame.encoded(indices)


def frame_codes(
    frame: Frame, sensitivity: Sensitivity, spec: RoundingSpec
) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """Indices int32 (rows, columns) of a frame that is given, or None and why they are the nearest ones."""
    cost, tokens = OutputCost.of(sensitivity, frame), sensitivity.tokens
    if tokens is not None and tokens < LEAST_TOKENS:
        return None, (f"rounded to nearest: fewer than {LEAST_TOKENS} tokens",)
    found = _diffused(frame, cost, spec.filled.refine or 0)
    return found, () if found is not None else (NEAREST_KEPT,)


def _diffused(frame: Frame, cost: OutputCost, passes: int) -> torch.Tensor | None:
    """Indices, None where those of rounding to nearest cost no more."""
    ratios = _per_variance(cost.covariance, cost)
    ahead = None if cost.drift is None else _per_variance(cost.drift.triu(), cost)

    def start(rows: torch.Tensor, _first: int, levels: Levels) -> Indices:
        wanted = rows.clone() if ahead is None else rows + rows @ ahead
        return spread(wanted.T.contiguous(), rows.T.contiguous(), ratios, levels).T.copy()

    return best_indices(frame, cost.damped(DAMPING), start, passes)


def _per_variance(matrix: torch.Tensor, cost: OutputCost) -> torch.Tensor:
    """Columns over the variances of their inputs, 0 for those that are always zero."""
    variances = torch.where(cost.alive, cost.covariance.diagonal(), torch.inf)
    return matrix / variances
