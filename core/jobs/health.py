"""Whether the database answers and has the schema that this version needs."""

from __future__ import annotations

from sqlalchemy import Engine, text
from sqlalchemy.exc import ProgrammingError

from core.errors import StoreUnavailable
from core.jobs.sessions import reading

SCHEMA_VERSION = "0002"  # the head of `migrations`; a test compares the two


def database_ready(engine: Engine) -> None:
    """StoreUnavailable, with the reason, unless it does and has."""
    try:
        with reading(engine) as session:
            found = session.scalar(text("SELECT version_num FROM alembic_version"))
    except ProgrammingError as error:
        raise StoreUnavailable(
            "the database has no tables", where="database", hint="python -m migrations upgrade"
        ) from error
    if found != SCHEMA_VERSION:
        raise StoreUnavailable(
            f"the database's schema is {found}, this version needs {SCHEMA_VERSION}",
            where="database",
            hint="python -m migrations upgrade",
        )
