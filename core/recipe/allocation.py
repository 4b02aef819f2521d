"""How the budget is shared among tensors, and between which widths a tensor's format may vary.

The solvers are `core.allocation`; here are names, parameters, and the clamps that solver and preflight agree on.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

from pydantic import ValidationInfo, model_validator

from core.errors import InvalidRecipe
from core.recipe.format_names import MAX_GRID_BITS
from core.recipe.format_rules import least_grid_bits
from core.recipe.part import Bits, NamedPart, listed, refuse
from core.recipe.tensor_format import TensorFormat

_NEED_CALIBRATION = ("fisher", "higgs", "baq")
_NEED_COVARIANCE = ("baq",)


class AllocationSpec(NamedPart):
    """An allocation method; `min_bits` and `max_bits` bound the element bits of every tensor."""

    WHAT: ClassVar[str] = "allocation"
    KNOWN: ClassVar[dict[str, str]] = {
        "fisher": "widths by Fisher information: least predicted KL divergence under the budget; needs calibration",
        "uniform": "one width for every tensor: the largest that fits",
        "heuristic": "two more bits for embedding, head, the first two and the last two layers",
        "higgs": "widths by how much KL divergence noise in each tensor was measured to cost; needs calibration",
        "baq": "widths by the errors of layers' outputs, from the covariance of inputs; needs calibration",
    }

    name: str = "fisher"
    min_bits: Bits | None = None
    max_bits: Bits | None = None

    @property
    def needs_calibration(self) -> bool:
        """Whether the method cannot do without the calibration text."""
        return self.name in _NEED_CALIBRATION

    @model_validator(mode="after")
    def _ordered(self, info: ValidationInfo) -> Self:
        require_ordered(self.min_bits, self.max_bits, "allocation.min_bits", info)
        return self


def require_ordered(least: float | None, most: float | None, path: str, info: ValidationInfo) -> None:
    """Refuse bounds of which the lower is above the upper."""
    if least is not None and most is not None and least > most:
        message = f"min_bits {least:g} is above max_bits {most:g}"
        refuse(InvalidRecipe(message, where=path, errors=({"path": path, "message": message},)), info)


def needs_covariance(allocation: dict[str, Any]) -> bool:
    """Whether a canonical recipe's `allocation` needs the covariance of the layers' inputs."""
    return AllocationSpec.model_validate(allocation).name in _NEED_COVARIANCE


def widths_within(fmt: TensorFormat, least: float | None, most: float | None) -> tuple[float, ...]:
    """The format's widths between the bounds, ascending; None is no bound. May be empty.

    A grid has every rate, so bounds are widths themselves.
    """
    widths = fmt.allowed_widths()
    low, high = least or widths[0], widths[-1] if most in (None, math.inf) else most
    if not fmt.is_grid:
        return tuple(bits for bits in widths if low <= bits <= high)
    low, high = max(low, least_grid_bits(fmt)), min(high, MAX_GRID_BITS)
    return tuple(sorted({low, *(bits for bits in widths if low < bits < high), high})) if low <= high else ()


def catalogue() -> list[dict[str, Any]]:
    """The methods: {name, description, available, parameters (JSON Schema)}."""
    return listed(AllocationSpec.KNOWN, AllocationSpec.LATER, AllocationSpec.parameters_schema())
