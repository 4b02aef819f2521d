"""Runs Alembic without an ini file, from any folder.

A migration waits at most a few seconds for a lock (a table that is in use is left alone and the command fails, to be
tried again) and only one process migrates at a time.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from core.jobs.tables import Base

LOCK_TIMEOUT_S = 5
_LOCK = 0x62697468  # the advisory lock of whoever migrates


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the database to `revision`; nothing happens when it is there."""
    with engine.begin() as connection:
        _prepare(connection)
        command.upgrade(_config(connection), revision)


def downgrade(engine: Engine, revision: str = "base") -> None:
    """Take migrations back. Data of dropped tables are gone."""
    with engine.begin() as connection:
        _prepare(connection)
        command.downgrade(_config(connection), revision)


def differences(engine: Engine) -> list[str]:
    """What the database has otherwise than `core.jobs.tables`; empty when they agree."""
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": False, "target_metadata": Base.metadata}
        )
        return [repr(entry) for entry in compare_metadata(context, Base.metadata)]


def head() -> str:
    """The newest revision."""
    return ScriptDirectory.from_config(_config(None)).get_current_head() or ""


def _config(connection: Connection | None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _prepare(connection: Connection) -> None:
    connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:name)"), {"name": _LOCK})
