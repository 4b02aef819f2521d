"""SQL of steps: readiness, equal work, and which hints are due. Outputs are large: they are loaded only by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Select, func, or_, select, text, update
from sqlalchemy.orm import aliased, defer

from core.jobs.sessions import ReadSession, WriteSession
from core.jobs.states import DONE_STEPS, JOB, STEP, move
from core.jobs.tables import Job, Step, StepDependency

_MOST_DOUBLINGS = 5


def _lean() -> Select[Step]:
    return select(Step).options(defer(Step.output, raiseload=True)).execution_options(populate_existing=True)


def of_job(session: ReadSession, job_id: str) -> list[Step]:
    """The steps of a job in order, without their outputs."""
    return list(session.scalars(_lean().where(Step.job_id == job_id).order_by(Step.position)))


def of_jobs(session: ReadSession, job_ids: Sequence[str]) -> dict[str, list[Step]]:
    """The same for many jobs."""
    found: dict[str, list[Step]] = defaultdict(list)
    for step in session.scalars(_lean().where(Step.job_id.in_(job_ids)).order_by(Step.job_id, Step.position)):
        found[step.job_id].append(step)
    return found


def one(session: ReadSession, step_id: str) -> Step:
    """A step of a job that is locked, without its output."""
    return session.scalars(_lean().where(Step.id == step_id)).one()


def job_of(session: ReadSession, step_id: str) -> str | None:
    """The job of a step that is ready; None when there is nothing to claim."""
    return session.scalar(select(Step.job_id).where(Step.id == step_id, Step.state == "ready"))


def unblocked(session: ReadSession, job_id: str) -> list[Step]:
    """Blocked steps of the job all of whose dependencies are done, in order."""
    needed = aliased(Step)
    waits = (
        select(StepDependency.step_id)
        .join(needed, needed.id == StepDependency.needs_id)
        .where(StepDependency.step_id == Step.id, needed.state.not_in(DONE_STEPS))
    )
    query = _lean().where(Step.job_id == job_id, Step.state == "blocked", ~waits.exists())
    return list(session.scalars(query.order_by(Step.position)))


def input_hashes(session: ReadSession, step_id: str) -> list[str]:
    """The output hashes of the dependencies of a step, in order."""
    query = (
        select(Step.output_hash)
        .join(StepDependency, StepDependency.needs_id == Step.id)
        .where(StepDependency.step_id == step_id)
    )
    return [found for found in session.scalars(query.order_by(Step.position)) if found is not None]


def inputs(session: ReadSession, step_id: str) -> list[tuple[str, int, dict[str, Any]]]:
    """(kind, index, output) of the dependencies of a step, in order."""
    query = (
        select(Step.kind, Step.index, Step.output)
        .join(StepDependency, StepDependency.needs_id == Step.id)
        .where(StepDependency.step_id == step_id)
    )
    rows = session.execute(query.order_by(Step.position))
    return [(kind, index, output) for kind, index, output in rows if output is not None]


def output(session: ReadSession, job_id: str, kind: str, index: int = 0) -> dict[str, Any] | None:
    """What a step of the job answered, None when it has not."""
    return session.scalar(select(Step.output).where(Step.job_id == job_id, Step.kind == kind, Step.index == index))


def equal_outputs(session: ReadSession, input_hash: str) -> list[tuple[str, dict[str, Any], str]]:
    """(step id, output, output hash) of steps of any job that have done this very work, newest first."""
    query = select(Step.id, Step.output, Step.output_hash).where(
        Step.input_hash == input_hash, Step.state == "succeeded"
    )
    rows = session.execute(query.order_by(Step.finished_at.desc()).limit(3))
    return [(found, answer, name) for found, answer, name in rows if answer is not None and name is not None]


def equal_running(session: ReadSession, step: Step) -> bool:
    """Whether another step is doing this very work now."""
    query = select(Step.id).where(Step.input_hash == step.input_hash, Step.state == "running", Step.id != step.id)
    return session.scalar(query.limit(1)) is not None


def equal_ready(session: ReadSession, step: Step, limit: int = 100) -> list[tuple[str, str]]:
    """(id, queue) of ready steps of other jobs that wait for the very work of this one."""
    query = select(Step.id, Step.queue).where(Step.input_hash == step.input_hash, Step.state == "ready")
    rows = session.execute(query.where(Step.id != step.id).limit(limit))
    return [(found, queue) for found, queue in rows]


def lock_work(session: WriteSession, input_hash: str) -> None:
    """Hold the right to decide who does this work until the transaction ends."""
    session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": input_hash})


def claim(session: WriteSession, step_id: str, attempt_id: str) -> bool:
    """The compare-and-set: True for the one caller that turned `ready` into `running`."""
    done = session.execute(
        update(Step)
        .where(
            Step.id == step_id,
            Step.state == "ready",
            or_(Step.not_before.is_(None), Step.not_before <= func.clock_timestamp()),
        )
        .values(
            state=move(STEP, "ready", "claim"),
            attempt_id=attempt_id,
            started_at=func.coalesce(Step.started_at, func.clock_timestamp()),
            not_before=None,
        )
        .execution_options(synchronize_session=False)
    )
    return int(done.rowcount) == 1  # type: ignore[attr-defined]


def due_hints(session: ReadSession, delay_s: float, limit: int) -> list[tuple[str, str]]:
    """(step id, kind) of ready steps that no message may be on its way for: the delay doubles with every hint."""
    doublings = func.least(func.greatest(Step.dispatches - 1, 0), _MOST_DOUBLINGS)
    age = func.make_interval(0, 0, 0, 0, 0, 0, delay_s * func.power(2, doublings))
    query = (
        select(Step.id, Step.kind)
        .join(Job, Job.id == Step.job_id)
        .where(
            Step.state == "ready",
            Job.status.in_(JOB.live),
            or_(Step.not_before.is_(None), Step.not_before <= func.clock_timestamp()),
            or_(Step.dispatched_at.is_(None), Step.dispatched_at + age < func.clock_timestamp()),
        )
    )
    rows = session.execute(query.order_by(Step.dispatched_at.nulls_first(), Step.id).limit(limit))
    return [(found, kind) for found, kind in rows]


def mark_sent(session: WriteSession, step_ids: Iterable[str], queue: str) -> None:
    session.execute(
        update(Step)
        .where(Step.id.in_(list(step_ids)), Step.state == "ready")
        .values(dispatched_at=func.clock_timestamp(), dispatches=Step.dispatches + 1, queue=queue)
        .execution_options(synchronize_session=False)
    )


def mark_unsent(session: WriteSession, step_ids: Iterable[str]) -> None:
    """The broker did not take the hints: the reconciler shall send them at its next pass."""
    session.execute(
        update(Step)
        .where(Step.id.in_(list(step_ids)), Step.state == "ready")
        .values(dispatched_at=None)
        .execution_options(synchronize_session=False)
    )


def queue_depths(session: ReadSession) -> dict[str, int]:
    """Ready steps by queue."""
    rows = session.execute(select(Step.queue, func.count()).where(Step.state == "ready").group_by(Step.queue))
    return {queue: int(count) for queue, count in rows}
