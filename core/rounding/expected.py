"""What a rounding method is expected to leave of the error of rounding to nearest, before anything is rounded.

In the measure of the layer's outputs, tr(E S E^T), an error of nearest rounding costs the mean of S_ii for each weight,
and what successive rounding leaves over costs the mean of L_ii^2, S = L L^T (data-aware rounding, section 4.1); steps
in proportion to 1 / L_ii bring it down to the reverse waterfilling of the L_ii^2 at the rate (4.2). An allocation that
predicts by nearest rounding multiplies its losses with this share. No method is expected to do worse than nearest.

A stack of experts has the mean of theirs. Formats that rotate weights are taken as if they did not, and `signround` and
`squeezellm` as nearest rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from core.recipe.rounding import RoundingSpec
from core.rounding.limit import SHAPE_GAP, distortion_at
from core.rounding.objective import Objective

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity

_CARRIED_ON = ("gptq", "error_diffusion", "power_learned")
_Squares = npt.NDArray[np.float64]


class ExpectedShare:
    """Of one tensor and method; `at(bits)`: in (0, 1], 1 where inputs are not known and for methods not foreseen.

    `is_grid`: whether columns are rounded in the order of grids, which is that of `columns` from the last one on.
    """

    def __init__(self, spec: RoundingSpec, sensitivity: Sensitivity, *, is_grid: bool = True) -> None:
        self._waterfilled, self._layers = spec.name == "watersic", list[tuple[_Squares, float]]()
        if spec.name not in (*_CARRIED_ON, "watersic"):
            return
        chosen = spec.filled
        natural = "natural" if is_grid else "reversed"
        columns = natural if chosen.columns in (None, "natural") else str(chosen.columns)
        for one in [sensitivity] if sensitivity.experts is None else sensitivity.experts:
            if one.covariance is None:
                self._layers.append((np.ones(1), 1.0))
                continue
            objective = Objective.of(one, columns=columns, damping=chosen.damping or 0.0, diagonal=chosen.diagonal)
            squares = _undamped(objective).cpu().numpy()
            mean = float(objective.hessian.diagonal().mean()) if squares.size else 1.0
            self._layers.append((squares if squares.size else np.ones(1), mean))

    def at(self, bits: float) -> float:
        """At that many bits per weight."""
        shares = [self._share(squares, mean, bits) for squares, mean in self._layers]
        return float(np.mean(shares)) if shares else 1.0

    def _share(self, squares: _Squares, mean: float, bits: float) -> float:
        if not self._waterfilled:
            return min(1.0, float(squares.mean()) / mean)
        rate = max(bits - SHAPE_GAP, 0.0)
        return min(1.0, distortion_at(squares, rate) / mean * float(4.0**rate))


def _undamped(objective: Objective) -> torch.Tensor:
    """L_ii^2 times (L^-1 S L^-T)_ii: what is left over of columns that damping has rounded for another covariance."""
    squares = objective.units.square()
    if not objective.damping or not objective.inputs:
        return squares
    eye = torch.eye(objective.inputs, dtype=objective.factor.dtype, device=objective.factor.device)
    inverse = torch.linalg.solve_triangular(objective.factor, eye, upper=False)
    kept: torch.Tensor = 1 - objective.damping * inverse.square().sum(dim=1)
    return squares * kept.clamp(min=0)
