"""The budget of a job: bits per parameter, total bytes, or KL divergence. Exactly one of them.

Bits and bytes are those of the finished weight files, everything counted; KL is nats per token against the reference
model, measured on the calibration text. Meeting it is the work of `core.allocation`.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, Strict, ValidationInfo, model_validator

from core.errors import InvalidRecipe
from core.recipe.part import READ_NUMBER, READ_WHOLE, Part, refuse

KINDS = ("bits_per_param", "size_bytes", "kl")


class Target(Part):
    """One budget; the others are None."""

    bits_per_param: Annotated[float, Strict(), Field(gt=0, le=64, allow_inf_nan=False), READ_NUMBER] | None = None
    size_bytes: Annotated[int, Strict(), Field(gt=0, lt=1 << 63), READ_WHOLE] | None = None
    kl: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False), READ_NUMBER] | None = None

    @model_validator(mode="after")
    def _exactly_one(self, info: ValidationInfo) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            message = f"{' and '.join(given) or 'nothing'} given; give exactly one of {', '.join(KINDS)}"
            problem = ({"path": "target", "message": message},)
            refuse(InvalidRecipe(message, where="target", errors=problem), info)
        return self

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def value(self) -> float:
        """Its number, in the unit of its kind."""
        return float(getattr(self, self.kind))

    def canonical(self) -> dict[str, float | int]:
        """Plain JSON with its only key."""
        return {self.kind: getattr(self, self.kind)}
