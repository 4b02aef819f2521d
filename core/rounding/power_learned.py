"""Codes of a power grid learned from data, over the whole grid and not only the two neighbours of a weight.

The aims are NUPES' (arXiv 2308.05600); the method is not its gradient descent but what does better without one (power
grids and error diffusion, A4): GPTQ's column updates from the first column to the last, then coordinate descent over
all levels, both on the covariance of the inputs with `damping` of its mean diagonal added (1 %). The exponent is that
which the format has or, where it leaves it open, the one of least squared error of the weights (A2): it is found
without data. The descent takes the level of least cost also where the format rounds in the power domain.

The tensor keeps the codes of rounding to nearest where these cost no more by the damped cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat
from core.rounding.descent import NEAREST_KEPT, OutputCost, best_indices, kept_nearest
from core.rounding.gptq import frame_indices
from core.rounding.levels import Indices, Levels
from core.rounding.objective import Objective
from core.tensors.encoded import EncodedTensor
from core.tensors.frame import Frame

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity


def round_tensor(
    weight: torch.Tensor,
    fmt: TensorFormat,
    sensitivity: Sensitivity,
    spec: RoundingSpec,
    seed: int,
) -> EncodedTensor:
    """Codes by GPTQ and coordinate descent; `spec`: `damping`, and `refine`, how many passes of descent.

    InvalidFormat for other families than power, and for statistics of other inputs; InvalidCheckpoint for statistics
    that are missing or cannot be those of any inputs.
    """
    frame = Frame.of(weight, fmt, seed=seed, row_weights=sensitivity.row_weights)
    indices, notes = frame_codes(frame, sensitivity, spec)
    if indices is None:
        return kept_nearest(weight, frame, sensitivity, seed, notes)
    return frame.encoded(indices).with_notes(notes)


def frame_codes(
    frame: Frame, sensitivity: Sensitivity, spec: RoundingSpec
) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """Indices int32 (rows, columns) of a frame that is given, None where nearest ones cost no more; what to note."""
    chosen = spec.filled
    damping = chosen.damping or 0.0
    cost = OutputCost.of(sensitivity, frame).damped(damping)
    turned = sensitivity.turned(frame.turned, frame.turned_outputs)
    objective = Objective.of(turned, columns="reversed", damping=damping, diagonal=0.0)
    started = frame_indices(frame, objective).numpy()

    def start(rows: torch.Tensor, first: int, _levels: Levels) -> Indices:
        found: Indices = started[first : first + len(rows)].copy()
        return found

    indices = best_indices(frame, cost, start, chosen.refine or 0)
    return indices, objective.notes if indices is not None else (*objective.notes, NEAREST_KEPT)
