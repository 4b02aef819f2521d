"""What a job will need before it starts: disk, time and memory. Bounds for disk, plain models for the rest."""

from __future__ import annotations

from typing import Any

from core.pipeline.plan_file import Plan
from core.recipe.allocation import needs_covariance
from core.recipe.recipe import Recipe
from core.storage.checkpoint import CheckpointIndex

_ENCODE_BYTES_PER_S = {"cpu": 40e6, "cuda": 2e9}
_WORK_BYTES = 400 << 20
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
    return 3 * weights + others + _covariance_bytes(index, recipe)


def _covariance_bytes(index: CheckpointIndex, recipe: Recipe) -> int:
    """The file of input covariances, if every matrix had inputs of its own."""
    if not (recipe.rounding.needs_covariance or needs_covariance(recipe.allocation.canonical())):
        return 0
    shapes = [index.tensors[name].shape for name in index.names]
    return sum(4 * shape[-1] ** 2 for shape in shapes if len(shape) > 1)


def estimate(index: CheckpointIndex, recipe: Recipe, plan: Plan, device: str, planning_s: float) -> dict[str, Any]:
    """{estimated_seconds, estimated_peak_bytes, estimated_disk_bytes} of the whole job, planning as measured."""
    canonical = recipe.canonical()
    kind = device.split(":", maxsplit=1)[0]
    seconds = planning_s + 2 * index.size_bytes / _ENCODE_BYTES_PER_S.get(kind, 40e6)
    largest = max((index.tensors[name].nbytes for name in index.names), default=0)
    peak = 2 * largest + _WORK_BYTES
    if evaluation := canonical["evaluation"]:
        tokens = evaluation["sequences"] * evaluation["sequence_length"]
        seconds += 2 * 2 * index.parameters * tokens / _FORWARD_FLOP_PER_S.get(kind, 3e10)
        peak = max(peak, 2 * index.parameters * (4 if kind == "cpu" else 2) + _WORK_BYTES)
    return {
        "estimated_seconds": round(seconds, 1),
        "estimated_peak_bytes": peak,
        "estimated_disk_bytes": required_scratch_bytes(index, recipe) + plan.predicted_bytes,
    }
