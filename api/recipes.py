"""What REST allows of a recipe, and what of a job can be refused before it is queued."""

from __future__ import annotations

import difflib
from typing import Any

from core.errors import InvalidRecipe, PathNotAllowed
from core.jobs.checkpoints import CheckpointService
from core.recipe.calibration import BUILTIN, is_local_path
from core.recipe.recipe import Recipe, load_recipe, presets
from core.storage.preflight import preflight


def read_recipe(given: str | dict[str, Any]) -> Recipe:
    """The recipe of a request. A string is the name of a preset and nothing else: never a path, never YAML."""
    if isinstance(given, str) and given not in presets():
        raise InvalidRecipe(f"no preset is named {given[:80]!r}", where="recipe", hint=_nearest(given))
    recipe = load_recipe(given)
    _check_texts(recipe.canonical())
    return recipe


def _nearest(name: str) -> str:
    known = sorted(presets())
    found = difflib.get_close_matches(name[:80], known, 1)
    return f"did you mean {found[0]}?" if found else f"presets: {', '.join(known)}"


def _check_texts(canonical: dict[str, Any]) -> None:
    """Text comes with Bitmill, from a hub or from the checkpoint; the paths of this machine are not for clients."""
    for part in ("calibration", "evaluation"):
        settings = canonical.get(part)
        if isinstance(settings, dict) and is_local_path(str(settings.get("text", BUILTIN))):
            hint = "builtin, hf:DATASET, or file:NAME of a file of the checkpoint"
            raise PathNotAllowed("a local path is not read over REST", where=f"{part}.text", hint=hint)


def check_in_advance(checkpoints: CheckpointService, owner: str, checkpoint_id: str, recipe: Recipe) -> None:
    """Refuse what the headers and the recipe tell already, where the checkpoint's files can be read."""
    index = checkpoints.readable(checkpoints.get(owner, checkpoint_id))
    if index is not None:
        preflight(index, recipe)
