"""The facts that a job tells, and how each gets its number.

`append` takes the next number under the job's row: the caller has locked it (or has just inserted it), so numbers have
no gaps and a reader who has seen number n will never find a lower one later. What webhooks hear of is written down in
the same transaction: there is no change without its messages, and no message without its change.
"""

from __future__ import annotations

from typing import Any, get_args

from sqlalchemy import select

from core.jobs.messages import message
from core.jobs.picture import pictures
from core.jobs.repository import webhooks as webhook_rows
from core.jobs.sessions import ReadSession, WriteSession
from core.jobs.tables import Event, Job, Step
from core.jobs.views import EventView, WebhookKind

TERMINAL = frozenset({"job.succeeded", "job.failed", "job.cancelled", "job.expired"})
KINDS = (
    "job.queued",
    "job.started",
    "job.cancelling",
    *sorted(TERMINAL),
    "step.ready",
    "step.started",
    "step.progress",
    "step.succeeded",
    "step.reused",
    "step.failed",
    "step.retrying",
    "attempt.lost",
    "attempt.interrupted",
    "attempt.cancelled",
)
_WEBHOOK_KINDS = frozenset(get_args(WebhookKind))


def append(
    session: WriteSession, job: Job, kind: str, *, step: str | None = None, attempt: str | None = None, **data: Any
) -> None:
    """Add an event to a job whose row this transaction holds."""
    job.event_seq += 1
    event = Event(job_id=job.id, seq=job.event_seq, kind=kind, step_id=step, attempt_id=attempt, data=data)
    session.add(event)
    if kind in _WEBHOOK_KINDS and job.purpose == "quantise":
        _tell_webhooks(session, job, event)


def _tell_webhooks(session: WriteSession, job: Job, event: Event) -> None:
    """Write down what webhooks will be sent: the job as it is at this event, for every one that hears of it."""
    session.flush()
    listening = webhook_rows.listening(session, job, event.kind)
    if listening:
        (picture,) = pictures(session, [job], event.at)
        body = message(event.kind, event.at, picture.to_json())
        for webhook_id in listening:
            webhook_rows.add(session, webhook_id, event.kind, body, job=job.id, event=event.seq)


def after(session: ReadSession, job_id: str, seq: int, limit: int) -> list[EventView]:
    """The events of a job with a number above `seq`, in order."""
    rows = session.execute(
        select(Event, Step.kind, Step.index)
        .outerjoin(Step, Step.id == Event.step_id)
        .where(Event.job_id == job_id, Event.seq > seq)
        .order_by(Event.seq)
        .limit(limit)
    )
    return [_view(event, kind, index) for event, kind, index in rows]


def _view(event: Event, step_kind: str | None, step_index: int | None) -> EventView:
    return EventView(
        seq=event.seq,
        kind=event.kind,
        at=event.at,
        job=event.job_id,
        step=event.step_id,
        step_kind=step_kind,
        step_index=step_index,
        attempt=event.attempt_id,
        data=event.data,
    )
