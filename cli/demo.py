"""`bitmill demo`: a real service for a few minutes, one real model through it, the numbers, and the artefact kept.

Everything goes the way that a user's job goes: the model is uploaded by parts over REST, the job runs on the queue, the
artefact is downloaded and verified. The service's folder is temporary and removed; the artefact stays.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from cli import render
from cli.client import Client, Connection
from cli.output import DONE, FAILED, emit, say
from cli.service_commands import downloaded, uploaded, watched
from cli.stack import Stack, StackOptions, running_stack
from core.clock import monotonic
from core.config import Settings
from core.errors import Conflict, NotFound

Json = dict[str, Any]

_RECIPE = "demo"


def run(model: str, out: Path | None, *, as_json: bool) -> int:
    """Exit code 0 when the job succeeded and the artefact lies in `out` (default: a new temporary folder)."""
    source = model_folder(model)
    kept = _output_folder(out, model)
    started = monotonic()
    with tempfile.TemporaryDirectory(prefix="bitmill-demo-") as folder:
        say(f"starting PostgreSQL, Valkey, the API, a worker and the reconciler in {folder}")
        options = StackOptions(Path(folder), port=0, durable=False)
        with running_stack(options, Settings()) as stack:
            say(f"{stack.url} is ready after {monotonic() - started:.1f} s")
            report = stack.run_beside(lambda: _quantise(stack, source, kept))
    report["seconds"] = round(monotonic() - started, 1)
    if as_json:
        emit(report)
    else:
        _show(report)
    return DONE if report["status"] == "succeeded" else FAILED


def model_folder(name: str) -> Path:
    """The checkpoint folder of a model that comes with the project, or that is installed beside it."""
    import models

    if name == "bundled":
        folder = Path(models.BUNDLED)
    elif name == "smollm2":
        folder = Path(models.smollm2_folder())
    else:
        raise NotFound("no such demo model", where=name, hint="bundled or smollm2")
    if not (folder / "config.json").is_file():
        raise NotFound("the model is not installed", where=str(folder))
    return folder


def _output_folder(out: Path | None, model: str) -> Path:
    if out is None:
        return Path(tempfile.mkdtemp(prefix=f"bitmill-{model}-artefact-"))
    if out.exists() and any(out.iterdir()):
        raise Conflict("the folder is not empty", where=str(out), hint="choose another --out")
    return out.absolute()


def _quantise(stack: Stack, source: Path, out: Path) -> Json:
    with Client(Connection(stack.url, stack.key), patience_s=30.0) as client:
        named = {"upload": uploaded(client, source)}
        checkpoint = client.post("/v1/checkpoints", {"source": named, "name": source.name})
        job = client.post("/v1/jobs", {"checkpoint": checkpoint["id"], "recipe": _recipe(), "name": "demo"})
        job = watched(client, job["id"])
        if job["status"] != "succeeded":
            return {"status": job["status"], "job": job, "failure": job.get("failure")}
        files = downloaded(client, job["id"], out)
        tensors = client.get(f"/v1/jobs/{job['id']}/tensors")["items"]
    return {
        "status": job["status"],
        "summary": {**job["summary"], "original_size_bytes": _weight_bytes(source)},
        "recipe": job["recipe"],
        "artefact": str(out),
        "files": files,
        "formats": _formats(tensors),
        "job": job,
    }


def _recipe() -> Json:
    from core.recipe.recipe import load_recipe

    return load_recipe(_RECIPE).canonical()


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _formats(tensors: list[Json]) -> dict[str, int]:
    """How many tensors got each format."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[str(tensor["format"])] = counts.get(str(tensor["format"]), 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _show(report: Json) -> None:
    if report["status"] != "succeeded":
        say(f"the job ended {report['status']}")
        if report["failure"]:
            render.failure(report["failure"])
        return
    numbers = report["summary"]
    original, now = numbers["original_size_bytes"], numbers["size_bytes"]
    before = [("size of the original weights", f"{render.size(original)} ({original / now:.2f} times as large)")]
    render.summary("Quantised", numbers, before)
    render.table(("format", "tensors"), report["formats"].items())
    render.out().print(f"{report['seconds']:.0f} s in all. The artefact: {report['artefact']}")
