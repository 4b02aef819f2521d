"""Step assemble: shards of encoded tensors become the weight files of the artefact, in one layout whatever the shards.

Files: model-0000i-of-0000n.safetensors and model.safetensors.index.json.
Values: {bits_per_param, size_bytes, parameters, weight_files, tensors: rows of the per-tensor table}.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from core.errors import BitmillError
from core.exports.layout import KEEP, WeightFile, bits_per_param, file_names, plan_layout
from core.exports.report import TensorResult, rounded
from core.jobs.steps import StepOutput, StepRequest, StoredFile
from core.pipeline.context import StepContext, require_disk
from core.pipeline.fetch import open_checkpoint
from core.pipeline.plan_file import read_plan
from core.storage.checkpoint import INDEX_FILE, CheckpointIndex
from core.storage.sources import stored_source
from core.tensors.writer import SafetensorsWriter


def assemble(request: StepRequest, ctx: StepContext) -> StepOutput:
    """Write the files; an internal error when their size is not the planned one."""
    source = open_checkpoint(ctx, request.outputs("fetch")[0])
    plan = read_plan(ctx, request.outputs("allocate")[0])
    shards = open_files(ctx, {f"{at}": one.files["shard.safetensors"] for at, one in _shards(request)})
    layout = plan_layout(source, plan.choice)
    names = file_names(len(layout))
    require_disk(ctx.scratch, max(file.nbytes for file in layout), "assembling")
    files = {
        name: _write(ctx.within(at / len(layout), (at + 1) / len(layout)), request, name, file, source, shards)
        for at, (name, file) in enumerate(zip(names, layout, strict=True))
    }
    size = sum(file.size for file in files.values())
    files[INDEX_FILE] = ctx.publish_bytes(request, INDEX_FILE, _index_json(names, layout))
    results = [TensorResult.from_json(row) for _, one in _shards(request) for row in one.values["tensors"]]
    kept = (_kept(source, name) for name, choice in plan.choice.items() if choice == KEEP)
    table = sorted([*results, *kept], key=lambda result: result.name)
    return StepOutput(
        files=files,
        values={
            "bits_per_param": rounded(bits_per_param(source, size)),
            "size_bytes": size,
            "parameters": source.parameters,
            "weight_files": names,
            "tensors": [result.to_json() for result in table],
        },
    )


def open_files(ctx: StepContext, files: dict[str, StoredFile]) -> CheckpointIndex:
    """Stored safetensors files as one set of tensors; `files` by a name that sorts."""
    sources = {
        f"{name}.safetensors": stored_source(ctx.store, file.key, file.size, file.key) for name, file in files.items()
    }
    return CheckpointIndex.from_files(sources)


def _shards(request: StepRequest) -> Iterable[tuple[int, StepOutput]]:
    return enumerate(request.outputs("quantise"))


def _write(
    ctx: StepContext,
    request: StepRequest,
    name: str,
    file: WeightFile,
    source: CheckpointIndex,
    shards: CheckpointIndex,
) -> StoredFile:
    path = ctx.scratch / name
    path.unlink(missing_ok=True)
    with SafetensorsWriter(path, file.parts, file.metadata) as writer:
        for number, tensor in enumerate(file.tensors):
            ctx.check()
            ctx.progress(number / len(file.tensors), tensor.name)
            for part in tensor.parts:
                origin = source if tensor.format == KEEP else shards
                writer.write(part.name, origin.read_tensor_bytes(part.name))
    if path.stat().st_size != file.nbytes:
        raise BitmillError(f"planned with {file.nbytes} bytes, has {path.stat().st_size}", where=name)
    return ctx.publish(request, path)


def _index_json(names: list[str], layout: list[WeightFile]) -> bytes:
    places = {part.name: name for name, file in zip(names, layout, strict=True) for part in file.parts}
    index = {
        "metadata": {"total_size": sum(part.nbytes for file in layout for part in file.parts)},
        "weight_map": dict(sorted(places.items())),
    }
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def _kept(source: CheckpointIndex, name: str) -> TensorResult:
    entry = source.tensors[name]
    return TensorResult(name, entry.shape, entry.dtype, KEEP, entry.nbytes, entry.elements, 0.0)
