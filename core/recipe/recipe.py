"""The recipe: everything that decides a job's result, as a person writes it and as the service stores it.

`load_recipe` is the door: it takes a preset's name, a YAML or JSON file or a mapping, and either returns a recipe that
can be carried out as far as can be known without a checkpoint, or raises with every problem listed by its path.
`Recipe.canonical()` is one plain JSON value per meaning, with every default filled in; jobs are stored and hashed by
it. What only a checkpoint can tell is checked by `core.storage.preflight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Strict, Tag, ValidationError, ValidationInfo, model_validator

from core.errors import InvalidFormat, InvalidRecipe
from core.recipe.allocation import AllocationSpec, widths_within
from core.recipe.calibration import CalibrationSpec, EvaluationSpec
from core.recipe.document import is_file, plain_mapping, read_document, with_settings
from core.recipe.exports import ExportName
from core.recipe.override import FormatText, Override, first_match
from core.recipe.part import COLLECT, READ_NUMBER, READ_WHOLE, Glob, Part, Seed, did_you_mean, refuse
from core.recipe.problems import recipe_error
from core.recipe.rounding import RoundingSpec
from core.recipe.target import Target
from core.recipe.tensor_format import TensorFormat, parse

__all__ = ["Gate", "Override", "Recipe", "descriptions", "first_match", "load_recipe", "presets"]

VERSION = 1
_PRESETS = Path(__file__).parent / "presets"
_SUFFIXES = (".yaml", ".yml", ".json")


class Gate(Part):
    """What the exported model must not be worse than: mean KL in nats per token, share of equal top-1 tokens."""

    max_kl: Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False), READ_NUMBER] | None = None
    min_top1: Annotated[float, Strict(), Field(ge=0, le=1), READ_NUMBER] | None = None

    @model_validator(mode="after")
    def _says_something(self, info: ValidationInfo) -> Self:
        if self.max_kl is None and self.min_top1 is None:
            message = "give max_kl or min_top1, or leave the gate out"
            problem = ({"path": "gate", "message": message},)
            refuse(InvalidRecipe(message, where="gate", errors=problem), info)
        return self


def _off_or_given(value: Any) -> str:
    return "<off>" if value is False else "<given>"


def _auto_none_or_lists(value: Any) -> str:
    return "<name>" if isinstance(value, str) else "<lists>"


_Off = Annotated[Literal[False], Tag("<off>")]
Calibration = Annotated[Annotated[CalibrationSpec, Tag("<given>")] | _Off, Discriminator(_off_or_given)]
Evaluation = Annotated[Annotated[EvaluationSpec, Tag("<given>")] | _Off, Discriminator(_off_or_given)]
GlobLists = tuple[Annotated[tuple[Glob, ...], Field(min_length=1, max_length=1000)], ...]
Groups = Annotated[
    Annotated[Literal["auto", "none"], Tag("<name>")] | Annotated[GlobLists, Field(max_length=1000), Tag("<lists>")],
    Discriminator(_auto_none_or_lists),
]


class Recipe(Part):
    """A recipe that is whole: `calibration` and `evaluation` are False where the job has none.

    Left out, `calibration` is on when something needs it: an allocation by data or a KL target. `format` is canonical
    text (`core.recipe.tensor_format`).
    """

    version: Annotated[int, Strict(), Field(ge=VERSION, le=VERSION), READ_WHOLE] = VERSION
    target: Target
    format: FormatText
    rounding: RoundingSpec = RoundingSpec()
    allocation: AllocationSpec = AllocationSpec()
    calibration: Calibration = False
    evaluation: Evaluation = EvaluationSpec()
    overrides: Annotated[tuple[Override, ...], Field(max_length=256)] = ()
    groups: Groups = "auto"
    exports: Annotated[tuple[ExportName, ...], Field(min_length=1, max_length=8)] = ("bitmill",)
    gate: Gate | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        if "calibration" not in self.model_fields_set and self.needs_calibration:
            object.__setattr__(self, "calibration", CalibrationSpec())
        problems = [*_missing_texts(self), *_empty_widths(self), *_unusable_formats(self), *_repeated_exports(self)]
        if problems:
            path, message, hint = problems[0]
            errors = tuple({"path": path, "message": f"{message} ({hint})"} for path, message, hint in problems)
            refuse(InvalidRecipe(message, where=path, hint=hint, errors=errors), info)
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether allocation or rounding cannot do without the calibration text."""
        by_method = self.allocation.needs_calibration or self.rounding.needs_covariance
        return by_method or self.target.kl is not None or self.weighs_errors

    @property
    def weighs_errors(self) -> bool:
        """Whether a format is fitted by sensitivities."""
        texts = [self.format, *(override.format for override in self.overrides if override.format)]
        return any(parse(text).mode == "weighted" for text in texts)

    @property
    def tensor_format(self) -> TensorFormat:
        """`format`, parsed."""
        return parse(self.format)

    def canonical(self) -> dict[str, Any]:
        """Plain JSON with every default filled in: equal for every spelling of the same recipe.

        Optional parameters that are not set are left out, so that new ones do not change the hashes of old recipes.
        """
        return {
            "version": self.version,
            "target": self.target.canonical(),
            "format": self.format,
            "rounding": self.rounding.canonical(),
            "allocation": self.allocation.canonical(),
            "calibration": self.calibration and self.calibration.model_dump(mode="json"),
            "evaluation": self.evaluation and self.evaluation.model_dump(mode="json"),
            "overrides": [override.canonical() for override in self.overrides],
            "groups": self.groups if isinstance(self.groups, str) else [list(globs) for globs in self.groups],
            "exports": list(self.exports),
            "gate": self.gate and self.gate.model_dump(mode="json", exclude_none=True),
            "seed": self.seed,
        }

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema of what a user writes."""
        return cls.model_json_schema()


def load_recipe(
    value: str | Path | Mapping[str, Any] | Recipe,
    overrides: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of that name, in that file or mapping, with dotted names set (see `core.recipe.document`).

    A name of a preset comes before a file of the same name. Texts
    of strangers must be checked to be a preset's name first, or they would open files. Raises InvalidRecipe with
    `errors`, InvalidFormat, MethodNotAvailable.
    """
    document = with_settings(_document(value), overrides or {})
    try:
        return Recipe.model_validate(document, context={COLLECT: True})
    except ValidationError as error:
        raise recipe_error(error, Recipe) from None


def presets() -> dict[str, Recipe]:
    """The recipes that have names, by name."""
    return dict(_presets())


def descriptions() -> dict[str, str]:
    """What each preset is for: the first line of its file."""
    lines = {name: (_PRESETS / f"{name}.yaml").read_text("utf-8").partition("\n")[0] for name in _preset_documents()}
    return {name: line.lstrip("# ").strip() for name, line in lines.items()}


@cache
def _presets() -> dict[str, Recipe]:
    return {name: load_recipe(name) for name in _preset_documents()}


@cache
def _preset_documents() -> dict[str, dict[str, Any]]:
    return {path.stem: read_document(path) for path in sorted(_PRESETS.glob("*.yaml"))}


def _document(value: str | Path | Mapping[str, Any] | Recipe) -> dict[str, Any]:
    if isinstance(value, Recipe):
        return value.canonical()
    if isinstance(value, str) and value in _preset_documents():
        return plain_mapping(_preset_documents()[value])
    if isinstance(value, Path) or (isinstance(value, str) and _names_a_file(value)):
        return read_document(Path(value))
    if isinstance(value, str):
        hint = did_you_mean(value, tuple(_preset_documents()))
        raise InvalidRecipe(
            f"no recipe {value[:80]!r}", where="recipe", hint=hint, errors=({"path": "", "message": hint},)
        )
    return plain_mapping(value)


def _names_a_file(text: str) -> bool:
    return text.endswith(_SUFFIXES) or is_file(Path(text))


def _missing_texts(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Parts that need a text which the recipe switches off, as (path, message, hint)."""
    found = []
    if not recipe.calibration and recipe.allocation.needs_calibration:
        message = f"{recipe.allocation.name} needs calibration"
        found.append(("allocation", message, "allocation: uniform, or give calibration"))
    if not recipe.calibration and recipe.rounding.needs_covariance:
        found.append(("rounding", f"{recipe.rounding.name} needs calibration", "nearest, or give calibration"))
    if not recipe.calibration and recipe.target.kl is not None:
        found.append(("target.kl", "a KL target is measured on the calibration text", "give calibration"))
    if not recipe.calibration and recipe.weighs_errors:
        found.append(("format", "a weighted codebook needs calibration", "lloyd4 without mode, or give calibration"))
    if not recipe.evaluation and recipe.gate is not None:
        found.append(("gate", "a gate needs evaluation", "give evaluation, or leave the gate out"))
    return found


def _empty_widths(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Bounds between which a format has no width."""
    spec = recipe.allocation
    bounds = [("allocation", recipe.format, spec.min_bits, spec.max_bits)]
    for at, one in enumerate(recipe.overrides):
        if not one.keep and not one.is_exact:
            least, most = one.min_bits or spec.min_bits, one.max_bits or spec.max_bits
            bounds.append((f"overrides.{at}", one.format or recipe.format, least, most))
    found = []
    for path, text, least, most in bounds:
        if not widths_within(parse(text), least, most):
            widths = ", ".join(f"{width:g}" for width in parse(text).allowed_widths())
            found.append((path, f"{text} has no width between the bounds", f"its widths: {widths}"))
    return found


def _unusable_formats(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Formats that the rounding method has no use for."""
    texts = {"format": recipe.format}
    texts |= {f"overrides.{at}.format": one.format for at, one in enumerate(recipe.overrides) if one.format}
    found = []
    for path, text in texts.items():
        try:
            recipe.rounding.stored_format(parse(text))
        except InvalidFormat as error:
            found.append((path, error.detail, error.hint))
    return found


def _repeated_exports(recipe: Recipe) -> list[tuple[str, str, str]]:
    if len(set(recipe.exports)) == len(recipe.exports):
        return []
    return [("exports", "an export stands twice", "name each once")]
