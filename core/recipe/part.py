"""What the parts of a recipe have in common: frozen models that refuse unknown keys, and how they refuse a value.

Inside a whole recipe every refusal is collected, so that a user reads all of them at once (`core.recipe.problems`);
a part that is made on its own raises the error itself. Numbers are strict: neither booleans nor text become numbers,
except the text of a number with an exponent, because YAML 1.1 reads `1e-3` as text.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, NoReturn

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    Strict,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from core.errors import BitmillError, InvalidRecipe, MethodNotAvailable

COLLECT = "collect"
REFUSED = "refused"
MAX_SEED = (1 << 63) - 1
MAX_GLOB = 512
_EXPONENT = re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d{1,3}")


def refuse(error: BitmillError, info: ValidationInfo) -> NoReturn:
    """Refuse a value with that error: collected while a whole recipe is read, raised otherwise."""
    if info.context and info.context.get(COLLECT):
        raise PydanticCustomError(REFUSED, "{error}", {"error": error})
    raise error


def did_you_mean(name: str, known: tuple[str, ...]) -> str:
    """A hint that names the nearest of the known names, and all of them."""
    near = get_close_matches(name, known, 1, 0.5)
    listed = f"known: {', '.join(known)}"
    return f"did you mean {near[0]}? {listed}" if near else listed


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _whole(value: Any) -> Any:
    number = _number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else value


READ_NUMBER = BeforeValidator(_number)
READ_WHOLE = BeforeValidator(_whole)
Seed = Annotated[int, Strict(), Field(ge=0, le=MAX_SEED), READ_WHOLE]
Bits = Annotated[float, Strict(), Field(ge=0.1, le=16, allow_inf_nan=False), READ_NUMBER]
Glob = Annotated[str, Field(min_length=1, max_length=MAX_GLOB)]


class Part(BaseModel):
    """A frozen part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NamedPart(Part):
    """A method and its parameters; its bare name stands for the method with none set.

    A name of `LATER` raises MethodNotAvailable, any other that is not in `KNOWN` InvalidRecipe with the nearest one.
    """

    WHAT: ClassVar[str] = "method"
    KNOWN: ClassVar[dict[str, str]] = {}
    LATER: ClassVar[dict[str, str]] = {}

    name: str

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _known_name(cls, name: str, info: ValidationInfo) -> str:
        require_available(cls.WHAT, name, cls.KNOWN, cls.LATER, info)
        return name

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        described = handler.resolve_ref_schema(handler(core_schema))
        described["properties"]["name"]["enum"] = list(cls.KNOWN)
        return {"anyOf": [{"type": "string", "enum": list(cls.KNOWN)}, described]}

    @classmethod
    def parameters_schema(cls) -> dict[str, Any]:
        """JSON Schema of the parameters beside the name."""
        fields = cls.model_json_schema()["anyOf"][1]["properties"]
        parameters = {key: field for key, field in fields.items() if key != "name"}
        return {"type": "object", "properties": parameters, "additionalProperties": False}

    def canonical(self) -> dict[str, Any]:
        """Plain JSON; parameters that are not set are left out, so that later ones change no old hash."""
        return self.model_dump(mode="json", exclude_none=True)


def require_available(what: str, name: str, known: dict[str, str], later: dict[str, str], info: ValidationInfo) -> None:
    """Refuse a name that this version does not have."""
    place = f"{what}.name" if what in ("rounding", "allocation") else what
    if name in later:
        hint = f"available: {', '.join(known)}"
        refuse(MethodNotAvailable(f"the {what} {name} is not available yet", where=place, hint=hint), info)
    if name not in known:
        hint = did_you_mean(name, (*known, *later))
        problem = ({"path": place, "message": f"no {what} {name[:80]!r} ({hint})"},)
        refuse(InvalidRecipe(f"no {what} {name[:80]!r}", where=place, hint=hint, errors=problem), info)


def listed(known: dict[str, str], later: dict[str, str], parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Catalogue entries of the methods of this version and of the names that later ones bring."""
    here = [_entry(name, text, True, parameters) for name, text in known.items()]
    return here + [_entry(name, f"{text} (not available yet)", False, {}) for name, text in later.items()]


def _entry(name: str, description: str, available: bool, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "description": description, "available": available, "parameters": parameters}
