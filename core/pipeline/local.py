"""The pipeline without the service: the same steps, one after another in this process, and their results in a folder.

Objects lie in a temporary store beside the output folder; the source is read where it is. An output folder appears
whole or not at all: it is written under another name and renamed. Folders that hold anything are never written to.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from core.clock import monotonic
from core.errors import GateFailed, InvalidCheckpoint, UserError
from core.evaluation.by_blocks import Side, evaluate_checkpoints
from core.exports.artefact import Artefact, inspect_artefact, is_artefact
from core.exports.bitmill import REPORT, original_name
from core.exports.dequantise import dequantise_into
from core.exports.report import rounded
from core.jobs.steps import (
    StepInput,
    StepKind,
    StepOutput,
    StepRequest,
    dependencies_of,
    input_hash,
    kinds_of,
    output_hash,
    recipe_params,
    step_seed,
)
from core.pipeline.context import Progress, StepContext, require_disk, silent
from core.pipeline.estimate import estimate, required_scratch_bytes
from core.pipeline.evaluate import metrics_json
from core.pipeline.fetch import link_roots_of
from core.pipeline.forward import dtype_on, resolve_device, windows_of
from core.pipeline.plan_file import read_plan
from core.pipeline.steps import run_step
from core.recipe.recipe import Recipe
from core.storage.checkpoint import CheckpointIndex
from core.storage.inspection import inspection
from core.storage.local_store import LocalStore
from core.storage.object_store import ObjectStore
from core.storage.preflight import preflight
from core.storage.sources import LocalFile, folder_sources

# Shares of the whole that the steps usually take; they only shape the progress bar.
_WEIGHTS: dict[StepKind, float] = {
    "fetch": 1,
    "calibrate": 30,
    "allocate": 25,
    "quantise": 15,
    "assemble": 2,
    "evaluate": 25,
    "export": 1,
}


def open_folder(folder: Path) -> CheckpointIndex:
    """The checkpoint or artefact in a folder; raises what `CheckpointIndex` and `folder_sources` have."""
    root = folder.resolve()
    return CheckpointIndex.from_files(folder_sources(root, link_roots_of(root)))


def run_recipe(
    source: Path, recipe: Recipe, out: Path, device: str = "auto", progress: Progress | None = None, threads: int = 0
) -> dict[str, Any]:
    """Quantise the checkpoint in `source` into `out`; the report, with the gate's error in `failure` if it failed."""
    index = open_folder(source)
    preflight(index, recipe)
    stamps = _stamps(index)
    with fresh_folder(out) as target, _surroundings(target.parent, device, progress, threads) as ctx:
        require_disk(ctx.scratch, required_scratch_bytes(index, recipe), "this recipe")
        outputs = run_steps(source, recipe, ctx, kinds_of(recipe.canonical()))
        _require_unchanged(index, stamps)
        exported = outputs["export"][0].values
        _materialise(exported["artefacts"], ctx.store, source.resolve(), target)
    report: dict[str, Any] = json.loads((out / REPORT).read_bytes())
    failed = None if exported["gate"]["ok"] else gate_error(exported["gate"]).to_dict() | {"step": "export"}
    return report | {"out": str(out), "failure": failed}


def plan(
    source: Path, recipe: Recipe, device: str = "auto", progress: Progress | None = None, threads: int = 0
) -> dict[str, Any]:
    """The allocation only: per-tensor formats and bits, predicted size and KL, estimated time and memory."""
    index = open_folder(source)
    preflight(index, recipe)
    kinds = tuple(kind for kind in kinds_of(recipe.canonical()) if kind in ("fetch", "calibrate", "allocate"))
    with _surroundings(Path(tempfile.gettempdir()), device, progress, threads) as ctx:
        started = monotonic()
        outputs = run_steps(source, recipe, ctx, kinds)
        seconds = monotonic() - started
        planned = read_plan(ctx, outputs["allocate"][0])
        job = estimate(index, recipe, planned, ctx.device, seconds)
    return {
        **job,
        "parameters": index.parameters,
        "predicted_bits_per_param": planned.predicted_bits_per_param,
        "predicted_size_bytes": planned.predicted_bytes,
        "predicted_kl": rounded(planned.predicted_kl),
        "warnings": list(planned.warnings),
        "tensors": [
            {key: rounded(value) for key, value in asdict(one).items()} | {"shape": list(index.tensors[one.name].shape)}
            for one in planned.tensors
        ],
    }


def inspect(path: Path) -> dict[str, Any]:
    """What a checkpoint, an artefact or one safetensors file holds, from its headers."""
    index = CheckpointIndex.from_files({path.name: LocalFile(path)}) if path.is_file() else open_folder(path)
    return inspect_artefact(index) if is_artefact(index) else inspection(index)


def dequantise(artefact: Path, out: Path, dtype: str | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Decode an artefact into a plain checkpoint; `dtype` bf16, fp16 or fp32, None for what the source had."""
    index = open_folder(artefact)
    with fresh_folder(out) as target:
        answered = dequantise_into(index, target, dtype, progress or silent)
    return answered | {"out": str(out)}


def evaluate_folders(
    reference: Path,
    candidate: Path,
    text: str,
    *,
    sequences: int = 16,
    sequence_length: int = 512,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare two folders, checkpoints or artefacts, on a text (a file or a text's name); metrics of step evaluate."""
    place = resolve_device(device)
    reference_index, candidate_index = open_folder(reference), open_folder(candidate)
    spec = {"text": text, "sequences": sequences, "sequence_length": sequence_length, "seed": 0}
    windows = windows_of(reference_index, spec, "evaluation")
    metrics = evaluate_checkpoints(
        _side(reference_index),
        _side(candidate_index),
        windows,
        progress or silent,
        device=place,
        dtype=dtype_on(place),
        log=lambda _event, _fields: None,
    )
    return metrics_json(asdict(metrics)) | {"text_sha256": windows.sha256}


def _side(index: CheckpointIndex) -> Side:
    """A checkpoint, or an artefact as one."""
    if not is_artefact(index):
        return Side(index)
    artefact = Artefact.open(index)
    return Side(artefact.as_checkpoint(), artefact.decode)


def _stamps(index: CheckpointIndex) -> dict[str, tuple[int, int] | None]:
    """Size and time of the last change of each file in a folder, None for one that is gone."""
    found: dict[str, tuple[int, int] | None] = {}
    for name, file in index.files.items():
        if isinstance(file, LocalFile):
            now = file.path.stat() if file.path.exists() else None
            found[name] = (now.st_size, now.st_mtime_ns) if now else None
    return found


def _require_unchanged(index: CheckpointIndex, stamps: dict[str, tuple[int, int] | None]) -> None:
    """The source is read where it is, several times: its digests must be those of what was quantised."""
    changed = [name for name, stamp in _stamps(index).items() if stamp != stamps[name]]
    if changed:
        raise InvalidCheckpoint("the file was changed while it was read", where=changed[0], hint="try again")


def _materialise(artefacts: list[dict[str, Any]], store: ObjectStore, source: Path, target: Path) -> None:
    """The published files in a folder: linked from the temporary store, copied from the source."""
    for one in artefacts:
        path = target / one["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = store.local_path(one["key"]) if one["key"] else None
        if stored is None:
            shutil.copyfile(source / (original_name(one["path"]) or one["path"]), path)
        else:
            stored.rename(path)
            path.chmod(0o644)  # the store keeps its files to itself


def gate_error(gate: dict[str, Any]) -> GateFailed:
    """The error of a gate that did not pass."""
    worst = gate["failures"][0]
    return GateFailed(
        f"{worst['limit']} is {worst['allowed']}, measured was {worst['measured']}", where=f"gate.{worst['limit']}"
    )


def run_steps(
    source: Path, recipe: Recipe, ctx: StepContext, kinds: tuple[StepKind, ...]
) -> dict[StepKind, list[StepOutput]]:
    """Execute the steps of those kinds in order, one quantise shard; the outputs by kind."""
    canonical = recipe.canonical()
    outputs: dict[StepKind, list[StepOutput]] = {}
    total, done = sum(_WEIGHTS[kind] for kind in kinds), 0.0
    for kind in kinds:
        inputs = tuple(
            StepInput(kind=needed, index=at, output=output)
            for needed in dependencies_of(kind, canonical)
            for at, output in enumerate(outputs[needed])
        )
        params = recipe_params(kind, canonical)
        if kind == "fetch":
            params = {"source": {"kind": "path", "path": str(source), "in_place": True}}
        seed = step_seed(kind, canonical)
        name = input_hash(kind, params, [output_hash(given.output) for given in inputs], seed=seed)
        request = StepRequest(kind=kind, input_hash=name, params=params, inputs=inputs, seed=seed)
        part = ctx.within(done / total, (done + _WEIGHTS[kind]) / total)
        outputs[kind] = [StepOutput.model_validate(run_step(kind, request, _named(part, kind)))]
        done += _WEIGHTS[kind]
    return outputs


def _named(ctx: StepContext, kind: str) -> StepContext:
    """The same context, whose messages begin with the kind of the step."""
    outer = ctx.progress
    return replace(ctx, progress=lambda fraction, what: outer(fraction, f"{kind}: {what}" if what else kind))


@contextmanager
def _surroundings(beside: Path, device: str, progress: Progress | None, threads: int) -> Iterator[StepContext]:
    """A context whose store and scratch lie in a temporary folder, removed at the end whatever happened."""
    with tempfile.TemporaryDirectory(prefix=".bitmill-", dir=beside) as work:
        scratch = Path(work) / "scratch"
        scratch.mkdir()
        ctx = StepContext(
            store=LocalStore(Path(work) / "store"), scratch=scratch, device=resolve_device(device), threads=threads
        )
        if progress is not None:
            ctx = replace(ctx, progress=progress)
        yield ctx


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `out` in one step when the block ends in peace; else nothing is left."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("exists and is not an empty folder", where=str(out), hint="choose another --out")
    out = out.resolve()  # a link is followed: what it leads to becomes the folder
    if Path.cwd().is_relative_to(out):
        raise UserError("is the working folder, or holds it", where=str(out), hint="choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name[:200]}.", suffix=".partial", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.replace(out)  # over an empty folder this is still one step
    finally:
        shutil.rmtree(partial, ignore_errors=True)
