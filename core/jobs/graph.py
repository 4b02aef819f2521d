"""A recipe and a checkpoint, turned into the steps of a job. Pure: the same inputs give the same graph.

`fetch -> calibrate -> allocate -> quantise (one per shard) -> assemble -> evaluate -> export`; a step waits for all
steps, with all shards, of the kinds that `core.jobs.steps` names. How many shards there are changes no byte of the
result; layers that are rounded one after another are one shard. What the recipe switches off (calibration,
evaluation) has no step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from core.errors import InvalidRecipe
from core.jobs.steps import StepKind, dependencies_of, is_one_step, kinds_of, recipe_params, step_seed

MAX_SHARDS = 64
_UNKNOWN_SIZE_SHARDS = 8  # a checkpoint that is still to be fetched: its size is not known yet
_PLAN: tuple[StepKind, ...] = ("fetch", "calibrate", "allocate")
_NEEDED = ("target", "format", "rounding", "allocation", "calibration", "evaluation", "exports", "seed")

Purpose = Literal["quantise", "plan"]


@dataclass(frozen=True)
class SourceFacts:
    """What the graph must know of a checkpoint: `fetch_params` of the fetch step, and its size in bytes if known."""

    fetch_params: dict[str, Any]
    size_bytes: int | None


@dataclass(frozen=True)
class StepSpec:
    """A step to be made. `needs` are positions of earlier steps in the list."""

    kind: StepKind
    index: int
    count: int
    params: dict[str, Any]
    seed: int
    needs: tuple[int, ...]


def build(
    recipe: dict[str, Any], source: SourceFacts, shard_bytes: int, purpose: Purpose = "quantise"
) -> list[StepSpec]:
    """The steps in an order in which they can be done. InvalidRecipe when the recipe is not in its canonical form."""
    missing = [key for key in _NEEDED if key not in recipe]
    if missing:
        raise InvalidRecipe(f"not a canonical recipe: {', '.join(missing)} missing", where=missing[0])
    specs: list[StepSpec] = []
    for kind in kinds_of(recipe):
        if purpose == "plan" and kind not in _PLAN:
            continue
        needed = dependencies_of(kind, recipe)
        needs = tuple(number for number, spec in enumerate(specs) if spec.kind in needed)
        params = source.fetch_params if kind == "fetch" else recipe_params(kind, recipe)
        count = 1 if is_one_step(kind, recipe) else shard_count(source.size_bytes, shard_bytes)
        specs += [StepSpec(kind, index, count, params, step_seed(kind, recipe), needs) for index in range(count)]
    return specs


def shard_count(size_bytes: int | None, shard_bytes: int) -> int:
    """How many quantise steps a checkpoint of that size gets: one per `shard_bytes`, between 1 and 64."""
    if size_bytes is None:
        return _UNKNOWN_SIZE_SHARDS
    return min(MAX_SHARDS, max(1, -(-size_bytes // shard_bytes)))
