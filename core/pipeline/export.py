"""Step export: the documents around the weight files, and the list of what the job publishes.

Files: config.json, manifest.json, report.json, README.md, SHA256SUMS. Values: {export, artefacts: [{path, key,
sha256, size}], summary, gate: {ok, limits, failures}}. The source's other files are passed on under the keys that
they have. A gate that fails does not raise here: the artefacts stay, and whoever reads `gate` decides.
"""

from __future__ import annotations

from typing import Any

from core.exports import bitmill
from core.exports.report import TensorResult, coverage, coverage_line, forecast, gate_result, summary, with_shares
from core.jobs.steps import StepOutput, StepRequest
from core.pipeline.calibrate import COVARIANCE_FILE, FISHER_FILE
from core.pipeline.context import StepContext
from core.pipeline.fetch import files_of, open_checkpoint
from core.pipeline.plan_file import Plan, read_plan
from core.recipe.recipe import load_recipe
from core.storage.checkpoint import CheckpointIndex, FileEntry


def export(request: StepRequest, ctx: StepContext) -> StepOutput:
    """Write the documents of the `bitmill` layout."""
    fetched, assembled = request.outputs("fetch")[0], request.outputs("assemble")[0]
    evaluated, calibrated = request.outputs("evaluate"), request.outputs("calibrate")
    source = open_checkpoint(ctx, fetched)
    recipe = load_recipe(request.params["recipe"]).canonical()  # in its own order, whatever a database made of it
    metrics: dict[str, Any] | None = evaluated[0].values["metrics"] if evaluated else None
    plan = read_plan(ctx, request.outputs("allocate")[0])
    report = build_report(recipe, assembled.values, plan, metrics)
    evidence = bitmill.Evidence(
        checkpoint_sha=fetched.values["checkpoint_sha"],
        source=tuple(files_of(fetched)),
        config=source.config,
        source_card=_source_card(source),
        recipe=recipe,
        calibration=_calibration(calibrated[0]) if calibrated else None,
        report=report,
    )
    stored = {name: FileEntry(name, file.size, file.sha256, file.key) for name, file in assembled.files.items()}
    stored |= bitmill.copied_files(evidence.source)
    files = {name: ctx.publish_bytes(request, name, data) for name, data in bitmill.documents(evidence, stored).items()}
    published = [
        *({"path": path, "key": one.key, "sha256": one.sha256, "size": one.size} for path, one in stored.items()),
        *({"path": path, "key": one.key, "sha256": one.sha256, "size": one.size} for path, one in files.items()),
    ]
    values = {
        "export": "bitmill",
        "artefacts": sorted(published, key=lambda one: str(one["path"])),
        "summary": report["summary"],
        "gate": report["gate"],
    }
    return StepOutput(files=files, values=values)


def build_report(
    recipe: dict[str, Any], assembled: dict[str, Any], plan: Plan, metrics: dict[str, Any] | None
) -> dict[str, Any]:
    """report.json."""
    results = [TensorResult.from_json(row) for row in assembled["tensors"]]
    rows = coverage(results)
    return {
        "summary": summary(assembled, metrics, plan.predicted_kl),
        "target": recipe["target"],
        "coverage_line": coverage_line(rows),
        "coverage": rows,
        "forecast": forecast(plan.predicted_kl, metrics),
        "metrics": metrics,
        "gate": gate_result(recipe.get("gate"), metrics),
        "warnings": list(plan.warnings),
        "rounds": list(plan.rounds),
        "tensors": with_shares(results),
    }


def _calibration(calibrated: StepOutput) -> dict[str, Any]:
    described = {key: value for key, value in calibrated.values.items() if key not in ("tensors", "covariance")}
    described["sha256"] = calibrated.files[FISHER_FILE].sha256
    if covariance := calibrated.values.get("covariance"):
        described["covariance"] = {
            "sha256": calibrated.files[COVARIANCE_FILE].sha256,
            "not_reached": covariance["not_reached"],
        }
    return described


def _source_card(source: CheckpointIndex) -> str:
    card = source.files.get(bitmill.CARD)
    return "" if card is None else bytes(card.read(0, min(card.size, 1 << 20))).decode("utf-8", "replace")
