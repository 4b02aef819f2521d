"""Alembic migrations of the database, one chain; `python -m migrations upgrade|downgrade|check`."""
