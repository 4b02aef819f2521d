"""Numbers of the whole queue, over all owners, for those who operate it. Reads only, and names nobody."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Engine, func, select

from core.jobs.repository import steps as step_rows
from core.jobs.sessions import ReadSession, reading
from core.jobs.tables import Artefact, Attempt, Job, Step, Worker


@dataclass(frozen=True)
class QueueMetrics:
    """One look at the queue. `attempts`: ended ones by (state, error code); `step_seconds`: (number, sum) by kind."""

    jobs: dict[str, int]
    queue_depth: dict[str, int]
    oldest_queued_s: float
    attempts: dict[tuple[str, str], int]
    step_seconds: dict[str, tuple[int, float]]
    artefact_bytes: int
    workers_alive: int


def measure(engine: Engine) -> QueueMetrics:
    """Read everything in one transaction."""
    with reading(engine) as session:
        return QueueMetrics(
            jobs=_jobs(session),
            queue_depth=step_rows.queue_depths(session),
            oldest_queued_s=_oldest_queued_s(session),
            attempts=_attempts(session),
            step_seconds=_step_seconds(session),
            artefact_bytes=int(session.scalar(select(func.coalesce(func.sum(Artefact.size), 0))) or 0),
            workers_alive=session.scalar(select(func.count()).where(Worker.state == "alive")) or 0,
        )


def _jobs(session: ReadSession) -> dict[str, int]:
    rows = session.execute(select(Job.status, func.count()).where(Job.purpose == "quantise").group_by(Job.status))
    return {status: int(count) for status, count in rows}


def _oldest_queued_s(session: ReadSession) -> float:
    age = func.extract("epoch", func.clock_timestamp() - func.min(Job.created_at))
    return max(0.0, float(session.scalar(select(age).where(Job.status == "queued")) or 0.0))


def _attempts(session: ReadSession) -> dict[tuple[str, str], int]:
    code = func.coalesce(Attempt.error_code, "")
    query = select(Attempt.state, code, func.count()).where(Attempt.state != "running")
    rows = session.execute(query.group_by(Attempt.state, code))
    return {(state, found): int(count) for state, found, count in rows}


def _step_seconds(session: ReadSession) -> dict[str, tuple[int, float]]:
    """How long successful attempts took, by kind of step."""
    seconds = func.sum(func.extract("epoch", Attempt.finished_at - Attempt.started_at))
    query = select(Step.kind, func.count(), seconds).join(Step, Step.id == Attempt.step_id)
    rows = session.execute(query.where(Attempt.state == "succeeded").group_by(Step.kind))
    return {kind: (int(count), float(total or 0.0)) for kind, count, total in rows}
