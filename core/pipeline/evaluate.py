"""Step evaluate: the assembled files, decoded as a user would decode them, against the reference model.

Memory: a block of the network at a time, and at the end both heads with the logits of one batch.
Values: {metrics: {kl_mean, kl_stderr, kl_median, kl_p99, top1_agreement, perplexity, reference_perplexity, sequences,
tokens, sequence_length, text_sha256, per_sequence}}; KL in nats per token.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from core.evaluation.by_blocks import Side, evaluate_checkpoints
from core.exports.artefact import Artefact
from core.exports.report import rounded
from core.jobs.steps import StepOutput, StepRequest
from core.pipeline.assemble import open_files
from core.pipeline.context import StepContext
from core.pipeline.fetch import open_checkpoint
from core.pipeline.forward import dtype_on, listening, resolve_device, windows_of


def evaluate(request: StepRequest, ctx: StepContext) -> StepOutput:
    """Measure the artefact on the recipe's evaluation text."""
    source = open_checkpoint(ctx, request.outputs("fetch")[0])
    assembled = request.outputs("assemble")[0]
    weight_files = assembled.values["weight_files"]
    artefact = Artefact.open(open_files(ctx, {name: assembled.files[name] for name in weight_files}))
    device = resolve_device(ctx.device)
    windows = windows_of(source, request.params["evaluation"], "evaluation")
    metrics = evaluate_checkpoints(
        Side(source),
        Side(source, artefact.decode),
        windows,
        listening(ctx),
        device=device,
        dtype=dtype_on(device),
        log=ctx.log,
    )
    return StepOutput(values={"metrics": metrics_json(asdict(metrics)) | {"text_sha256": windows.sha256}})


def metrics_json(metrics: dict[str, Any]) -> dict[str, Any]:
    """The measured numbers with six significant digits."""
    return {
        name: [rounded(item) for item in value] if isinstance(value, list | tuple) else rounded(value)
        for name, value in metrics.items()
    }
