"""The worker's side of the queue: claim a step, hold its lease, hand in one result.

Every call but `claim` names an attempt and is fenced: once its lease has run out, or someone has ended it, the answer
is False and no row is changed, whatever the worker still believes. Outputs are validated before they are stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import BitmillError, ErrorClass, Interrupted, LeaseLost
from core.ids import new_id
from core.jobs import events, lifecycle
from core.jobs.change import Change, Unit
from core.jobs.repository import attempts as attempt_rows
from core.jobs.repository import jobs as job_rows
from core.jobs.repository import steps as step_rows
from core.jobs.retry import History, decide
from core.jobs.sessions import reading, writing
from core.jobs.steps import StepInput, StepOutput, StepRequest, output_hash
from core.jobs.tables import Job, Step

_REPORT_EVERY = 0.05  # of a step's progress: a step tells at most twenty times how far it is


@dataclass(frozen=True)
class Claim:
    """The right to execute a step until the lease ends."""

    attempt_id: str
    step_id: str
    job_id: str
    checkpoint_id: str
    request: StepRequest
    lease_s: float


@dataclass(frozen=True)
class Beat:
    """`ok` False: the lease is lost, stop. `cancel`: the job's owner wants it stopped, stop and say `cancelled`."""

    ok: bool
    cancel: bool


@dataclass(frozen=True)
class _Held:
    """A locked job and its step, whose attempt this transaction is about to end."""

    change: Change
    job: Job
    step: Step


class StepQueue(Unit):
    """Steps, for workers."""

    def claim(self, step_id: str, worker_id: str) -> Claim | None:
        """Win the step, or None: it is not ready, somebody else was faster, or its work is done or being done."""
        with reading(self.engine) as session:
            job_id = step_rows.job_of(session, step_id)
        if job_id is None:
            return None
        with self.change() as change:
            job = job_rows.lock(change.session, job_id)
            step = step_rows.one(change.session, step_id)
            if step.state != "ready" or job.status not in ("queued", "running"):
                return None
            step_rows.lock_work(change.session, step.input_hash or "")
            if lifecycle.reuse(change, job, step):
                lifecycle.advance(change, job)
                return None
            if step_rows.equal_running(change.session, step):
                return None  # whoever does that work offers this step again when it ends
            return self._take(change, job, step, worker_id)

    def _take(self, change: Change, job: Job, step: Step, worker_id: str) -> Claim | None:
        attempt_id = new_id("attempt")
        if not step_rows.claim(change.session, step.id, attempt_id):
            return None
        attempt_rows.begin(change.session, attempt_id, step, worker_id, self.settings.lease_s)
        lifecycle.start(change, job)
        events.append(change.session, job, "step.started", step=step.id, attempt=attempt_id, worker=worker_id)
        found = step_rows.inputs(change.session, step.id)
        request = StepRequest(
            kind=step.kind,
            index=step.index,
            count=step.count,
            input_hash=step.input_hash or "",
            params=step.params,
            inputs=tuple(StepInput(kind=kind, index=index, output=output) for kind, index, output in found),
            seed=step.seed,
        )
        return Claim(attempt_id, step.id, job.id, job.checkpoint_id, request, self.settings.lease_s)

    def heartbeat(self, attempt_id: str, progress: float, message: str = "") -> Beat:
        """Renew the lease, write progress down and hear whether to stop."""
        with writing(self.engine) as session:
            reported = attempt_rows.reported(session, attempt_id)
            place = attempt_rows.place(session, attempt_id)
            if reported is None or place is None:
                return Beat(ok=False, cancel=False)
            told = progress - reported >= _REPORT_EVERY
            job = job_rows.lock(session, place[0]) if told else None
            if not attempt_rows.beat(session, attempt_id, progress, message, self.settings.lease_s):
                return Beat(ok=False, cancel=False)
            if job is not None:
                attempt_rows.mark_reported(session, attempt_id, progress)
                about = {"progress": round(progress, 4), "message": message}
                events.append(session, job, "step.progress", step=place[1], attempt=attempt_id, **about)
            status = attempt_rows.job_status(session, attempt_id)
            return Beat(ok=True, cancel=status == "cancelling")

    def succeed(self, attempt_id: str, output: dict[str, Any]) -> bool:
        """Hand in the result. Raises (and changes nothing) when `output` is not a step's output."""
        answer = StepOutput.model_validate(output)
        with self._ending(attempt_id, "succeed", charged=True) as held:
            if held is None:
                return False
            lifecycle.succeed_step(
                held.change, held.job, held.step, attempt_id, answer.model_dump(mode="json"), output_hash(answer)
            )
            return True

    def fail(self, attempt_id: str, error: BitmillError) -> bool:
        """Hand in a failure; its class decides whether the step is tried again."""
        if error.kind is ErrorClass.INTERRUPTED:
            return self.interrupted(attempt_id)
        trigger = "lose" if error.kind is ErrorClass.LOST else "fail"
        with self._ending(attempt_id, trigger, charged=True, error=error) as held:
            if held is None:
                return False
            after_failure(held.change, held.job, held.step, attempt_id, error)
            return True

    def interrupted(self, attempt_id: str) -> bool:
        """Give the step back, free of charge: the worker was asked to stop."""
        error = Interrupted("the worker was asked to stop")
        with self._ending(attempt_id, "interrupt", charged=False, error=error) as held:
            if held is None:
                return False
            after_failure(held.change, held.job, held.step, attempt_id, error)
            return True

    def cancelled(self, attempt_id: str) -> bool:
        """The engine has stopped after `Beat.cancel`."""
        with self._ending(attempt_id, "cancel", charged=False) as held:
            if held is None:
                return False
            held.change.move_step(held.step, "cancel")
            events.append(held.change.session, held.job, "attempt.cancelled", step=held.step.id, attempt=attempt_id)
            lifecycle.settle(held.change, held.job)
            return True

    def log(self, attempt_id: str, lines: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Keep lines of the engine's log with the attempt."""
        with writing(self.engine) as session:
            attempt_rows.add_log(session, attempt_id, list(lines))

    @contextlib.contextmanager
    def _ending(
        self, attempt_id: str, trigger: str, *, charged: bool, error: BitmillError | None = None
    ) -> Iterator[_Held | None]:
        """End the attempt, fenced; None when that changed no row. Afterwards whoever waited for this work is told."""
        with self.change() as change:
            place = attempt_rows.place(change.session, attempt_id)
            if place is None:
                yield None
                return
            job = job_rows.lock(change.session, place[0])
            if not attempt_rows.end(change.session, attempt_id, trigger, charged=charged, error=error):
                yield None
                return
            step = step_rows.one(change.session, place[1])
            yield _Held(change, job, step)
            lifecycle.offer_equal(change, step)


def after_failure(change: Change, job: Job, step: Step, attempt_id: str, error: BitmillError) -> None:
    """Decide by class and history what follows an attempt that has just been ended with `error`, and do it."""
    counted = attempt_rows.same_class(change.session, step.id, str(error.kind))
    earlier = counted - (error.kind is not ErrorClass.INTERRUPTED)  # the attempt just ended is among them
    decision = decide(error.kind, History(step.charged, max(0, earlier)), change.settings.max_attempts)
    kinds = {ErrorClass.LOST: "attempt.lost", ErrorClass.INTERRUPTED: "attempt.interrupted"}
    if error.kind in kinds:
        about = {"code": error.code, "detail": error.detail}
        events.append(change.session, job, kinds[error.kind], step=step.id, attempt=attempt_id, **about)
    lifecycle.fail_step(change, job, step, attempt_id, error, decision)


def reap(unit: Unit, attempt_id: str) -> bool:
    """End an attempt whose lease has run out, and offer its step again; False when it was alive or ended after all."""
    error = LeaseLost("the lease ran out: the worker or its connection is gone")
    with unit.change() as change:
        place = attempt_rows.place(change.session, attempt_id)
        if place is None:
            return False
        job = job_rows.lock(change.session, place[0])
        if not attempt_rows.end(change.session, attempt_id, "lose", charged=True, error=error, expired=True):
            return False
        step = step_rows.one(change.session, place[1])
        after_failure(change, job, step, attempt_id, error)
        lifecycle.offer_equal(change, step)
        return True
