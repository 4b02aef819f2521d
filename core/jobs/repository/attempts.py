"""SQL of attempts: every write is fenced, so that whoever lost its lease changes nothing.

`end` and `beat` name the attempt, its state and its lease in their WHERE; the answer is whether a row was changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, func, select, update

from core.errors import BitmillError
from core.jobs.sessions import ReadSession, WriteSession
from core.jobs.states import ATTEMPT, move
from core.jobs.tables import Attempt, AttemptLog, Job, Step

_MAX_MESSAGE = 500


def _seconds(value: float) -> ColumnElement[Any]:
    return func.make_interval(0, 0, 0, 0, 0, 0, value)


def begin(session: WriteSession, attempt_id: str, step: Step, worker_id: str, lease_s: float) -> None:
    """The running attempt of a step that was just claimed under this id."""
    number = session.scalar(select(func.count()).where(Attempt.step_id == step.id)) or 0
    attempt = Attempt(
        id=attempt_id,
        step_id=step.id,
        job_id=step.job_id,
        number=number + 1,
        worker_id=worker_id,
        state="running",
        lease_expires_at=func.clock_timestamp() + _seconds(lease_s),
    )
    session.add(attempt)
    session.flush()


def place(session: ReadSession, attempt_id: str) -> tuple[str, str] | None:
    """(job id, step id) of an attempt; they never change."""
    row = session.execute(select(Attempt.job_id, Attempt.step_id).where(Attempt.id == attempt_id)).first()
    return (row[0], row[1]) if row else None


def end(
    session: WriteSession,
    attempt_id: str,
    trigger: str,
    *,
    charged: bool,
    error: BitmillError | None = None,
    expired: bool = False,
) -> bool:
    """End a running attempt; False when it is not running any more or its lease has run out.

    `expired`: the reconciler's form, which ends only an attempt whose lease *has* run out.
    """
    lease = Attempt.lease_expires_at
    fence = lease <= func.clock_timestamp() if expired else lease > func.clock_timestamp()
    done = session.execute(
        update(Attempt)
        .where(Attempt.id == attempt_id, Attempt.state == "running", fence)
        .values(**_ending(trigger, charged, error))
        .execution_options(synchronize_session=False)
    )
    return int(done.rowcount) == 1  # type: ignore[attr-defined]


def end_all(session: WriteSession, job_id: str) -> int:
    """Cancel whatever of a job is running, whoever does it: the job is over."""
    done = session.execute(
        update(Attempt)
        .where(Attempt.job_id == job_id, Attempt.state == "running")
        .values(**_ending("cancel", False, None))
        .execution_options(synchronize_session=False)
    )
    return int(done.rowcount)  # type: ignore[attr-defined]


def _ending(trigger: str, charged: bool, error: BitmillError | None) -> dict[str, Any]:
    return {
        "state": move(ATTEMPT, "running", trigger),
        "finished_at": func.clock_timestamp(),
        "charged": charged,
        "error": None if error is None else error.to_dict(),
        "error_code": None if error is None else error.code,
        "error_class": None if error is None else str(error.kind),
    }


def beat(session: WriteSession, attempt_id: str, progress: float, message: str, lease_s: float) -> bool:
    """Renew the lease and write progress down; False when the lease is lost."""
    done = session.execute(
        update(Attempt)
        .where(Attempt.id == attempt_id, Attempt.state == "running", Attempt.lease_expires_at > func.clock_timestamp())
        .values(
            heartbeat_at=func.clock_timestamp(),
            lease_expires_at=func.clock_timestamp() + _seconds(lease_s),
            progress=func.greatest(Attempt.progress, min(max(progress, 0.0), 1.0)),
            message=message[:_MAX_MESSAGE],
        )
        .execution_options(synchronize_session=False)
    )
    return int(done.rowcount) == 1  # type: ignore[attr-defined]


def reported(session: ReadSession, attempt_id: str) -> float | None:
    """The progress that the last event told of, None for an attempt that is not running."""
    return session.scalar(select(Attempt.reported).where(Attempt.id == attempt_id, Attempt.state == "running"))


def mark_reported(session: WriteSession, attempt_id: str, progress: float) -> None:
    session.execute(
        update(Attempt)
        .where(Attempt.id == attempt_id, Attempt.state == "running")
        .values(reported=progress)
        .execution_options(synchronize_session=False)
    )


def job_status(session: ReadSession, attempt_id: str) -> str | None:
    return session.scalar(select(Job.status).join(Attempt, Attempt.job_id == Job.id).where(Attempt.id == attempt_id))


def same_class(session: ReadSession, step_id: str, error_class: str) -> int:
    """Charged attempts of a step that ended with an error of that class."""
    query = select(func.count()).where(Attempt.step_id == step_id, Attempt.charged, Attempt.error_class == error_class)
    return session.scalar(query) or 0


def lapsed(session: ReadSession, limit: int) -> list[str]:
    """Running attempts whose lease has run out, by the database's clock."""
    query = select(Attempt.id).where(Attempt.state == "running", Attempt.lease_expires_at <= func.clock_timestamp())
    return list(session.scalars(query.order_by(Attempt.lease_expires_at).limit(limit)))


def running_of_jobs(session: ReadSession, job_ids: Sequence[str]) -> dict[str, Attempt]:
    """The running attempts of those jobs by their steps' ids."""
    query = select(Attempt).where(Attempt.job_id.in_(job_ids), Attempt.state == "running")
    return {attempt.step_id: attempt for attempt in session.scalars(query)}


def add_log(session: WriteSession, attempt_id: str, lines: list[tuple[str, dict[str, Any]]]) -> None:
    session.add_all(AttemptLog(attempt_id=attempt_id, event=event, fields=fields) for event, fields in lines)
