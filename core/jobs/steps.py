"""What a step is told and what it answers: the contract between the queue, the engine and the local pipeline.

A step is a pure function of its request: `input_hash` names everything that decides the output (kind, version of the
method, its part of the recipe, shard, seed, outputs of its dependencies). This module holds the values and the
pure functions that both `core.jobs.graph` and `core.pipeline.local` build requests with. No SQL, no torch, no weights.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from core.ids import content_hash
from core.recipe import allocation, rounding

StepKind = Literal["fetch", "calibrate", "allocate", "quantise", "assemble", "evaluate", "export"]
STEP_KINDS: tuple[StepKind, ...] = get_args(StepKind)

# Bumped when a step would answer differently for the same request, so that stored results are not reused.
METHOD_VERSIONS: dict[StepKind, int] = dict.fromkeys(STEP_KINDS, 1) | {"allocate": 4, "quantise": 3}

# The parts of a canonical recipe that decide a step, beside the outputs of the steps that it depends on.
_RECIPE_PARTS: dict[StepKind, tuple[str, ...]] = {
    "fetch": (),
    "calibrate": ("calibration",),
    "allocate": ("target", "format", "rounding", "allocation", "calibration", "overrides", "groups"),
    "quantise": ("rounding",),
    "assemble": (),
    "evaluate": ("evaluation",),
    "export": (),
}
_DEPENDENCIES: dict[StepKind, tuple[StepKind, ...]] = {
    "fetch": (),
    "calibrate": ("fetch",),
    "allocate": ("fetch", "calibrate"),
    "quantise": ("fetch", "calibrate", "allocate"),
    "assemble": ("fetch", "allocate", "quantise"),
    "evaluate": ("fetch", "assemble"),
    "export": ("fetch", "calibrate", "allocate", "assemble", "evaluate"),
}


class StoredFile(BaseModel):
    """One object that a step made, or one that it passes on: its key in the store, sha256 (hex) and size in bytes."""

    model_config = ConfigDict(frozen=True)

    key: str
    sha256: str
    size: int


class StepOutput(BaseModel):
    """What a step answers: objects by name, and JSON values whose keys each kind of step documents."""

    model_config = ConfigDict(frozen=True)

    files: dict[str, StoredFile] = Field(default_factory=dict)
    values: dict[str, Any] = Field(default_factory=dict)


class StepInput(BaseModel):
    """The output of one dependency."""

    model_config = ConfigDict(frozen=True)

    kind: StepKind
    index: int = 0
    output: StepOutput


class StepRequest(BaseModel):
    """One step to execute. `index` of `count` is the shard (quantise only; others are 0 of 1)."""

    model_config = ConfigDict(frozen=True)

    kind: StepKind
    index: int = 0
    count: int = 1
    input_hash: str
    params: dict[str, Any] = Field(default_factory=dict)
    inputs: tuple[StepInput, ...] = ()
    seed: int = 0

    def outputs(self, kind: StepKind) -> list[StepOutput]:
        """The outputs of the dependencies of that kind, in shard order; empty when the recipe has no such step."""
        found = sorted((given for given in self.inputs if given.kind == kind), key=lambda given: given.index)
        return [given.output for given in found]


def kinds_of(recipe: dict[str, Any]) -> tuple[StepKind, ...]:
    """The kinds of step that a canonical recipe needs, in an order in which they can be done."""
    absent = {kind for kind, part in (("calibrate", "calibration"), ("evaluate", "evaluation")) if not recipe[part]}
    return tuple(kind for kind in STEP_KINDS if kind not in absent)


def dependencies_of(kind: StepKind, recipe: dict[str, Any]) -> tuple[StepKind, ...]:
    """The kinds that a step of `kind` waits for in a job of that recipe; of `quantise`, every shard."""
    there = kinds_of(recipe)
    return tuple(needed for needed in _DEPENDENCIES[kind] if needed in there)


def recipe_params(kind: StepKind, recipe: dict[str, Any]) -> dict[str, Any]:
    """`params` of a step: its part of a canonical recipe; export, which writes the recipe down, gets all of it.

    `calibrate` is told what to gather when that is more than Fisher information, which all recipes have in common.
    `quantise` gets the calibration where layers are rounded one after another, by their inputs.
    `fetch` gets its source from whoever knows the checkpoint: {"files": [...]} of a finished upload, or
    {"source": {"kind": "path" | "hf" | "s3", ...}, "checkpoint": id}.
    """
    if kind == "export":
        return {"recipe": recipe}
    params = {part: recipe[part] for part in _RECIPE_PARTS[kind]}
    by_inputs = rounding.needs_covariance(recipe["rounding"]) or allocation.needs_covariance(recipe["allocation"])
    if kind == "calibrate" and by_inputs:
        params["gather"] = ["fisher", "covariance"]
    if kind == "quantise" and rounding.is_sequential(recipe["rounding"]):
        params["calibration"] = recipe["calibration"]
    return params


def is_one_step(kind: StepKind, recipe: dict[str, Any]) -> bool:
    """Whether a kind of step cannot be split: all but quantise, and that where each layer waits for those before it."""
    return kind != "quantise" or rounding.is_sequential(recipe["rounding"])


def step_seed(kind: StepKind, recipe: dict[str, Any]) -> int:
    """The seed of a step: what uses none gets 0, so that its output is shared by recipes that differ only in seeds."""
    if kind == "calibrate":
        return int(recipe["calibration"].get("seed", recipe["seed"]))
    return 0 if kind in ("fetch", "assemble", "export") else int(recipe["seed"])


def input_hash(
    kind: StepKind, params: dict[str, Any], input_hashes: list[str], *, seed: int, index: int = 0, count: int = 1
) -> str:
    """The name of a step's output. `input_hashes`: `output_hash` of the dependencies, in order of kind and shard."""
    return content_hash(
        {
            "kind": kind,
            "version": METHOD_VERSIONS[kind],
            "params": params,
            "inputs": input_hashes,
            "seed": seed,
            "shard": [index, count],
        }
    )


def output_hash(output: StepOutput) -> str:
    """The name of what a step answered; equal answers have equal names."""
    return content_hash(output.model_dump(mode="json"))
