"""The texts that a job reads: for sensitivities (calibration) and for measuring the result (evaluation).

A text is `builtin`, a public data set (`hf:ORG/NAME[:CONFIG][:SPLIT]`), a text file that came with the checkpoint
(`file:RELATIVE/PATH`) or, for the local pipeline only, a path on this machine. Here only the spelling is checked.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, Strict, ValidationInfo

from core.errors import InvalidRecipe, PathNotAllowed
from core.recipe.part import READ_WHOLE, Part, Seed, refuse
from core.storage.checkpoint import validate_path

BUILTIN = "builtin"
FILE = "file:"
DATASET = "hf:"
_MAX_TEXT = 1024
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_DATASET = re.compile(rf"hf:{_NAME}/{_NAME}(?::{_NAME}){{0,2}}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # two letters at least: C:\text.txt is a path
_KINDS = "builtin, hf:ORG/NAME[:CONFIG][:SPLIT], file:PATH/IN/CHECKPOINT, or a path where no service is used"


def is_local_path(text: str) -> bool:
    """Whether a text names a file on this machine, which a service does not read."""
    return text != BUILTIN and not text.startswith((FILE, DATASET))


def checkpoint_file(text: str) -> str | None:
    """The path in the checkpoint that a text names, None when it is another kind of text."""
    return text.removeprefix(FILE) if text.startswith(FILE) else None


def _problem(text: str) -> str:
    """What is wrong with the spelling; empty when nothing is."""
    if any(ord(char) < 32 or ord(char) == 127 for char in text):
        return "holds control characters"
    if text.startswith(DATASET):
        return "" if _DATASET.fullmatch(text) else "is not the name of a data set"
    if (path := checkpoint_file(text)) is not None:
        return _path_problem(path)
    return "is no kind of text" if _SCHEME.match(text) else ""


def _path_problem(path: str) -> str:
    try:
        validate_path(path)
    except PathNotAllowed as error:
        return f"is {error.detail}"
    return ""


def _spelling(text: str, info: ValidationInfo) -> str:
    if problem := _problem(text):
        message = f"{text[:200]!r} {problem}"
        refuse(InvalidRecipe(message, where="text", hint=_KINDS, errors=({"path": "text", "message": message},)), info)
    return text


Text = Annotated[str, Field(min_length=1, max_length=_MAX_TEXT), AfterValidator(_spelling)]
Sequences = Annotated[int, Strict(), Field(ge=1, le=65536), READ_WHOLE]
SequenceLength = Annotated[int, Strict(), Field(ge=8, le=131072), READ_WHOLE]


class CalibrationSpec(Part):
    """`sequences` windows of `sequence_length` tokens of a text; fewer when the text has fewer."""

    text: Text = BUILTIN
    sequences: Sequences = 128
    sequence_length: SequenceLength = 2048
    seed: Seed = 0


class EvaluationSpec(Part):
    """The same for measuring; its windows are evenly spaced, so there is no seed."""

    text: Text = BUILTIN
    sequences: Sequences = 64
    sequence_length: SequenceLength = 2048
