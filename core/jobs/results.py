"""What a step's output means for its job: summary, metrics, per-tensor results, artefacts, the checkpoint's files.

The shapes are those of `core.pipeline`'s step functions. Reused outputs are recorded like fresh ones.
"""

from __future__ import annotations

from typing import Any

from core.errors import BitmillError, ErrorClass, GateFailed
from core.jobs.repository import checkpoints as checkpoint_rows
from core.jobs.repository import jobs as job_rows
from core.jobs.sessions import WriteSession
from core.jobs.tables import Job
from core.jobs.views import Summary

_SUMMARY = tuple(Summary.model_fields)


def objects_of(output: dict[str, Any]) -> list[str]:
    """The keys of all objects that an output speaks of."""
    values = output.get("values", {})
    listed = [*output.get("files", {}).values(), *values.get("files", []), *values.get("artefacts", [])]
    return [entry["key"] for entry in listed if isinstance(entry, dict) and entry.get("key")]


def record(session: WriteSession, job: Job, kind: str, output: dict[str, Any]) -> None:
    """Write down what a step found out; part of the transaction that makes the step succeed."""
    values = output.get("values", {})
    if kind == "fetch":
        checkpoint_rows.put_fetched(session, job.checkpoint_id, values["checkpoint_sha"], values["files"])
    elif kind == "quantise":
        job_rows.put_tensors(session, job.id, values.get("tensors", []))
    elif kind == "export":
        job_rows.put_artefacts(session, job.id, values["export"], values["artefacts"])
    numbers = {**values, **values.get("metrics", {}), **values.get("summary", {})}
    known = {name: numbers[name] for name in _SUMMARY if numbers.get(name) is not None}
    if known:
        job.summary = {**(job.summary or {}), **known}
    metrics = {**values.get("metrics", {}), **known}
    job_rows.put_metrics(session, job.id, {name: float(x) for name, x in metrics.items() if _is_number(x)})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def gate_failure(export: dict[str, Any]) -> GateFailed | None:
    """Why the exported model does not pass the recipe's gate, None when it does or there is none."""
    gate = export["values"].get("gate") or {}
    if gate.get("ok", True):
        return None
    worst = gate["failures"][0]
    return GateFailed(
        f"{worst['limit']} is {worst['allowed']}, measured was {worst['measured']}",
        where=f"gate.{worst['limit']}",
        hint="the artefacts are kept; ask for more bits or another format, or relax the gate",
    )


def failure(step_kind: str, error: BitmillError) -> dict[str, Any]:
    """The contract's `failure` of a job."""
    return {
        "code": error.code,
        "class": str(error.kind),
        "retryable": error.retryable,
        "step": step_kind,
        "tensor": error.where if error.kind is ErrorClass.NUMERICAL and error.where else None,
        "where": error.where,
        "detail": error.detail,
        "hint": error.hint,
    }
