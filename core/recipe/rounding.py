"""Which algorithm chooses the codes. The algorithms themselves are `core.rounding`; here are names and parameters.

`nearest` is there; the other names of the contract raise MethodNotAvailable.
"""

from __future__ import annotations

from typing import Any, ClassVar

from core.recipe.part import NamedPart, listed


class RoundingSpec(NamedPart):
    """A rounding method by name."""

    WHAT: ClassVar[str] = "rounding"
    KNOWN: ClassVar[dict[str, str]] = {
        "nearest": "every element to the nearest value of its format; needs no calibration",
    }
    LATER: ClassVar[dict[str, str]] = {
        "error_diffusion": "carries each element's error on to its neighbours",
        "gptq": "columns in order, each one's error carried on by the input covariance",
        "watersic": "successive coding with waterfilled rates over columns",
        "power_learned": "a power-law codebook whose exponent and scales are learned",
        "squeezellm": "codebooks weighted by sensitivity",
        "signround": "learned rounding by signed gradients",
        "higgs": "nearest after a Hadamard rotation",
    }

    name: str = "nearest"


def catalogue() -> list[dict[str, Any]]:
    """The methods: {name, description, available, parameters (JSON Schema)}."""
    return listed(RoundingSpec.KNOWN, RoundingSpec.LATER, RoundingSpec.parameters_schema())
