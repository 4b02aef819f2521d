"""What follows from what: the domain's rules, applied to a job whose row is locked.

Each function takes the open `Change` and the locked job, and leaves every row in a state that the table of states
allows, with the events that tell of it. None of them commits, sends or sleeps.
"""

from __future__ import annotations

from typing import Any

from core.errors import BitmillError, ErrorClass
from core.jobs import events, results, retry
from core.jobs.change import Change
from core.jobs.repository import attempts as attempt_rows
from core.jobs.repository import steps as step_rows
from core.jobs.states import DONE_STEPS, STEP
from core.jobs.steps import input_hash
from core.jobs.tables import Job, Step


def advance(change: Change, job: Job) -> None:
    """Make every step ready whose dependencies are done, reuse what has been done before, and finish a job that is."""
    session = change.session
    while True:
        session.flush()
        found = step_rows.unblocked(session, job.id)
        for step in found:
            _unblock(change, job, step)
        if not any(step.state == "reused" for step in found):
            break
    settle(change, job)


def _unblock(change: Change, job: Job, step: Step) -> None:
    hashes = step_rows.input_hashes(change.session, step.id)
    step.input_hash = input_hash(
        step.kind,  # type: ignore[arg-type]  # a CHECK constraint holds the kinds
        step.params,
        hashes,
        seed=step.seed,
        index=step.index,
        count=step.count,
    )
    if reuse(change, job, step):
        return
    change.move_step(step, "unblock")
    change.hint(step)
    events.append(change.session, job, "step.ready", step=step.id)


def reuse(change: Change, job: Job, step: Step) -> bool:
    """Take over the output of a step that has done the same work, if there is one and its objects are all there."""
    for origin, output, output_hash in step_rows.equal_outputs(change.session, step.input_hash or ""):
        if not all(change.exists(key) for key in results.objects_of(output)):
            continue
        step.output, step.output_hash, step.reused_from = output, output_hash, origin
        change.move_step(step, "reuse")
        events.append(change.session, job, "step.reused", step=step.id, input_hash=step.input_hash)
        results.record(change.session, job, step.kind, output)
        return True
    return False


def settle(change: Change, job: Job) -> None:
    """Finish the job if nothing of it is left to do."""
    change.session.flush()
    steps = step_rows.of_job(change.session, job.id)
    if job.status == "cancelling":
        if not any(step.state == "running" for step in steps):
            _cancel_steps(change, steps)
            change.move_job(job, "cancelled")
            events.append(change.session, job, "job.cancelled")
    elif job.status in ("queued", "running") and all(step.state in DONE_STEPS for step in steps):
        start(change, job)
        export = step_rows.output(change.session, job.id, "export")
        failure = results.gate_failure(export) if export else None
        if failure is None:
            change.move_job(job, "succeed")
            events.append(change.session, job, "job.succeeded", summary=job.summary or {})
        else:
            _end_failed(change, job, "export", failure)


def start(change: Change, job: Job) -> None:
    """A queued job runs from its first claim on."""
    if job.status == "queued":
        change.move_job(job, "start")
        events.append(change.session, job, "job.started")


def succeed_step(change: Change, job: Job, step: Step, attempt_id: str, output: dict[str, Any], name: str) -> None:
    """The step's one result; `name` is its output hash."""
    step.output, step.output_hash = output, name
    step.charged += 1
    change.move_step(step, "succeed")
    events.append(change.session, job, "step.succeeded", step=step.id, attempt=attempt_id)
    results.record(change.session, job, step.kind, output)
    advance(change, job)


def fail_step(
    change: Change, job: Job, step: Step, attempt_id: str, error: BitmillError, decision: retry.Decision
) -> None:
    """After an attempt that failed, was lost or interrupted: again, or the end of the job."""
    step.charged += decision.charged
    if job.status == "cancelling":
        change.move_step(step, "cancel")
        settle(change, job)
    elif decision.retry:
        release_step(change, job, step, attempt_id, error, decision.delay_s)
    else:
        step.error = error.to_dict()
        change.move_step(step, "fail")
        events.append(change.session, job, "step.failed", step=step.id, attempt=attempt_id, error=error.to_dict())
        _end_failed(change, job, step.kind, error)


def release_step(change: Change, job: Job, step: Step, attempt_id: str, error: BitmillError, delay_s: float) -> None:
    """Ready again, ahead of what has never been started; after `delay_s` if that is not 0."""
    from datetime import timedelta

    change.move_step(step, "release")
    step.not_before = change.now + timedelta(seconds=delay_s) if delay_s else None
    change.hint(step, urgent=True)
    if error.kind is not ErrorClass.INTERRUPTED:
        events.append(
            change.session,
            job,
            "step.retrying",
            step=step.id,
            attempt=attempt_id,
            code=error.code,
            detail=error.detail,
            delay_s=delay_s,
        )


def fail_job(change: Change, job: Job, step_kind: str, error: BitmillError) -> None:
    """End a running job from outside its steps, such as at its deadline."""
    _end_failed(change, job, step_kind, error)


def request_cancel(change: Change, job: Job) -> None:
    """What is not running is cancelled at once; what is running hears of it at its next heartbeat."""
    change.move_job(job, "cancel")
    events.append(change.session, job, "job.cancelling")
    waiting = [step for step in step_rows.of_job(change.session, job.id) if step.state in ("blocked", "ready")]
    _cancel_steps(change, waiting)
    settle(change, job)


def expire(change: Change, job: Job) -> None:
    """The job waited longer than it may."""
    _cancel_steps(change, step_rows.of_job(change.session, job.id))
    change.move_job(job, "expire")
    events.append(change.session, job, "job.expired")


def offer_equal(change: Change, step: Step) -> None:
    """Steps of other jobs that waited for this very work can be claimed now: to reuse it, or to do it."""
    for step_id, queue in step_rows.equal_ready(change.session, step):
        change.outbox.setdefault(step_id, queue)


def _end_failed(change: Change, job: Job, step_kind: str, error: BitmillError) -> None:
    """Failed for good: whoever still works on the job finds its attempt ended, and stops."""
    attempt_rows.end_all(change.session, job.id)
    change.session.flush()
    _cancel_steps(change, step_rows.of_job(change.session, job.id))
    job.failure, job.error_code = results.failure(step_kind, error), error.code
    change.move_job(job, "fail")
    events.append(change.session, job, "job.failed", failure=job.failure)


def _cancel_steps(change: Change, steps: list[Step]) -> None:
    for step in steps:
        if step.state not in STEP.terminal:
            change.move_step(step, "cancel")
