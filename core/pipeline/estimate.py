"""What a job will need before it starts: disk, time and memory. Bounds for disk, plain models for the rest.

Memory is that of the largest step. Steps that pass text through the network hold one block of it at a time (comparing
networks: two heads at the end; rounding one layer after another: a block of each, and twice as much beside it), three
sets of activations between blocks, and the logits of one batch. The whole network is held by allocation `higgs`, and
where it cannot be passed through in blocks, which is logged. The numbers are held to by `benchmarks/job_memory.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any, Self

from core.pipeline.plan_file import Plan
from core.recipe.allocation import needs_covariance
from core.recipe.recipe import Recipe
from core.storage.checkpoint import CheckpointIndex

_ENCODE_BYTES_PER_S = {"cpu": 40e6, "cuda": 2e9}
_WORK_BYTES = 400 << 20
_PASS_WORK_BYTES = 900 << 20  # with the model library, and inputs of blocks that wait in memory for the way back
_LOGITS = 1 << 24  # of a batch, unless one sequence has more
_FORWARD_FLOP_PER_S = {"cpu": 3e10, "cuda": 1e14}


def required_scratch_bytes(index: CheckpointIndex, recipe: Recipe) -> int:
    """Disk that a job takes at its worst moment beside the source: encoded shards, weight files and small documents.

    From the target where it names a size, else as large as the source.
    """
    target = recipe.canonical()["target"]
    if target.get("size_bytes"):
        weights = int(target["size_bytes"])
    elif target.get("bits_per_param"):
        weights = int(target["bits_per_param"] * index.parameters / 8)
    else:
        weights = index.size_bytes
    weights = min(weights, index.size_bytes)
    others = sum(source.size for path, source in index.files.items() if path not in index.headers)
    return 3 * weights + others + _covariance_bytes(index, recipe) + _waiting_bytes(index, recipe)


def _waiting_bytes(index: CheckpointIndex, recipe: Recipe) -> int:
    """The inputs of all blocks, which Fisher information needs on the way back."""
    calibration = recipe.canonical()["calibration"]
    parts = _Parts.of(index)
    tokens = calibration["sequences"] * calibration["sequence_length"] if calibration else 0
    return 4 * tokens * parts.width * parts.blocks


def _covariance_bytes(index: CheckpointIndex, recipe: Recipe) -> int:
    """The file of input covariances, if every matrix had inputs of its own."""
    if not (recipe.rounding.needs_covariance or needs_covariance(recipe.allocation.canonical())):
        return 0
    return sum(4 * _squared_inputs(index.tensors[name].shape) for name in index.names)


def estimate(index: CheckpointIndex, recipe: Recipe, plan: Plan, device: str, planning_s: float) -> dict[str, Any]:
    """{estimated_seconds, estimated_peak_bytes, estimated_disk_bytes} of the whole job, planning as measured."""
    canonical = recipe.canonical()
    kind = device.split(":", maxsplit=1)[0]
    seconds = planning_s + 2 * index.size_bytes / _ENCODE_BYTES_PER_S.get(kind, 40e6)
    texts = [canonical[part] for part in ("calibration", "evaluation") if canonical[part]]
    if evaluation := canonical["evaluation"]:
        tokens = evaluation["sequences"] * evaluation["sequence_length"]
        seconds += 2 * 2 * index.parameters * tokens / _FORWARD_FLOP_PER_S.get(kind, 3e10)
    largest = max((index.tensors[name].nbytes for name in index.names), default=0)
    peaks = [2 * largest + _WORK_BYTES, *(_pass_bytes(index, text, kind) for text in texts)]
    if recipe.rounding.is_sequential and canonical["calibration"]:
        peaks.append(2 * largest + _in_order_bytes(index, canonical["calibration"], kind))
    if canonical["calibration"]:
        peaks.append(_whole_bytes(index, recipe, kind))
    return {
        "estimated_seconds": round(seconds, 1),
        "estimated_peak_bytes": max(peaks),
        "estimated_disk_bytes": required_scratch_bytes(index, recipe) + plan.predicted_bytes,
    }


@dataclass(frozen=True)
class _Parts:
    """A checkpoint by the names of its tensors: those with the same beginning up to a number are one block.

    `largest`: weights of the largest block or other tensor; `blocks`: how many blocks there are; `width` and
    `vocabulary`: of the largest matrix outside of blocks; `inputs`: at most so many squared inputs have the matrices of
    one block.
    """

    largest: int
    blocks: int
    width: int
    vocabulary: int
    inputs: int

    @classmethod
    def of(cls, index: CheckpointIndex) -> Self:
        elements, squares, tables = Counter[str](), Counter[str](), [(0, 0)]
        for name in index.names:
            shape, block = index.tensors[name].shape, _block_of(name)
            elements[block or name] += index.tensors[name].elements
            if len(shape) > 1:
                squares[block or name] += _squared_inputs(shape)
                tables += [] if block else [(shape[0], shape[-1])]
        vocabulary, width = max(tables, key=lambda shape: shape[0] * shape[1])
        blocks = {_block_of(name) for name in index.names} - {None}
        return cls(max(elements.values(), default=0), len(blocks), width, vocabulary, max(squares.values(), default=0))


def _squared_inputs(shape: tuple[int, ...]) -> int:
    """Elements of the covariances of a tensor's inputs, its last dimension: one for every matrix that it holds."""
    return prod(shape[:-2]) * shape[-1] ** 2 if len(shape) > 1 else 0


def _block_of(name: str) -> str | None:
    """The beginning of a tensor's name up to its first number."""
    parts = name.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else ".".join(parts[: at + 1])


def _pass_bytes(index: CheckpointIndex, text: dict[str, Any], kind: str) -> int:
    """What passing a text through the network takes, a block at a time, with the statistics of its inputs."""
    parts, width = _Parts.of(index), _number_bytes(kind)
    weights = max(parts.largest, 2 * parts.vocabulary * parts.width)
    sequences, length = int(text["sequences"]), int(text["sequence_length"])
    between = 3 * sequences * length * parts.width
    logits = 2 * max(_LOGITS, length * parts.vocabulary)
    return width * (weights + between) + 4 * logits + 8 * parts.inputs + _PASS_WORK_BYTES


def _in_order_bytes(index: CheckpointIndex, text: dict[str, Any], kind: str) -> int:
    """What rounding one layer after another takes: the reference and the candidate, and products of their inputs."""
    parts = _Parts.of(index)
    between = 3 * int(text["sequences"]) * int(text["sequence_length"]) * parts.width
    return 2 * _number_bytes(kind) * (parts.largest + between) + 3 * 8 * parts.inputs + _PASS_WORK_BYTES


def _whole_bytes(index: CheckpointIndex, recipe: Recipe, kind: str) -> int:
    """What allocation takes where it measures noise in each tensor."""
    canonical = recipe.canonical()
    if canonical["allocation"]["name"] != "higgs":
        return 0
    return index.parameters * _number_bytes(kind) + _PASS_WORK_BYTES


def _number_bytes(kind: str) -> int:
    """Of a number that networks compute with."""
    return 4 if kind == "cpu" else 2
