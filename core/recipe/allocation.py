"""How the budget is shared among tensors, and between which widths a tensor's format may vary.

The solvers are `core.allocation`; here are names, parameters, and the clamps that solver and preflight agree on.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import ValidationInfo, model_validator

from core.errors import InvalidRecipe
from core.recipe.part import Bits, NamedPart, listed, refuse
from core.recipe.tensor_format import TensorFormat


class AllocationSpec(NamedPart):
    """An allocation method; `min_bits` and `max_bits` bound the element bits of every tensor."""

    WHAT: ClassVar[str] = "allocation"
    KNOWN: ClassVar[dict[str, str]] = {
        "fisher": "widths by Fisher information: least predicted KL divergence under the budget; needs calibration",
        "uniform": "one width for every tensor: the largest that fits",
        "heuristic": "two more bits for embedding, head, the first two and the last two layers",
    }
    LATER: ClassVar[dict[str, str]] = {
        "baq": "widths from the input covariance",
        "higgs": "widths from measured loss against perturbation",
    }

    name: str = "fisher"
    min_bits: Bits | None = None
    max_bits: Bits | None = None

    @model_validator(mode="after")
    def _ordered(self, info: ValidationInfo) -> Self:
        require_ordered(self.min_bits, self.max_bits, "allocation.min_bits", info)
        return self


def require_ordered(least: float | None, most: float | None, path: str, info: ValidationInfo) -> None:
    """Refuse bounds of which the lower is above the upper."""
    if least is not None and most is not None and least > most:
        message = f"min_bits {least:g} is above max_bits {most:g}"
        refuse(InvalidRecipe(message, where=path, errors=({"path": path, "message": message},)), info)


def widths_within(fmt: TensorFormat, least: float | None, most: float | None) -> tuple[float, ...]:
    """The format's widths between the bounds, ascending; None is no bound. May be empty."""
    low, high = least or 0.0, most or float("inf")
    return tuple(bits for bits in fmt.allowed_widths() if low <= bits <= high)


def catalogue() -> list[dict[str, Any]]:
    """The methods: {name, description, available, parameters (JSON Schema)}."""
    return listed(AllocationSpec.KNOWN, AllocationSpec.LATER, AllocationSpec.parameters_schema())
