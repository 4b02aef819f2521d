"""What a recipe says about single tensors, by globs over their names; the first one that matches counts."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from core.errors import InvalidFormat, InvalidRecipe, MethodNotAvailable
from core.recipe.allocation import require_ordered
from core.recipe.part import Bits, Glob, Part, refuse
from core.recipe.tensor_format import parse


def _canonical_format(text: str, info: ValidationInfo) -> str:
    try:
        fmt = parse(text)
    except (InvalidFormat, MethodNotAvailable) as error:
        refuse(type(error)(f"{text!r}: {error.detail}", where="format", hint=error.hint), info)
    if fmt.outliers_found is not None or fmt.coded_bytes is not None:
        hint = "leave out the x and what follows"
        message = f"{text!r}: what was found in a tensor stands in artefacts only"
        refuse(InvalidFormat(message, where="format", hint=hint), info)
    return str(fmt)


FormatText = Annotated[str, Field(max_length=200), AfterValidator(_canonical_format)]


class Override(Part):
    """For the tensors that `match`: kept as they are, or another format, or other bounds of their element bits.

    `format` alone is the exact format of the tensor; with a bound it is the family whose width varies. Bounds take the
    place of the allocation's.
    """

    match: Glob
    keep: Literal[True] | None = None
    format: FormatText | None = None
    min_bits: Bits | None = None
    max_bits: Bits | None = None

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        require_ordered(self.min_bits, self.max_bits, "min_bits", info)
        others = [name for name in ("format", "min_bits", "max_bits") if getattr(self, name) is not None]
        message = ""
        if self.keep and others:
            message = f"keep leaves the tensor as it is and excludes {', '.join(others)}"
        elif not self.keep and not others:
            message = "says nothing: give keep, format, min_bits or max_bits"
        if message:
            refuse(InvalidRecipe(message, where=self.match, errors=({"path": "", "message": message},)), info)
        return self

    @property
    def is_exact(self) -> bool:
        """Whether the format is fixed, width included."""
        return self.format is not None and self.min_bits is None and self.max_bits is None

    def canonical(self) -> dict[str, Any]:
        """Plain JSON; what is not set is left out."""
        return self.model_dump(mode="json", exclude_none=True)


def first_match(overrides: Iterable[Override], name: str) -> Override | None:
    """The override that counts for a tensor, None when none matches."""
    return next((override for override in overrides if fnmatchcase(name, override.match)), None)
