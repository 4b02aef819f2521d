"""SQL of API keys and of remembered answers."""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert

from core.jobs.sessions import ReadSession, WriteSession
from core.jobs.tables import ApiKey, Idempotency


def by_digest(session: ReadSession, sha256: str) -> ApiKey | None:
    """The key with that digest, unless it was revoked."""
    return session.scalar(select(ApiKey).where(ApiKey.sha256 == sha256, ApiKey.revoked_at.is_(None)))


def add_key(session: WriteSession, key_id: str, owner: str, sha256: str, prefix: str, scopes: list[str]) -> None:
    """Add a key; one with the same digest stays as it is."""
    values = {"id": key_id, "owner": owner, "sha256": sha256, "prefix": prefix, "scopes": scopes}
    session.execute(insert(ApiKey).values(**values).on_conflict_do_nothing(index_elements=[ApiKey.sha256]))


def keys(session: ReadSession, owner: str) -> list[ApiKey]:
    return list(session.scalars(select(ApiKey).where(ApiKey.owner == owner).order_by(ApiKey.id)))


def revoke(session: WriteSession, owner: str, key_id: str) -> bool:
    """Revoke a key of the owner; False when there is no such living key."""
    done = session.execute(
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.owner == owner, ApiKey.revoked_at.is_(None))
        .values(revoked_at=func.clock_timestamp())
    )
    return int(done.rowcount) == 1  # type: ignore[attr-defined]


def hold(session: WriteSession, owner: str, key: str, body_hash: str, abandoned_s: float) -> bool:
    """Take the key for a request in flight: True when it was free, or its holder died that long ago with this body."""
    statement = insert(Idempotency).values(owner=owner, key=key, body_hash=body_hash)
    limit = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, abandoned_s)
    taken = statement.on_conflict_do_update(
        index_elements=[Idempotency.owner, Idempotency.key],
        set_={"created_at": func.clock_timestamp()},
        where=Idempotency.answer.is_(None) & (Idempotency.body_hash == body_hash) & (Idempotency.created_at < limit),
    )
    return session.scalar(taken.returning(Idempotency.key)) is not None


def remembered(session: ReadSession, owner: str, key: str) -> Idempotency | None:
    query = select(Idempotency).where(Idempotency.owner == owner, Idempotency.key == key)
    return session.scalar(query.execution_options(populate_existing=True))


def answer(session: WriteSession, owner: str, key: str, value: dict[str, Any]) -> None:
    session.execute(update(Idempotency).where(Idempotency.owner == owner, Idempotency.key == key).values(answer=value))


def forget(session: WriteSession, owner: str, key: str) -> None:
    """Free a key whose request failed."""
    session.execute(
        delete(Idempotency).where(Idempotency.owner == owner, Idempotency.key == key, Idempotency.answer.is_(None))
    )
