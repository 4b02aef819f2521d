"""SQL of webhooks and their deliveries.

Whoever adds deliveries holds the webhook FOR SHARE, whoever ends some or disables it FOR UPDATE before its deliveries:
a webhook that is disabled has none that are pending, and nobody waits in a circle.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Select, Update, any_, delete, func, literal, or_, select, text, update
from sqlalchemy.dialects.postgresql import distinct_on

from core.errors import Conflict, NotFound
from core.ids import new_id
from core.jobs.sessions import ReadSession, WriteSession
from core.jobs.tables import Job, Webhook, WebhookDelivery

_Row = WebhookDelivery


@dataclass(frozen=True)
class Claimed:
    """A delivery that this process may attempt until its lease ends. `attempt` is the number that fences its result."""

    id: str
    webhook_id: str
    kind: str
    attempt: int
    at: datetime
    url: str
    secret: str
    body: str


def lock_owner(session: WriteSession, owner: str) -> None:
    """Hold the right to add webhooks of that owner until the transaction ends."""
    session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": f"webhooks:{owner}"})


def get(session: ReadSession, owner: str, webhook_id: str) -> Webhook:
    found = session.scalar(_living(owner).where(Webhook.id == webhook_id))
    if found is None:
        raise NotFound("no such webhook", where=webhook_id)
    return found


def _living(owner: str) -> Select[Webhook]:
    return select(Webhook).where(Webhook.owner == owner, Webhook.disabled_reason.is_distinct_from("deleted"))


def usable(session: ReadSession, owner: str, webhook_id: str | None) -> str | None:
    """The id of a webhook that a job may name; Conflict when it is disabled."""
    if webhook_id is not None and get(session, owner, webhook_id).disabled_at is not None:
        raise Conflict("the webhook is disabled", where=webhook_id, hint="make a new one")
    return webhook_id


def still_there(session: ReadSession, owner: str, webhook_id: str | None) -> str | None:
    """The id of a webhook, None when it is disabled or deleted by now."""
    living = _living(owner).where(Webhook.id == webhook_id, Webhook.disabled_at.is_(None))
    return session.scalar(living.with_only_columns(Webhook.id))


def hold(session: WriteSession, owner: str, webhook_id: str) -> Webhook:
    """The webhook, which stays as it is until this transaction ends."""
    query = _living(owner).where(Webhook.id == webhook_id).with_for_update(read=True)
    found = session.scalar(query.execution_options(populate_existing=True))
    if found is None:
        raise NotFound("no such webhook", where=webhook_id)
    return found


def lock(session: WriteSession, webhook_id: str) -> Webhook:
    query = select(Webhook).where(Webhook.id == webhook_id).with_for_update(key_share=True)
    return session.scalars(query.execution_options(populate_existing=True)).one()


def page(session: ReadSession, owner: str, before: str | None, limit: int) -> list[Webhook]:
    query = _living(owner)
    if before is not None:
        query = query.where(Webhook.id < before)
    return list(session.scalars(query.order_by(Webhook.id.desc()).limit(limit)))


def count(session: ReadSession, owner: str) -> int:
    return session.scalar(select(func.count()).select_from(_living(owner).subquery())) or 0


def listening(session: WriteSession, job: Job, kind: str) -> list[str]:
    """The webhooks that shall hear of such an event of the job, held until this transaction ends."""
    chosen = or_(literal(kind) == any_(Webhook.kinds), Webhook.id == job.webhook_id)
    query = select(Webhook.id).where(Webhook.owner == job.owner, Webhook.disabled_at.is_(None), chosen)
    return list(session.scalars(query.order_by(Webhook.id).with_for_update(read=True)))


def add(
    session: WriteSession, webhook_id: str, kind: str, body: str, job: str | None = None, event: int | None = None
) -> WebhookDelivery:
    """A delivery that is due at once."""
    row = _Row(
        id=new_id("delivery"),
        webhook_id=webhook_id,
        job_id=job,
        event_seq=event,
        kind=kind,
        body=body,
        next_at=func.clock_timestamp(),
    )
    session.add(row)
    session.flush()
    return row


def delivery(session: ReadSession, webhook_id: str, delivery_id: str) -> WebhookDelivery:
    found = session.scalar(select(_Row).where(_Row.webhook_id == webhook_id, _Row.id == delivery_id))
    if found is None:
        raise NotFound("no such delivery", where=delivery_id)
    return found


def deliveries(session: ReadSession, webhook_id: str, before: str | None, limit: int) -> list[WebhookDelivery]:
    """The log of a webhook, newest first."""
    query = select(_Row).where(_Row.webhook_id == webhook_id)
    if before is not None:
        query = query.where(_Row.id < before)
    return list(session.scalars(query.order_by(_Row.id.desc()).limit(limit)))


def _due() -> tuple[ColumnElement[bool], ...]:
    """What may be claimed: by the time when the transaction began, which an index can be searched for."""
    return _Row.state == "pending", _Row.next_at <= func.now()


def claim(session: WriteSession, limit: int, busy: Iterable[str], lease_s: float) -> list[Claimed]:
    """The first due delivery of up to `limit` webhooks that are not `busy`: counted as attempted, and leased."""
    due = _due()
    first = (
        select(_Row.id, _Row.next_at)
        .ext(distinct_on(_Row.webhook_id))
        .where(*due, _Row.webhook_id.not_in(list(busy)))
        .order_by(_Row.webhook_id, _Row.next_at, _Row.id)
        .subquery()
    )
    chosen = select(first.c.id).order_by(first.c.next_at).limit(limit)
    return _take(session, update(_Row).where(_Row.id.in_(chosen), *due), lease_s)


def claim_next(session: WriteSession, webhook_id: str, lease_s: float) -> list[Claimed]:
    """The same for one webhook."""
    due = _due()
    first = select(_Row.id).where(_Row.webhook_id == webhook_id, *due).order_by(_Row.next_at, _Row.id).limit(1)
    return _take(session, update(_Row).where(_Row.id.in_(first), *due), lease_s)


def _take(session: WriteSession, statement: Update, lease_s: float) -> list[Claimed]:
    lease = func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, lease_s)
    taken = session.execute(
        statement.values(attempts=_Row.attempts + 1, attempted_at=func.clock_timestamp(), next_at=lease)
        .returning(_Row.id, _Row.webhook_id, _Row.kind, _Row.attempts, _Row.attempted_at, _Row.body)
        .execution_options(synchronize_session=False)
    ).all()
    known = select(Webhook.id, Webhook.url, Webhook.secret).where(Webhook.id.in_([row.webhook_id for row in taken]))
    places = {row.id: row for row in session.execute(known)} if taken else {}
    return [
        Claimed(
            id=row.id,
            webhook_id=row.webhook_id,
            kind=row.kind,
            attempt=row.attempts,
            at=row.attempted_at,
            url=places[row.webhook_id].url,
            secret=places[row.webhook_id].secret,
            body=row.body,
        )
        for row in taken
    ]


def delivered(session: WriteSession, claimed: Claimed, status: int) -> bool:
    """The receiver has it; False when this attempt is not the latest one any more."""
    return _end_attempt(
        session, claimed, state="delivered", next_at=None, delivered_at=func.clock_timestamp(), last_status=status
    )


def again(session: WriteSession, claimed: Claimed, status: int | None, error: str, delay_s: float) -> bool:
    """Try again after `delay_s`, lengthened by up to a tenth so that retries spread; False as above."""
    wait = func.make_interval(0, 0, 0, 0, 0, 0, delay_s * (1 + 0.1 * func.random()))
    return _end_attempt(session, claimed, next_at=func.clock_timestamp() + wait, last_status=status, last_error=error)


def given_up(session: WriteSession, claimed: Claimed, status: int | None, error: str) -> bool:
    """Not tried again; False as above."""
    return _end_attempt(session, claimed, state="failed", next_at=None, last_status=status, last_error=error)


def _end_attempt(session: WriteSession, claimed: Claimed, **values: object) -> bool:
    done = session.execute(
        update(_Row)
        .where(_Row.id == claimed.id, _Row.state == "pending", _Row.attempts == claimed.attempt)
        .values(**values)
        .execution_options(synchronize_session=False)
    )
    return int(done.rowcount) == 1  # type: ignore[attr-defined]


def failing(session: WriteSession, webhook: Webhook, longest_s: float) -> bool:
    """Note a failure of a webhook that is locked; whether it has failed for `longest_s` without any success."""
    now = session.scalars(select(func.clock_timestamp())).one()
    webhook.failing_since = webhook.failing_since or now
    since: datetime = webhook.failing_since
    return bool((now - since).total_seconds() > longest_s)


def disable(session: WriteSession, webhook: Webhook, reason: str) -> None:
    """No more deliveries to a webhook that is locked; those that are pending have failed."""
    webhook.disabled_at = webhook.disabled_at or session.scalars(select(func.clock_timestamp())).one()
    webhook.disabled_reason = reason
    if reason == "deleted":
        webhook.secret = ""
    session.flush()
    session.execute(
        update(_Row)
        .where(_Row.webhook_id == webhook.id, _Row.state == "pending")
        .values(state="failed", next_at=None, last_error=f"the webhook was disabled: {reason}")
        .execution_options(synchronize_session=False)
    )


def forget_old(session: WriteSession, age_s: float, limit: int) -> int:
    """Remove ended deliveries that are older than that from the log; how many."""
    old = _Row.created_at < func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, age_s)
    chosen: Sequence[str] = session.scalars(select(_Row.id).where(_Row.state != "pending", old).limit(limit)).all()
    if chosen:
        session.execute(delete(_Row).where(_Row.id.in_(chosen)).execution_options(synchronize_session=False))
    return len(chosen)
