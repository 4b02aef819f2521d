"""What Alembic executes to run migrations: on the connection of `migrations.runner`, in its transaction."""

from __future__ import annotations

from alembic import context

from core.jobs.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
context.run_migrations()
