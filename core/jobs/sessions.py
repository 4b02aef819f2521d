"""Connections and transactions. A `ReadSession` cannot write, a `WriteSession` commits when its block ends.

They are different types, so that a repository function says in its signature which it needs; the database enforces it
too (READ ONLY transactions). One block is one transaction; there is no ambient session and no lazy loading.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from core.errors import StoreUnavailable
from core.ids import canonical_json


class ReadSession(Session):
    """A session whose transaction the database keeps from writing."""


class WriteSession(ReadSession):
    """A session that may write."""


def connect(database_url: str, *, pool_size: int = 10) -> Engine:
    """An engine for `postgresql://...` (TCP or unix socket) that notices connections a restart has cut."""
    url = make_url(database_url).set(drivername="postgresql+psycopg")
    return create_engine(
        url,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_pre_ping=True,
        pool_recycle=1800,
        json_serializer=canonical_json,
        connect_args={"connect_timeout": 10, "application_name": "bitmill"},
    )


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[ReadSession]:
    """A transaction that sees one state of the database and changes nothing."""
    with _available(), ReadSession(engine, expire_on_commit=False) as session:
        session.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        yield session


@contextlib.contextmanager
def writing(engine: Engine) -> Iterator[WriteSession]:
    """A transaction that is committed when the block ends and rolled back when it raises."""
    with _available(), WriteSession(engine, expire_on_commit=False) as session, session.begin():
        yield session


@contextlib.contextmanager
def _available() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        raise StoreUnavailable(f"the database did not answer: {error.orig}"[:300], where="database") from error
