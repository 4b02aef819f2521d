"""Rows of a job turned into the contract's job: progress, time left, one entry per step.

Pure but for reading: nothing is changed, and the clock is passed in. Progress weighs steps by what they usually cost;
the estimate of the time left assumes that the rest goes as fast as what was done, reused steps not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from core.jobs.repository import attempts as attempt_rows
from core.jobs.repository import steps as step_rows
from core.jobs.sessions import ReadSession
from core.jobs.states import DONE_STEPS
from core.jobs.tables import Attempt, Job, Step
from core.jobs.views import FailureView, JobView, Limits, StepView, Summary

_COST = {
    "fetch": 1.0,
    "calibrate": 6.0,
    "allocate": 2.0,
    "quantise": 6.0,
    "assemble": 1.0,
    "evaluate": 4.0,
    "export": 1.0,
}
_TOO_EARLY = 0.02  # below this share done, the rate says nothing


def pictures(session: ReadSession, jobs: Sequence[Job], now: datetime) -> list[JobView]:
    """The views of those jobs, read with two queries whatever their number."""
    ids = [job.id for job in jobs]
    steps = step_rows.of_jobs(session, ids)
    running = attempt_rows.running_of_jobs(session, ids)
    return [picture(job, steps.get(job.id, []), running, now) for job in jobs]


def picture(job: Job, steps: Sequence[Step], running: Mapping[str, Attempt], now: datetime) -> JobView:
    """The contract's job. `running`: running attempts by step id."""
    return JobView(
        id=job.id,
        status=job.status,
        name=job.name,
        labels=job.labels,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        recipe=job.recipe,
        checkpoint=job.checkpoint_id,
        limits=Limits(max_pending_s=job.max_pending_s, max_runtime_s=job.max_runtime_s),
        webhook=job.webhook_id,
        retry_of=job.retry_of,
        steps=tuple(_step(step, running.get(step.id)) for step in steps),
        progress=round(job_progress(steps, running), 4),
        eta_s=eta(job, steps, running, now),
        summary=Summary(**job.summary) if job.summary else None,
        failure=FailureView.model_validate(job.failure) if job.failure else None,
    )


def _step(step: Step, attempt: Attempt | None) -> StepView:
    return StepView(
        id=step.id,
        kind=step.kind,
        index=step.index,
        status=step.state,
        progress=round(step_progress(step, attempt), 4),
        attempts=step.charged + (attempt is not None),
        message=attempt.message if attempt else "",
        started_at=step.started_at,
        finished_at=step.finished_at,
    )


def step_progress(step: Step, attempt: Attempt | None) -> float:
    if step.state in DONE_STEPS:
        return 1.0
    return attempt.progress if attempt else 0.0


def job_progress(steps: Sequence[Step], running: Mapping[str, Attempt]) -> float:
    """The share of the job's usual cost that is done, 0..1."""
    total = sum(_cost(step) for step in steps)
    done = sum(_cost(step) * step_progress(step, running.get(step.id)) for step in steps)
    return done / total if total else 0.0


def eta(job: Job, steps: Sequence[Step], running: Mapping[str, Attempt], now: datetime) -> float | None:
    """Seconds until the job should be done, None before anything can be said and after its end."""
    if job.status != "running" or job.started_at is None:
        return None
    worked = [step for step in steps if step.state != "reused"]
    progress = job_progress(worked, running)
    if progress < _TOO_EARLY:
        return None
    elapsed = (now - job.started_at).total_seconds()
    return round(max(0.0, elapsed * (1 - progress) / progress), 1)


def _cost(step: Step) -> float:
    return _COST[step.kind] / step.count
