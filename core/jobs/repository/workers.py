"""SQL of the register of workers."""

from __future__ import annotations

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert

from core.jobs.sessions import ReadSession, WriteSession
from core.jobs.tables import Attempt, Worker


def put(session: WriteSession, worker_id: str, hostname: str, queues: list[str], device: str) -> None:
    """Register a worker, or register it again."""
    values = {"hostname": hostname, "queues": queues, "device": device, "state": "alive"}
    statement = insert(Worker).values(id=worker_id, **values)
    session.execute(
        statement.on_conflict_do_update(index_elements=[Worker.id], set_={**values, "beat_at": func.clock_timestamp()})
    )


def beat(session: WriteSession, worker_id: str) -> bool:
    done = session.execute(
        update(Worker).where(Worker.id == worker_id).values(beat_at=func.clock_timestamp(), state="alive")
    )
    return int(done.rowcount) == 1  # type: ignore[attr-defined]


def leave(session: WriteSession, worker_id: str) -> None:
    session.execute(update(Worker).where(Worker.id == worker_id).values(state="gone"))


def leave_silent(session: WriteSession, silent_s: float) -> int:
    """Mark the workers that have not been heard for that long; how many."""
    limit = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, silent_s)
    done = session.execute(update(Worker).where(Worker.state == "alive", Worker.beat_at < limit).values(state="gone"))
    return int(done.rowcount)  # type: ignore[attr-defined]


def gpu_alive(session: ReadSession) -> bool:
    """Whether a worker that owns a GPU takes steps from the queue `gpu`."""
    query = select(Worker.id).where(
        Worker.state == "alive", Worker.device.like("cuda%"), Worker.queues.contains(["gpu"])
    )
    return session.scalar(query.limit(1)) is not None


def listed(session: ReadSession) -> list[tuple[Worker, str | None]]:
    """Living workers and those that left within an hour, each with the step that it executes."""
    recent = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 1)
    query = (
        select(Worker, func.min(Attempt.step_id))
        .outerjoin(Attempt, (Attempt.worker_id == Worker.id) & (Attempt.state == "running"))
        .where((Worker.state == "alive") | (Worker.beat_at > recent))
        .group_by(Worker.id)
        .order_by(Worker.id)
    )
    return [(worker, step) for worker, step in session.execute(query)]
