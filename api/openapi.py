"""The OpenAPI document, corrected where the framework describes errors that this API does not send."""

from __future__ import annotations

from typing import Any

from api.errors import MEDIA_TYPE, Problem

Json = dict[str, Any]

_REF = "#/components/schemas/{model}"


def describe(document: Json) -> Json:
    """Every operation answers its errors with a problem document; the framework's own error schemas are gone."""
    schemas: Json = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    definitions = Problem.model_json_schema(ref_template=_REF)
    schemas |= definitions.pop("$defs", {})
    schemas["Problem"] = definitions
    answer = {
        "description": "What was wrong, with a stable code.",
        "content": {MEDIA_TYPE: {"schema": {"$ref": _REF.format(model="Problem")}}},
    }
    for methods in document["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = answer
    return document
