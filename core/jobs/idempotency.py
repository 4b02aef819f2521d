"""Answers remembered under an Idempotency-Key, for POSTs whose row cannot hold the key itself.

    stored = service.begin(owner, key, body_hash)     # the answer to give again, or None: go ahead
    service.finish(owner, key, answer)                # or service.release(owner, key) after a failure

Keys belong to owners. The row is taken before the work begins, so two requests with one key never both do it; a
holder that died gives it up after a minute, to a request with the same body.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine

from core.errors import Conflict, IdempotencyMismatch
from core.jobs.repository import access as access_rows
from core.jobs.sessions import writing

_ABANDONED_S = 60.0


class IdempotencyService:
    """The general form; jobs keep their key in their own row."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def begin(self, owner: str, key: str, body_hash: str) -> dict[str, Any] | None:
        """The stored answer; None when the caller shall do the work. Conflict while another request does it."""
        with writing(self.engine) as session:
            if access_rows.hold(session, owner, key, body_hash, _ABANDONED_S):
                return None
            known = access_rows.remembered(session, owner, key)
            if known is None:
                raise Conflict("this Idempotency-Key was just given up; send the request again", where=key)
            if known.body_hash != body_hash:
                raise IdempotencyMismatch("this Idempotency-Key was used with another body", where=key)
            if known.answer is None:
                raise Conflict("a request with this Idempotency-Key is in flight", where=key, hint="wait and try again")
            return known.answer

    def finish(self, owner: str, key: str, answer: dict[str, Any]) -> None:
        with writing(self.engine) as session:
            access_rows.answer(session, owner, key, answer)

    def release(self, owner: str, key: str) -> None:
        with writing(self.engine) as session:
            access_rows.forget(session, owner, key)
