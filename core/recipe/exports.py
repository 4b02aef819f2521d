"""The layouts in which a job's result can be written. The writers are `core.exports`; here are their names."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo

from core.recipe.part import listed, require_available

KNOWN = {
    "bitmill": "a folder that stands alone: encoded safetensors, manifest, report, model card, checksums",
}
LATER = {
    "huggingface": "loads in transformers with the Bitmill integration",
    "compressed_tensors": "loads in vLLM as it is",
    "gguf": "loads in llama.cpp as it is",
}


def _available(name: str, info: ValidationInfo) -> str:
    require_available("export", name, KNOWN, LATER, info)
    return name


ExportName = Annotated[str, AfterValidator(_available)]


def catalogue() -> list[dict[str, Any]]:
    """The layouts: {name, description, available, parameters (JSON Schema; none has any)}."""
    return listed(KNOWN, LATER, {"type": "object", "properties": {}, "additionalProperties": False})
