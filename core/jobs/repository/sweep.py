"""SQL of the sweeper: which objects rows speak for, and the removal of rows that are too old.

"Speaks for" has two forms. A row may name a key (`named_*`), or be about to: work that is not done protects all that
lies under its input hash, its upload or its attempt (`at_work_*`). Both see the database as it is when they are asked.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, DateTime, cast, delete, func, or_, select, text, update
from sqlalchemy.dialects.postgresql import JSONPATH
from sqlalchemy.exc import OperationalError

from core.jobs.sessions import ReadSession, WriteSession
from core.jobs.states import DONE_STEPS, JOB, STEP
from core.jobs.tables import (
    Artefact,
    Attempt,
    AttemptLog,
    Checkpoint,
    CheckpointFile,
    Event,
    Idempotency,
    Job,
    Step,
    Upload,
)

_LOCK_NOT_AVAILABLE = "55P03"
_DAY_S = 86_400.0


def _ago(days: float) -> ColumnElement[datetime]:
    return func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, days * _DAY_S)


def clock(session: ReadSession) -> datetime:
    return session.scalars(select(func.clock_timestamp(type_=DateTime(timezone=True)))).one()


def freeze(session: WriteSession, wait_ms: int) -> bool:
    """Until the transaction ends no job, step, upload or checkpoint begins, ends or changes; False when too much does.

    Everybody who changes one of them locks or inserts such a row first, and waits for the end of this transaction.
    Reads and heartbeats go on. Waiting at most `wait_ms` (milliseconds) for those that are at it, this cannot be a part
    of a deadlock.
    """
    try:
        with session.begin_nested():
            session.execute(text(f"SET LOCAL lock_timeout = {int(wait_ms)}"))
            session.execute(text("LOCK TABLE checkpoint, upload, job IN EXCLUSIVE MODE"))
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
            raise
        return False
    return True


def named_artefacts(session: ReadSession, keys: Collection[str]) -> set[str]:
    """Those of the keys that an artefact was published under."""
    return set(session.scalars(select(Artefact.key).where(Artefact.key.in_(keys))))


def named_results(session: ReadSession, input_hashes: Collection[str], days: float) -> set[str]:
    """All keys in the outputs of that work, as far as a living job has them or they are younger than `days`."""
    kept = or_(Job.status.in_(JOB.live), Step.finished_at > _ago(days))
    query = _keys_in_outputs().where(Step.input_hash.in_(input_hashes), Step.state.in_(DONE_STEPS), kept)
    return set(session.scalars(query))


def named_fetched(session: ReadSession) -> set[str]:
    """All keys that the fetch steps of living jobs have brought."""
    return set(session.scalars(_keys_in_outputs().where(Step.kind == "fetch", Job.status.in_(JOB.live))))


def _keys_in_outputs() -> Any:
    found = func.jsonb_path_query(Step.output, cast("$.**.key", JSONPATH)).op("#>>")(text("'{}'"))
    return select(found).select_from(Step).join(Job, Job.id == Step.job_id).where(Step.output.is_not(None))


def named_files(session: ReadSession, keys: Collection[str]) -> set[str]:
    """Those of the keys that are files of a checkpoint that is not deleted."""
    query = select(CheckpointFile.key).join(Checkpoint, Checkpoint.id == CheckpointFile.checkpoint_id)
    return set(session.scalars(query.where(Checkpoint.state != "deleted", CheckpointFile.key.in_(keys))))


def completed_uploads(session: ReadSession, digests: Collection[str]) -> set[str]:
    """Those checkpoint digests that a complete upload has: its owner may make a checkpoint of it at any time."""
    return {
        found for found in session.scalars(select(Upload.sha256).where(Upload.sha256.in_(digests))) if found is not None
    }


def open_uploads(session: ReadSession) -> list[Upload]:
    return list(session.scalars(select(Upload).where(Upload.state == "open")))


def at_work(session: ReadSession, input_hashes: Collection[str]) -> set[str]:
    """Those input hashes whose work a step may still do, or is doing."""
    live = STEP.live
    return set(session.scalars(select(Step.input_hash).where(Step.input_hash.in_(input_hashes), Step.state.in_(live))))


def fetching(session: ReadSession) -> bool:
    """Whether a step is bringing files whose names are not known before it ends."""
    query = select(Step.id).where(Step.kind == "fetch", Step.state == "running", Step.params.has_key("source"))
    return session.scalar(query.limit(1)) is not None


def running_attempts(session: ReadSession, attempt_ids: Collection[str]) -> set[str]:
    return set(session.scalars(select(Attempt.id).where(Attempt.id.in_(attempt_ids), Attempt.state == "running")))


def live_jobs(session: ReadSession, job_ids: Collection[str]) -> set[str]:
    return set(session.scalars(select(Job.id).where(Job.id.in_(job_ids), Job.status.in_(JOB.live))))


def expire_unused_uploads(session: WriteSession, days: float) -> int:
    """Expire complete uploads older than that of which there is no checkpoint (any more)."""
    used = select(Checkpoint.id).where(
        Checkpoint.source["upload"].astext == Upload.id,
        Checkpoint.source["kind"].astext == "upload",
        Checkpoint.state != "deleted",
    )
    return _count(
        session,
        update(Upload)
        .where(Upload.state == "complete", Upload.created_at < _ago(days), ~used.exists())
        .values(state="expired", sha256=None),
    )


def forget_answers(session: WriteSession, days: float) -> int:
    """Remove the answers that were remembered under idempotency keys longer ago than that."""
    return _count(session, delete(Idempotency).where(Idempotency.created_at < _ago(days)))


def forget_logs(session: WriteSession, days: float, limit: int) -> int:
    """Remove lines of the logs of attempts that ended longer ago than that, at most `limit`."""
    old = select(AttemptLog.id).join(Attempt, Attempt.id == AttemptLog.attempt_id)
    old = old.where(Attempt.finished_at < _ago(days)).limit(limit)
    return _count(session, delete(AttemptLog).where(AttemptLog.id.in_(old)))


def forget_step_events(session: WriteSession, days: float, limit: int) -> int:
    """Remove what jobs that ended longer ago than that told of their steps, of at most `limit` jobs; their own stay."""
    of_steps = or_(Event.kind.like("step.%"), Event.kind.like("attempt.%"))
    told = select(Event.job_id).where(Event.job_id == Job.id, of_steps)
    old = select(Job.id).where(Job.finished_at < _ago(days), told.exists()).limit(limit)
    return _count(session, delete(Event).where(Event.job_id.in_(old), of_steps))


def _count(session: WriteSession, statement: Any) -> int:
    done = session.execute(statement.execution_options(synchronize_session=False))
    return int(done.rowcount)  # type: ignore[attr-defined]
