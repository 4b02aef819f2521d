"""Step quantise: one shard of the checkpoint's tensors, read, rounded and written one at a time.

Layers are rounded by what calibration knows of them, or, where the recipe wants them sequential, each by the inputs
that it gets from the layers before it as they are stored; then the shard is all of the checkpoint.
Memory: the tensor being encoded, its codes and the encoder's chunk; never the shard. Sequential layers: what
`core.sensitivity.in_order` needs, beside it. What a shard holds depends on the headers and the plan alone, and a
tensor's bytes do not depend on its shard.
Params: {rounding, calibration?}, the latter for sequential layers. Files: shard.safetensors with the parts of the
encoded tensors (kept ones are taken from the source when assembling). Values: {tensors: rows of the per-tensor table}.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from core.errors import BitmillError
from core.exports.layout import KEEP, StoredTensor, stored_tensor
from core.exports.report import TensorResult
from core.ids import derived_seed
from core.jobs.steps import StepOutput, StepRequest
from core.pipeline.context import StepContext, require_disk
from core.pipeline.fetch import open_checkpoint
from core.pipeline.forward import listening, resolve_device, windows_of
from core.pipeline.plan_file import Plan, PlannedTensor, read_plan
from core.pipeline.sensitivities import Sensitivities
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import parse
from core.rounding.base import Sensitivity, round_tensor
from core.sensitivity.drift import DriftStatistics, Mixing
from core.sensitivity.in_order import Decode, encode_in_order
from core.storage.checkpoint import CheckpointIndex
from core.tensors.dtypes import TORCH_DTYPES
from core.tensors.encoded import EncodedTensor
from core.tensors.errors import relative_rms_error
from core.tensors.reader import read_tensor
from core.tensors.writer import SafetensorsWriter, planned_bytes

SHARD_FILE = "shard.safetensors"
_BY_REFERENCE = "its inputs are those of the reference: they are not followed through quantised layers"


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
    sensitivities = Sensitivities.of_step(ctx, request.outputs("calibrate"), rounding)
    with SafetensorsWriter(path, parts, {}) as writer:
        shard = _Shard(source, plan.by_name(), rounding, request.seed, writer, ctx.device, sensitivities)
        if rounding.is_sequential:
            _one_after_another(shard, tensors, request.params["calibration"], ctx)
        else:
            _one_by_one(shard, tensors, ctx)
    rows = sorted(shard.rows, key=lambda row: str(row["name"]))
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


def _one_by_one(shard: _Shard, tensors: list[StoredTensor], ctx: StepContext) -> None:
    """All by what calibration knows; in whatever order."""
    total, done = sum(shard.source.tensors[tensor.name].nbytes for tensor in tensors) or 1, 0
    for tensor in tensors:
        ctx.check()
        ctx.progress(done / total, tensor.name)
        shard.encode(tensor, shard.sensitivities.of(tensor.name, tensor.shape))
        done += shard.source.tensors[tensor.name].nbytes


def _one_after_another(
    shard: _Shard, tensors: list[StoredTensor], calibration: dict[str, Any], ctx: StepContext
) -> None:
    """In the order of the network, each by the inputs that it gets."""
    by_name, device, filled = (
        {tensor.name: tensor for tensor in tensors},
        resolve_device(ctx.device),
        shard.rounding.filled,
    )
    mixing = Mixing(filled.drift or 0.0, filled.attention or 0.0, bool(filled.residual))

    def encode(name: str, found: DriftStatistics | None) -> Decode:
        ctx.check()
        tensor, known = by_name[name], shard.sensitivities.of(name, by_name[name].shape)
        encoded = shard.encode(tensor, *_followed(known, name, found))
        return lambda: encoded.decode().to(TORCH_DTYPES[tensor.dtype])

    encode_in_order(
        shard.source,
        windows_of(shard.source, calibration, "calibration"),
        by_name,
        encode,
        device=device,
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        mixing=mixing,
        progress=listening(ctx.within(0, 0.98)),
    )


def _followed(known: Sensitivity, name: str, found: DriftStatistics | None) -> tuple[Sensitivity, tuple[str, ...]]:
    """Statistics of a tensor with those of the quantised layers before it, where there are any, and what to note."""
    if found is None:
        return known, () if known.covariance is None and known.experts is None else (_BY_REFERENCE,)
    followed = replace(
        known,
        covariance=found.covariance,
        cross=found.cross,
        residual=found.residuals.get(name),
        tokens=found.tokens,
        transposed=found.transposed,
        missing="",
    )
    return followed, found.notes


@dataclass(frozen=True)
class _Shard:
    """A shard being written, and what its tensors are rounded by."""

    source: CheckpointIndex
    planned: dict[str, PlannedTensor]
    rounding: RoundingSpec
    seed: int
    writer: SafetensorsWriter
    device: str
    sensitivities: Sensitivities
    rows: list[dict[str, Any]] = field(default_factory=list)

    def encode(self, tensor: StoredTensor, sensitivity: Sensitivity, notes: tuple[str, ...] = ()) -> EncodedTensor:
        """Read, round and write one tensor."""
        weight, seed = read_tensor(self.source, tensor.name).to(self.device), derived_seed(self.seed, tensor.name)
        try:
            encoded = round_tensor(weight, parse(tensor.format), self.rounding, sensitivity=sensitivity, seed=seed)
        except BitmillError as error:
            raise error.at(tensor.name) from None
        if notes:
            encoded = encoded.with_notes(notes)
        for suffix, data in encoded.parts().items():
            self.writer.write(f"{tensor.name}.{suffix}", data)
        self.rows.append(self._result(tensor, weight, encoded).to_json())
        return encoded

    def _result(self, tensor: StoredTensor, weight: torch.Tensor, encoded: EncodedTensor) -> TensorResult:
        planned = self.planned[tensor.name]
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
