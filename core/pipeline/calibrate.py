"""Step calibrate: Fisher information per tensor from one pass over the calibration text.

Files: fisher.safetensors. Values: {text, text_sha256, sequences, sequence_length, tokens_available, positions,
estimator, halves_bits, seed, tensors: {name: {sum, mean, elements}}, not_reached: {name: reason}}. Depends on the
checkpoint, the text and the seed, never on the target, so that every recipe for one checkpoint shares it.
"""

from __future__ import annotations

from core.jobs.steps import StepOutput, StepRequest
from core.pipeline.context import StepContext
from core.pipeline.fetch import open_checkpoint
from core.pipeline.forward import listening, network_of, resolve_device, windows_of
from core.sensitivity.fisher import describe, estimate_fisher

FISHER_FILE = "fisher.safetensors"


def calibrate(request: StepRequest, ctx: StepContext) -> StepOutput:
    """Estimate, save and describe."""
    source = open_checkpoint(ctx, request.outputs("fetch")[0])
    spec = request.params["calibration"]
    windows = windows_of(source, spec, "calibration")
    ctx.progress(0.0, "loading the model")
    network = network_of(source, resolve_device(ctx.device))
    estimate = estimate_fisher(network, windows, seed=request.seed, progress=listening(ctx.within(0.05, 0.98)))
    path = ctx.scratch / FISHER_FILE
    path.unlink(missing_ok=True)
    estimate.save(path)
    values = {
        "text": spec["text"],
        "text_sha256": windows.sha256,
        "sequences": len(windows.ids),
        "sequence_length": int(windows.ids.shape[1]),
        "tokens_available": windows.tokens_available,
        "seed": request.seed,
        **describe(estimate),
    }
    return StepOutput(files={FISHER_FILE: ctx.publish(request, path)}, values=values)
