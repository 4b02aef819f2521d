"""SQL of checkpoints and their files."""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, func, select, update

from core.errors import NotFound
from core.jobs.sessions import ReadSession, WriteSession
from core.jobs.tables import Checkpoint, CheckpointFile


def get(session: ReadSession, owner: str, checkpoint_id: str) -> Checkpoint:
    query = select(Checkpoint).where(Checkpoint.id == checkpoint_id, Checkpoint.owner == owner)
    found = session.scalar(query.where(Checkpoint.state != "deleted"))
    if found is None:
        raise NotFound("no such checkpoint", where=checkpoint_id)
    return found


def lock(session: WriteSession, owner: str, checkpoint_id: str) -> Checkpoint:
    """The row, locked, so that a job cannot begin on a checkpoint that is being deleted."""
    get(session, owner, checkpoint_id)
    query = select(Checkpoint).where(Checkpoint.id == checkpoint_id).with_for_update()
    found = session.scalars(query.execution_options(populate_existing=True)).one()
    if found.state == "deleted":
        raise NotFound("no such checkpoint", where=checkpoint_id)
    return found


def page(session: ReadSession, owner: str, before: str | None, limit: int) -> list[Checkpoint]:
    query = select(Checkpoint).where(Checkpoint.owner == owner, Checkpoint.state != "deleted")
    if before is not None:
        query = query.where(Checkpoint.id < before)
    return list(session.scalars(query.order_by(Checkpoint.id.desc()).limit(limit)))


def files(session: ReadSession, checkpoint_id: str) -> list[CheckpointFile]:
    query = select(CheckpointFile).where(CheckpointFile.checkpoint_id == checkpoint_id)
    return list(session.scalars(query.order_by(CheckpointFile.path)))


def put_fetched(session: WriteSession, checkpoint_id: str, sha256: str, files: list[dict[str, Any]]) -> None:
    """What a fetch step found: files with digests and keys. A checkpoint that has a digest keeps it."""
    done = session.execute(
        update(Checkpoint)
        .where(Checkpoint.id == checkpoint_id, Checkpoint.sha256.is_(None))
        .values(
            sha256=sha256,
            # A size that is known stays: it decides the number of shards, and equal jobs shall share their steps.
            size_bytes=func.coalesce(Checkpoint.size_bytes, sum(int(entry["size"]) for entry in files)),
            state=func.replace(Checkpoint.state, "pending", "ready"),
        )
        .execution_options(synchronize_session=False)
    )
    if int(done.rowcount) != 1:  # type: ignore[attr-defined]
        return
    session.execute(delete(CheckpointFile).where(CheckpointFile.checkpoint_id == checkpoint_id))
    session.add_all(
        CheckpointFile(checkpoint_id=checkpoint_id, **{name: entry[name] for name in ("path", "size", "sha256", "key")})
        for entry in files
    )


def put_inspection(session: WriteSession, checkpoint_id: str, inspection: dict[str, Any]) -> None:
    session.execute(update(Checkpoint).where(Checkpoint.id == checkpoint_id).values(inspection=inspection))


def totals(session: ReadSession, owner: str) -> tuple[int, int]:
    """(number, bytes) of the owner's checkpoints."""
    query = select(func.count(), func.coalesce(func.sum(Checkpoint.size_bytes), 0))
    row = session.execute(query.where(Checkpoint.owner == owner, Checkpoint.state != "deleted")).one()
    return int(row[0]), int(row[1] or 0)
