"""SQL of jobs: locking, listing, and what a finished step adds to a job (metrics, tensors, artefacts)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import ColumnElement, delete, func, select, text
from sqlalchemy.dialects.postgresql import insert

from core.errors import NotFound
from core.ids import new_id
from core.jobs.sessions import ReadSession, WriteSession
from core.jobs.states import JOB
from core.jobs.tables import Artefact, Job, Metric, TensorResult


def lock(session: WriteSession, job_id: str) -> Job:
    """The job's row, locked: every change to a job, its steps or its attempts begins here."""
    job = session.scalar(
        select(Job).where(Job.id == job_id).with_for_update().execution_options(populate_existing=True)
    )
    if job is None:
        raise NotFound("no such job", where=job_id)
    return job


def lock_owned(session: WriteSession, owner: str, job_id: str) -> Job:
    """The same, for the job's owner only."""
    get(session, owner, job_id)
    return lock(session, job_id)


def get(session: ReadSession, owner: str, job_id: str) -> Job:
    job = session.scalar(select(Job).where(Job.id == job_id, Job.owner == owner))
    if job is None:
        raise NotFound("no such job", where=job_id)
    return job


def by_idempotency_key(session: ReadSession, owner: str, key: str) -> Job | None:
    return session.scalar(select(Job).where(Job.owner == owner, Job.idempotency_key == key))


def count_live(session: ReadSession, owner: str) -> int:
    """Jobs of the owner that have not ended."""
    return session.scalar(select(func.count()).where(Job.owner == owner, Job.status.in_(JOB.live))) or 0


def page(
    session: ReadSession, owner: str, filters: Iterable[ColumnElement[bool]], before: str | None, limit: int
) -> list[Job]:
    """The owner's jobs, newest first (ids are ordered by time), those before the id `before`."""
    query = select(Job).where(Job.owner == owner, Job.purpose == "quantise", *filters)
    if before is not None:
        query = query.where(Job.id < before)
    return list(session.scalars(query.order_by(Job.id.desc()).limit(limit)))


def has_label(label: str) -> ColumnElement[bool]:
    """Jobs with a label `key`, or with `key=value`."""
    key, equals, value = label.partition("=")
    return Job.labels.contains({key: value}) if equals else Job.labels.has_key(key)


def live_of_checkpoint(session: ReadSession, checkpoint_id: str) -> int:
    return session.scalar(select(func.count()).where(Job.checkpoint_id == checkpoint_id, Job.status.in_(JOB.live))) or 0


def pending_too_long(session: ReadSession, limit: int) -> list[str]:
    """Queued jobs whose waiting time is over, by the database's clock."""
    over = Job.created_at + func.make_interval(0, 0, 0, 0, 0, 0, Job.max_pending_s) < func.clock_timestamp()
    query = select(Job.id).where(Job.status == "queued", Job.max_pending_s.is_not(None), over)
    return list(session.scalars(query.order_by(Job.id).limit(limit)))


def running_too_long(session: ReadSession, limit: int) -> list[str]:
    """Running jobs whose running time is over, by the database's clock."""
    over = Job.started_at + func.make_interval(0, 0, 0, 0, 0, 0, Job.max_runtime_s) < func.clock_timestamp()
    query = select(Job.id).where(Job.status == "running", Job.max_runtime_s.is_not(None), over)
    return list(session.scalars(query.order_by(Job.id).limit(limit)))


def put_metrics(session: WriteSession, job_id: str, metrics: dict[str, float]) -> None:
    if not metrics:
        return
    rows = [{"job_id": job_id, "name": name, "value": value} for name, value in metrics.items()]
    statement = insert(Metric).values(rows)
    session.execute(
        statement.on_conflict_do_update(
            index_elements=[Metric.job_id, Metric.name], set_={"value": statement.excluded.value}
        )
    )


def put_tensors(session: WriteSession, job_id: str, tensors: list[dict[str, Any]]) -> None:
    """The per-tensor results of a quantise step; numbers it does not know are absent."""
    if not tensors:
        return
    session.execute(
        delete(TensorResult).where(
            TensorResult.job_id == job_id, TensorResult.name.in_([entry["name"] for entry in tensors])
        )
    )
    optional = ("relative_rms_error", "fisher_mean", "predicted_kl")
    session.add_all(
        TensorResult(
            job_id=job_id,
            name=entry["name"],
            shape=list(entry["shape"]),
            format=entry["format"],
            bits=float(entry["bits"]),
            **{name: entry.get(name) for name in optional},
        )
        for entry in tensors
    )


def tensors(session: ReadSession, job_id: str) -> list[TensorResult]:
    return list(session.scalars(select(TensorResult).where(TensorResult.job_id == job_id).order_by(TensorResult.name)))


def put_artefacts(session: WriteSession, job_id: str, export: str, files: list[dict[str, Any]]) -> None:
    """Publish the files of an export: from here on they are visible."""
    session.add_all(
        Artefact(
            id=new_id("artefact"),
            job_id=job_id,
            export=export,
            path=entry["path"],
            key=entry["key"],
            sha256=entry["sha256"],
            size=entry["size"],
        )
        for entry in files
    )


def artefacts(session: ReadSession, job_id: str) -> list[Artefact]:
    query = select(Artefact).where(Artefact.job_id == job_id).order_by(Artefact.export, Artefact.path)
    return list(session.scalars(query))


def artefact(session: ReadSession, owner: str, artefact_id: str) -> Artefact:
    query = select(Artefact).join(Job, Job.id == Artefact.job_id)
    found = session.scalar(query.where(Artefact.id == artefact_id, Job.owner == owner))
    if found is None:
        raise NotFound("no such artefact", where=artefact_id)
    return found


def artefact_bytes(session: ReadSession, owner: str) -> int:
    """Bytes of the owner's artefacts; an object that several jobs share counts once."""
    objects = (
        select(Artefact.key, Artefact.size)
        .join(Job, Job.id == Artefact.job_id)
        .where(Job.owner == owner)
        .distinct()
        .subquery()
    )
    return int(session.scalar(select(func.coalesce(func.sum(objects.c.size), text("0")))) or 0)


def counts(session: ReadSession, owner: str) -> dict[str, int]:
    """Number of the owner's jobs by status."""
    rows = session.execute(select(Job.status, func.count()).where(Job.owner == owner).group_by(Job.status))
    return {status: int(count) for status, count in rows}
