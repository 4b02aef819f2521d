"""From what pydantic found wrong to one error of ours that lists every place with its reason."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import ValidationError

from core.errors import BitmillError, InvalidFormat, InvalidRecipe, MethodNotAvailable
from core.recipe.part import REFUSED, Part, did_you_mean

_PLAIN = {
    "missing": "is required",
    "model_type": "a mapping is needed",
    "model_attributes_type": "a mapping is needed",
    "tuple_type": "a list is needed",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}
_MAX_LISTED = 50


def recipe_error(found: ValidationError, model: type[Part]) -> BitmillError:
    """InvalidRecipe with all problems; InvalidFormat or MethodNotAvailable when there is only that to complain of."""
    items = _without_echoes(found.errors(include_url=False, include_input=False))
    problems = tuple(_problem(item, model) for item in items[:_MAX_LISTED])
    causes = [_cause(item) for item in items]
    first, path = causes[0], problems[0]["path"]
    if len(items) > 1:
        text = f"{len(items)} problems, the first: {problems[0]['message']}"
        return _kind(causes)(text, where=path, errors=problems)
    if first is not None:
        return _kind(causes)(first.detail, where=path, hint=first.hint, errors=problems)
    return InvalidRecipe(problems[0]["message"], where=path, errors=problems)


def _without_echoes(items: list[Any]) -> list[Any]:
    """Without the lists that are called too short only because what they hold was refused."""
    places = {item["loc"][:depth] for item in items for depth in range(len(item["loc"]))}
    return [item for item in items if item["type"] != "too_short" or item["loc"] not in places]


def _kind(causes: list[BitmillError | None]) -> type[BitmillError]:
    for kind in (InvalidFormat, MethodNotAvailable):
        if all(isinstance(cause, InvalidFormat | MethodNotAvailable) for cause in causes) and type(causes[0]) is kind:
            return kind
    return InvalidRecipe


def _cause(item: Any) -> BitmillError | None:
    """The error of ours that a validator refused with."""
    error = item["ctx"]["error"] if item["type"] == REFUSED else None
    return error if isinstance(error, BitmillError) else None


def _problem(item: Any, model: type[Part]) -> dict[str, str]:
    steps = tuple(step for step in item["loc"] if not _is_tag(step))
    path = ".".join(map(str, steps))
    cause = _cause(item)
    if cause is not None:
        deeper = cause.where if cause.where.startswith(path) else path
        return {"path": deeper, "message": f"{cause.detail} ({cause.hint})" if cause.hint else cause.detail}
    return {"path": path, "message": _message(item, steps, model)}


def _message(item: Any, steps: tuple[Any, ...], model: type[Part]) -> str:
    if item["type"] == "extra_forbidden":
        return f"unknown key; {did_you_mean(str(steps[-1])[:80], _keys_at(steps[:-1], model))}"
    text = _PLAIN.get(item["type"]) or item["msg"]
    return str(text).removeprefix("Input ").replace("should", "must")


def _is_tag(step: Any) -> bool:
    """Tags of unions, written <so>, are no part of what the user wrote."""
    return isinstance(step, str) and step.startswith("<") and step.endswith(">")


def _keys_at(steps: tuple[Any, ...], model: type[Part]) -> tuple[str, ...]:
    """The keys that the part at that path knows."""
    for step in steps:
        if isinstance(step, str):
            model = _part_in(model.model_fields[step].annotation) or model
    return tuple(model.model_fields)


def _part_in(annotation: Any) -> type[Part] | None:
    """The part somewhere inside a type."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _part_in(inner))), None)
