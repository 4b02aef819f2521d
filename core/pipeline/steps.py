"""The door of the pipeline: a step's request goes in, its output comes out.

Called by the engine and by the local pipeline, with nothing between. Sets torch's threads and forbids what would make
the same step answer differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from core.errors import BitmillError, OutOfMemory
from core.jobs.steps import StepOutput, StepRequest
from core.pipeline.allocate import allocate
from core.pipeline.assemble import assemble
from core.pipeline.calibrate import calibrate
from core.pipeline.context import StepContext
from core.pipeline.evaluate import evaluate
from core.pipeline.export import export
from core.pipeline.fetch import fetch
from core.pipeline.quantise import quantise

_STEPS: dict[str, Callable[[StepRequest, StepContext], StepOutput]] = {
    "fetch": fetch,
    "calibrate": calibrate,
    "allocate": allocate,
    "quantise": quantise,
    "assemble": assemble,
    "evaluate": evaluate,
    "export": export,
}


def run_step(kind: str, request: StepRequest, ctx: StepContext) -> dict[str, Any]:
    """Execute one step and answer its `StepOutput` as JSON values. Raises `core.errors` and nothing that has one."""
    if kind not in _STEPS:
        raise BitmillError(f"no step of kind {kind!r}")
    if ctx.threads:
        torch.set_num_threads(ctx.threads)
    ctx.log("step.begin", {"kind": kind, "index": request.index, "device": ctx.device})
    try:
        output = _STEPS[kind](request, ctx)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"the device ran out of memory in {kind}", where=ctx.device) from error
    except MemoryError as error:
        raise OutOfMemory(f"the host ran out of memory in {kind}", where="host") from error
    ctx.progress(1.0, "")
    ctx.log("step.end", {"kind": kind, "index": request.index})
    answered: dict[str, Any] = output.model_dump(mode="json")
    return answered
