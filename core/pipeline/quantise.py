"""Step quantise: one shard of the checkpoint's tensors, read, rounded and written one at a time.

Memory: the tensor being encoded, its codes and the encoder's chunk; never the shard. What a shard holds depends on the
headers and the plan alone, and a tensor's bytes do not depend on its shard.
Files: shard.safetensors with the parts of the encoded tensors (kept ones are taken from the source when assembling).
Values: {tensors: rows of the per-tensor table}.
"""

from __future__ import annotations

from core.errors import BitmillError
from core.exports.layout import KEEP, StoredTensor, stored_tensor
from core.exports.report import TensorResult
from core.ids import derived_seed
from core.jobs.steps import StepOutput, StepRequest
from core.pipeline.context import StepContext, require_disk
from core.pipeline.fetch import open_checkpoint
from core.pipeline.plan_file import Plan, PlannedTensor, read_plan
from core.pipeline.sensitivities import Sensitivities
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import parse
from core.rounding.base import round_tensor
from core.storage.checkpoint import CheckpointIndex
from core.tensors.errors import relative_rms_error
from core.tensors.reader import read_tensor
from core.tensors.writer import SafetensorsWriter, planned_bytes

SHARD_FILE = "shard.safetensors"


def quantise(request: StepRequest, ctx: StepContext) -> StepOutput:
    """Encode the tensors of shard `index` of `count`; NonFiniteWeights names the tensor."""
    source = open_checkpoint(ctx, request.outputs("fetch")[0])
    plan = read_plan(ctx, request.outputs("allocate")[0])
    rounding = RoundingSpec.model_validate(request.params["rounding"])
    tensors = [
        stored_tensor(source.tensors[name], plan.choice[name])
        for name in shard_names(source, plan, request.index, request.count)
    ]
    parts = [part for tensor in tensors for part in tensor.parts]
    require_disk(ctx.scratch, planned_bytes(parts, {}), f"shard {request.index}")
    path = ctx.scratch / SHARD_FILE
    path.unlink(missing_ok=True)
    planned, rows, done = plan.by_name(), [], 0
    sensitivities = Sensitivities.of_step(ctx, request.outputs("calibrate"), rounding)
    total = sum(source.tensors[tensor.name].nbytes for tensor in tensors) or 1
    with SafetensorsWriter(path, parts, {}) as writer:
        for tensor in tensors:
            ctx.check()
            ctx.progress(done / total, tensor.name)
            seed = derived_seed(request.seed, tensor.name)
            result = _encode(source, tensor, planned[tensor.name], rounding, seed, writer, ctx.device, sensitivities)
            rows.append(result.to_json())
            done += source.tensors[tensor.name].nbytes
    return StepOutput(files={SHARD_FILE: ctx.publish(request, path)}, values={"tensors": rows})


def shard_names(source: CheckpointIndex, plan: Plan, index: int, count: int) -> list[str]:
    """The tensors of one shard: largest first to the shard with least bytes, so shards are balanced and disjoint."""
    encoded = [name for name in source.names if plan.choice[name] != KEEP]
    loads = [0] * count
    mine: list[str] = []
    for name in sorted(encoded, key=lambda name: (-source.tensors[name].nbytes, name)):
        shard = loads.index(min(loads))
        loads[shard] += source.tensors[name].nbytes
        if shard == index:
            mine.append(name)
    return sorted(mine)


def _encode(
    source: CheckpointIndex,
    tensor: StoredTensor,
    planned: PlannedTensor,
    rounding: RoundingSpec,
    seed: int,
    writer: SafetensorsWriter,
    device: str,
    sensitivities: Sensitivities,
) -> TensorResult:
    weight = read_tensor(source, tensor.name).to(device)
    sensitivity = sensitivities.of(tensor.name, tensor.shape)
    try:
        encoded = round_tensor(weight, parse(tensor.format), rounding, sensitivity=sensitivity, seed=seed)
    except BitmillError as error:
        raise error.at(tensor.name) from None
    for suffix, data in encoded.parts().items():
        writer.write(f"{tensor.name}.{suffix}", data)
    return TensorResult(
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        format=tensor.format,
        nbytes=encoded.nbytes,
        elements=weight.numel(),
        relative_rms_error=relative_rms_error(weight, encoded),
        fisher_mean=planned.fisher_mean,
        predicted_kl=planned.predicted_kl,
        fitted=encoded.fitted,
        notes=encoded.notes,
    )
