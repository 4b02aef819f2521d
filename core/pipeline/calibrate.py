"""Step calibrate: what later steps have to know about a checkpoint from its calibration text.

Params: {calibration, gather?}. `gather` lists "fisher" (Fisher information per tensor) and "covariance" (of the inputs
of each matrix); absent means Fisher information alone. Files: fisher.safetensors, covariance.safetensors, as gathered.
Values: {text, text_sha256, sequences, sequence_length, tokens_available, seed}; with Fisher information {positions,
estimator, halves_bits, tensors: {name: {sum, mean, elements}}, not_reached: {name: reason}}; with covariance
{covariance: {tensors: {name: {tokens, inputs, key}}, not_reached: {name: reason}}}. Depends on the checkpoint, the text
and the seed, never on the target, so that every recipe for one checkpoint that asks for the same shares it. Memory: a
block of the network and its activations; what Fisher information needs of other blocks lies in scratch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.errors import UserError
from core.evaluation.text import Windows
from core.jobs.steps import StepOutput, StepRequest, StoredFile
from core.pipeline.context import StepContext
from core.pipeline.fetch import open_checkpoint
from core.pipeline.forward import dtype_on, listening, resolve_device, windows_of
from core.sensitivity.covariance import Covariances
from core.sensitivity.fisher import describe, fisher_of_checkpoint
from core.sensitivity.inputs import gather_covariances
from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import LocalFile

FISHER_FILE = "fisher.safetensors"
COVARIANCE_FILE = "covariance.safetensors"
_GATHERED = ("fisher", "covariance")


def calibrate(request: StepRequest, ctx: StepContext) -> StepOutput:
    """Gather, save and describe."""
    wanted = request.params.get("gather", ["fisher"])
    if not wanted or not set(wanted).issubset(_GATHERED):
        raise UserError(f"calibration gathers {' and '.join(_GATHERED)}, not {wanted}", where="gather")
    source = open_checkpoint(ctx, request.outputs("fetch")[0])
    spec = request.params["calibration"]
    windows = windows_of(source, spec, "calibration")
    files: dict[str, StoredFile] = {}
    values: dict[str, Any] = {
        "text": spec["text"],
        "text_sha256": windows.sha256,
        "sequences": len(windows.ids),
        "sequence_length": int(windows.ids.shape[1]),
        "tokens_available": windows.tokens_available,
        "seed": request.seed,
    }
    share = 1 / len(wanted)
    if "fisher" in wanted:
        path = _fresh(ctx, FISHER_FILE)
        values |= _fisher(source, windows, path, request.seed, ctx.within(0, share))
        files[FISHER_FILE] = ctx.publish(request, path)
    if "covariance" in wanted:
        path = _fresh(ctx, COVARIANCE_FILE)
        values["covariance"] = _covariance(source, windows, path, ctx.within(1 - share, 1))
        files[COVARIANCE_FILE] = ctx.publish(request, path)
    return StepOutput(files=files, values=values)


def _fresh(ctx: StepContext, name: str) -> Path:
    path = ctx.scratch / name
    path.unlink(missing_ok=True)
    return path


def _fisher(source: CheckpointIndex, windows: Windows, path: Path, seed: int, ctx: StepContext) -> dict[str, Any]:
    ctx.progress(0.0, "reading the model")
    device = resolve_device(ctx.device)
    estimate = fisher_of_checkpoint(
        source,
        windows,
        device=device,
        dtype=dtype_on(device),
        seed=seed,
        progress=listening(ctx.within(0, 0.98)),
        folder=ctx.scratch,
        log=ctx.log,
    )
    estimate.save(path)
    return describe(estimate)


def _covariance(source: CheckpointIndex, windows: Windows, path: Path, ctx: StepContext) -> dict[str, Any]:
    device, progress = resolve_device(ctx.device), listening(ctx.within(0, 0.98))
    gather_covariances(source, windows, path, device=device, dtype=dtype_on(device), progress=progress)
    return Covariances.from_index(CheckpointIndex.from_files({path.name: LocalFile(path)})).describe()
