"""SQL of quotas: what is counted and what is added are one, for each owner."""

from __future__ import annotations

from sqlalchemy import text

from core.jobs.sessions import WriteSession


def hold(session: WriteSession, owner: str) -> None:
    """Until the transaction ends nobody else adds to what the owner has: count afterwards, then add.

    Take it before any other lock, so that whoever waits for it holds nothing.
    """
    session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 1))"), {"name": owner})
