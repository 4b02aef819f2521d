"""What a rounding method is expected to leave of the error of rounding to nearest, before anything is rounded.

In the measure of the layer's outputs, tr(E S E^T), an error of nearest rounding costs the mean of S_ii for each weight,
and what successive rounding leaves over costs the mean of L_ii^2, S = L L^T (data-aware rounding, section 4.1); steps
in proportion to 1 / L_ii bring it down to the reverse waterfilling of the L_ii^2 at the rate (4.2). An allocation that
predicts by nearest rounding multiplies its losses with this share. No method is expected to do worse than nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from core.recipe.rounding import RoundingSpec
from core.rounding.limit import SHAPE_GAP, distortion_at
from core.rounding.objective import Objective

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity

_CARRIED_ON = ("gptq", "error_diffusion", "power_learned")


class ExpectedShare:
    """Of one layer and method; `at(bits)`: in (0, 1], 1 without a covariance and for methods that are not foreseen."""

    def __init__(self, spec: RoundingSpec, sensitivity: Sensitivity) -> None:
        self._waterfilled, self._units, self._mean = spec.name == "watersic", np.ones(0), 1.0
        if sensitivity.covariance is not None and spec.name in (*_CARRIED_ON, "watersic"):
            objective = Objective.of(sensitivity, diagonal=spec.diagonal)
            self._units = objective.units.square().cpu().numpy()
            self._mean = float(objective.hessian.diagonal().mean()) if self._units.size else 1.0

    def at(self, bits: float) -> float:
        """At that many bits per weight."""
        if not self._units.size:
            return 1.0
        if not self._waterfilled:
            return min(1.0, float(self._units.mean()) / self._mean)
        rate = max(bits - SHAPE_GAP, 0.0)
        return min(1.0, distortion_at(self._units, rate) / self._mean * float(4.0**rate))
