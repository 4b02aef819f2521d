"""Codes of weights in a frame that is given: the methods whose scales and tables stand before the codes are chosen.

`core.rounding.stacked` makes one frame of a tensor and gives its parts to these, one after another. Each does what its
own module says. Promise: what comes back are indices into the frame's table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from core.recipe.rounding import RoundingSpec
from core.rounding import error_diffusion, gptq, power_learned
from core.rounding.levels import Levels
from core.tensors.frame import Frame

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity

Notes = tuple[str, ...]

_METHODS: dict[str, Callable[[Frame, Sensitivity, RoundingSpec], tuple[torch.Tensor | None, Notes]]] = {
    "gptq": gptq.frame_codes,
    "error_diffusion": error_diffusion.frame_codes,
    "power_learned": power_learned.frame_codes,
}


def frame_codes(frame: Frame, sensitivity: Sensitivity, spec: RoundingSpec) -> tuple[torch.Tensor, Notes]:
    """Indices int32 (rows, columns) of the frame's matrix, and what was done otherwise than asked.

    InvalidFormat for statistics of another matrix, InvalidCheckpoint for such as cannot be those of any inputs.
    """
    sensitivity.check(*frame.matrix.shape)
    found, notes = _METHODS[spec.name](frame, sensitivity, spec)
    if found is None:
        found = torch.from_numpy(Levels.of(frame).nearest(frame.matrix.double()))
    return found, notes


def has_frame_codes(spec: RoundingSpec) -> bool:
    """Whether the method is one of these."""
    return spec.name in _METHODS
