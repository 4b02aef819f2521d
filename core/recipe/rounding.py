"""Which algorithm chooses the codes. The algorithms themselves are `core.rounding`; here are names and parameters.

A parameter that a method does not have is refused. What is left out takes the method's default, which `filled` gives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, Strict, ValidationInfo, model_validator

from core.errors import InvalidFormat, InvalidRecipe
from core.recipe.part import READ_NUMBER, READ_WHOLE, NamedPart, did_you_mean, refuse
from core.recipe.tensor_format import TensorFormat

Columns = Literal["natural", "ascending", "descending", "pivot"]
Share = Annotated[float, Strict(), Field(ge=0, le=1, allow_inf_nan=False), READ_NUMBER]
Passes = Annotated[int, Strict(), Field(ge=0, le=100), READ_WHOLE]
Paths = Annotated[int, Strict(), Field(ge=1, le=256), READ_WHOLE]
Steps = Annotated[int, Strict(), Field(ge=1, le=10000), READ_WHOLE]
Flag = Annotated[bool, Strict()]
Layers = Literal["parallel", "sequential"]

# What each method has, with its defaults. Those of all that know their inputs are `_LAYERS`.
_OF_ORDER: dict[str, Any] = {"drift": 1.0, "residual": True, "attention": 0.0}
_LAYERS: dict[str, Any] = {"layers": "parallel"} | _OF_ORDER
_COMMON: dict[str, Any] = {"damping": 0.0, "diagonal": None}
PARAMETERS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "gptq": _COMMON | {"columns": "natural", "paths": 1} | _LAYERS,
    "watersic": _COMMON
    | {
        "columns": "natural",
        "shrinkage": True,
        "rescale": True,
        "mmse_damping": None,
        "classes": True,
        "paths": 16,
    }
    | _LAYERS,
    "error_diffusion": {"refine": 10} | _LAYERS,
    "power_learned": {"damping": 0.01, "refine": 12} | _LAYERS,
    "squeezellm": {},
    "signround": {"steps": 200} | _LAYERS,
}


class RoundingSpec(NamedPart):
    """A rounding method by name.

    `damping`: added to the covariance's diagonal, as a share of its mean. `diagonal`: how far the covariance is
    shrunk to its diagonal; left out, min(0.1, 0.2 inputs / tokens). `columns`: the order of columns; the last is
    rounded first. `shrinkage`: column values shrunk to the least squares. `rescale`: row and column scales fitted
    anew to the codes. `mmse_damping`: f of f D / mean w^2, added to the covariance but not to the target; left out,
    0.5 up to 2.5 bits and 0.25 above. `classes`: columns coded by classes, one model for all otherwise. `paths`: of
    a row's codes that are kept in work at once; with one, each column is decided for good. `refine`: passes of
    coordinate descent over the codes at most. `steps`: of signed gradient descent. `layers`: parallel, all by the
    inputs that they have in the reference, or sequential, each by what comes to it through the layers before it as they
    are stored. What follows is for the latter. `drift`: how far the layers before attention take their inputs from
    there, 0 being the reference's. `residual`: whether layers make up for the residual stream that they add to.
    `attention`: how far tokens count by the attention that they receive, in the layers before it.
    """

    WHAT: ClassVar[str] = "rounding"
    KNOWN: ClassVar[dict[str, str]] = {
        "nearest": "every element to the nearest value of its format; needs no calibration",
        "gptq": "columns in order, each one's error carried on by the input covariance (GPTQ, LDLQ; HPTQ on grids)",
        "watersic": "successive rounding with waterfilled rates over columns, entropy coded (WaterSIC, and beyond it)",
        "error_diffusion": "each column's output error carried on to the next; no inverse (a reconstruction)",
        "power_learned": "power grids: columns in order, then descent over all levels (NUPES)",
        "squeezellm": "codebooks of rows weighted by sensitivity (lloyd4-rows@channel)",
        "signround": "rounding and scales learned by signed gradients, layer by layer",
    }

    name: str = "nearest"
    damping: Share | None = None
    diagonal: Share | None = None
    columns: Columns | None = None
    shrinkage: Flag | None = None
    rescale: Flag | None = None
    mmse_damping: Share | None = None
    classes: Flag | None = None
    paths: Paths | None = None
    refine: Passes | None = None
    steps: Steps | None = None
    layers: Layers | None = None
    drift: Share | None = None
    residual: Flag | None = None
    attention: Share | None = None

    @model_validator(mode="after")
    def _has_parameters(self, info: ValidationInfo) -> Self:
        known = PARAMETERS.get(self.name, {})
        for key in self.model_fields_set - {"name"}:
            if key not in known and getattr(self, key) is not None:
                hint = did_you_mean(key, tuple(known)) if known else "it has none"
                message = f"{self.name} has no parameter {key}"
                problem = ({"path": f"rounding.{key}", "message": f"{message} ({hint})"},)
                refuse(InvalidRecipe(message, where=f"rounding.{key}", hint=hint, errors=problem), info)
        for key in _OF_ORDER:
            if getattr(self, key) is not None and not self.is_sequential:
                message, hint = f"{key} needs layers: sequential", "add it, or leave this out"
                problem = ({"path": f"rounding.{key}", "message": f"{message} ({hint})"},)
                refuse(InvalidRecipe(message, where=f"rounding.{key}", hint=hint, errors=problem), info)
        return self

    @property
    def is_sequential(self) -> bool:
        """Whether layers are rounded one after another, by the inputs that they get from those before them."""
        return self.layers == "sequential"

    @property
    def filled(self) -> RoundingSpec:
        """The same with the method's defaults for what is left out."""
        given = {key: value for key in PARAMETERS[self.name] if (value := getattr(self, key)) is not None}
        return self.model_copy(update=PARAMETERS[self.name] | given)

    @property
    def needs_covariance(self) -> bool:
        """Whether the method cannot do without the covariance of the layers' inputs."""
        return self.name != "nearest"

    @property
    def for_plain_inputs(self) -> RoundingSpec:
        """The same where inputs are independent: nothing is gained by searching over several paths."""
        return self.model_copy(update={"paths": 1}) if "paths" in PARAMETERS[self.name] else self

    def stored_format(self, fmt: TensorFormat) -> TensorFormat:
        """The format in which the method stores what is asked for in `fmt`; InvalidFormat for one it cannot use."""
        if reason := _refusal(self.name, fmt):
            raise InvalidFormat(f"{self.name} {reason[0]}", where=str(fmt), hint=reason[1])
        if self.is_sequential and fmt.entropy_code and not fmt.is_grid:
            reason = "sequential layers need sizes that are known before the codes", "grid3@tensor, or layers: parallel"
            raise InvalidFormat(reason[0], where=str(fmt), hint=reason[1])
        if self.name != "watersic":
            return fmt
        kind = "fp16" if fmt.granularity == "channel" else fmt.scale_format
        return replace(fmt.with_column_scales, scale_format=kind)


def _refusal(name: str, fmt: TensorFormat) -> tuple[str, str] | None:
    """Why a method cannot use a format, and what works."""
    if fmt.is_vector_grid and name != "nearest":
        return "rounds weights one by one, where several share a code", "int4@128, t5_4@64:signmax, or nearest"
    if name in ("nearest", "squeezellm"):
        return None
    if name == "watersic":
        fits = fmt.is_grid and fmt.entropy_code == "rans" and not isinstance(fmt.granularity, int)
        reason = "rounds to grids with rans, with scales of rows or of the tensor"
        plain = not fmt.outlier_rule and not fmt.rotation and not fmt.is_unbiased
        return None if fits and plain else (reason, "grid3@tensor, or rounding: gptq")
    return _refusal_of_option(name, fmt) or _refusal_of_element(name, fmt)


def _refusal_of_option(name: str, fmt: TensorFormat) -> tuple[str, str] | None:
    if fmt.is_block_type or fmt.has_row_codebooks:
        return "needs scales that stand before the codes are chosen", "int4@32, t5_4@64:signmax, or nearest"
    if fmt.outlier_rule or fmt.is_unbiased or fmt.has_column_scales:
        return "has no use for outliers, corrected scales or scales of columns", "the format without that option"
    if fmt.is_grid and name == "gptq" and fmt.rotation:
        return "does not rotate grids", "the grid without rotation"
    return None


def _refusal_of_element(name: str, fmt: TensorFormat) -> tuple[str, str] | None:
    if name == "power_learned" and fmt.family != "power":
        return "rounds to power grids", "power4@channel, or rounding: gptq"
    if name == "signround" and fmt.family != "int":
        return "learns offsets to integers", "int4@128, or rounding: gptq"
    if fmt.is_grid and name != "gptq":
        return "has no grids, whose step follows from the codes", "rounding: gptq, watersic"
    return None


def needs_covariance(rounding: dict[str, Any]) -> bool:
    """The same of a canonical recipe's `rounding`."""
    return RoundingSpec.model_validate(rounding).needs_covariance


def is_sequential(rounding: dict[str, Any]) -> bool:
    """Whether the layers of a canonical recipe are rounded one after another."""
    return RoundingSpec.model_validate(rounding).is_sequential


def catalogue() -> list[dict[str, Any]]:
    """The methods: {name, description, available, parameters (JSON Schema)}."""
    fields = RoundingSpec.parameters_schema()["properties"]
    return [
        {"name": name, "description": text, "available": True, "parameters": _schema_of(name, fields)}
        for name, text in RoundingSpec.KNOWN.items()
    ]


def _schema_of(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    known = PARAMETERS[name]
    chosen = {key: fields[key] | {"default": known[key]} for key in fields if key in known}
    return {"type": "object", "properties": chosen, "additionalProperties": False}
