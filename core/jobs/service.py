"""What an owner can do with jobs: submit, look, cancel, retry. One transaction per call, committed when it returns.

Every call names the owner and sees nothing of others: what is not the owner's is `NotFound`. Shapes are those of the
contract (`core.jobs.views`). Recipes arrive in the canonical form of `core.recipe`; no step is executed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement
from sqlalchemy.exc import IntegrityError

from core.clock import now
from core.errors import Conflict, IdempotencyMismatch, QuotaExceeded
from core.ids import new_id
from core.jobs import events, graph, lifecycle
from core.jobs.change import Change, Unit
from core.jobs.pages import decode_cursor, encode_cursor
from core.jobs.picture import pictures
from core.jobs.repository import checkpoints as checkpoint_rows
from core.jobs.repository import jobs as job_rows
from core.jobs.repository import quotas
from core.jobs.repository import steps as step_rows
from core.jobs.repository import uploads as upload_rows
from core.jobs.repository import webhooks as webhook_rows
from core.jobs.requests import SubmitJob
from core.jobs.sessions import ReadSession, WriteSession, reading
from core.jobs.states import JOB
from core.jobs.tables import Artefact, Checkpoint, Job, Step, StepDependency
from core.jobs.views import ArtefactView, EventView, JobStatus, JobView, Page, TensorView, Usage

MAX_PAGE = 200


@dataclass(frozen=True)
class Submitted:
    """`created` is False when the idempotency key had made this job before."""

    job: JobView
    created: bool


class JobService(Unit):
    """Jobs, for their owners."""

    def submit(
        self, owner: str, request: SubmitJob, idempotency_key: str | None = None, body_hash: str = ""
    ) -> Submitted:
        """A new job, or the one that this key has made; IdempotencyMismatch when its body was another."""
        return self._create(owner, request, idempotency_key, body_hash, retry_of=None)

    def retry(self, owner: str, job_id: str, idempotency_key: str | None = None, body_hash: str = "") -> Submitted:
        """A new job with the same recipe; whatever the old one finished is reused. Conflict unless it ended badly.

        It names the same webhook, unless that was deleted or disabled since.
        """
        with reading(self.engine) as session:
            old = job_rows.get(session, owner, job_id)
            webhook = webhook_rows.still_there(session, owner, old.webhook_id)
        if old.status not in ("failed", "cancelled", "expired"):
            raise Conflict(
                f"the job is {old.status}", where=job_id, hint="failed, cancelled and expired jobs are retried"
            )
        request = SubmitJob(
            checkpoint=old.checkpoint_id,
            recipe=old.recipe,
            name=old.name,
            labels=old.labels,
            webhook=webhook,
            max_pending_s=old.max_pending_s,
            max_runtime_s=old.max_runtime_s,
        )
        return self._create(owner, request, idempotency_key, body_hash, retry_of=job_id)

    def plan(self, owner: str, request: SubmitJob) -> JobView:
        """A job that ends with its allocation, from sensitivities that are stored; not listed among the jobs.

        Conflict, naming what is missing, when a pass over data would be needed.
        """
        with self.change() as change:
            job = _insert(change, owner, request, purpose="plan")
            lifecycle.advance(change, job)
            change.session.flush()
            steps = step_rows.of_job(change.session, job.id)
            missing = [step.kind for step in steps if step.kind == "calibrate" and step.state != "reused"]
            if missing:
                raise Conflict(
                    "no stored sensitivities for this checkpoint and calibration",
                    where=request.checkpoint,
                    hint="run one job with this calibration first; its estimate is then shared",
                    errors=({"path": "calibration", "message": "step calibrate has not been done"},),
                )
        return self.get(owner, job.id)

    def get(self, owner: str, job_id: str) -> JobView:
        with reading(self.engine) as session:
            return self._view(session, job_rows.get(session, owner, job_id))

    def list(
        self,
        owner: str,
        *,
        status: JobStatus | None = None,
        checkpoint: str | None = None,
        label: str | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> Page[JobView]:
        """Jobs, newest first. `label`: `key` or `key=value`."""
        filters: list[ColumnElement[bool]] = []
        if status is not None:
            filters.append(Job.status == status)
        if checkpoint is not None:
            filters.append(Job.checkpoint_id == checkpoint)
        if label is not None:
            filters.append(job_rows.has_label(label))
        limit = max(1, min(limit, MAX_PAGE))
        with reading(self.engine) as session:
            found = job_rows.page(session, owner, filters, decode_cursor(cursor), limit + 1)
            views = pictures(session, found[:limit], now())
        more = len(found) > limit
        return Page[JobView](items=tuple(views), next_cursor=encode_cursor(views[-1].id) if more else None)

    def cancel(self, owner: str, job_id: str) -> JobView:
        """Stop the job as soon as its running steps hear of it. Once is like twice; Conflict when it has ended."""
        with self.change() as change:
            job = job_rows.lock_owned(change.session, owner, job_id)
            if job.status not in ("cancelling", "cancelled"):
                if job.status in JOB.terminal:
                    raise Conflict(f"the job is {job.status} already", where=job_id)
                lifecycle.request_cancel(change, job)
        return self.get(owner, job_id)

    def events(self, owner: str, job_id: str, after: int = 0, limit: int = 500) -> tuple[EventView, ...]:
        """The job's events with a number above `after`."""
        with reading(self.engine) as session:
            job_rows.get(session, owner, job_id)
            return tuple(events.after(session, job_id, after, limit))

    def tensors(self, owner: str, job_id: str) -> tuple[TensorView, ...]:
        """What became of each tensor, by name; empty until the first quantise step is done."""
        with reading(self.engine) as session:
            job_rows.get(session, owner, job_id)
            return tuple(
                TensorView.model_validate(row, from_attributes=True) for row in job_rows.tensors(session, job_id)
            )

    def artefacts(self, owner: str, job_id: str) -> tuple[ArtefactView, ...]:
        """The files of the job's exports."""
        with reading(self.engine) as session:
            job_rows.get(session, owner, job_id)
            return tuple(_artefact(row) for row in job_rows.artefacts(session, job_id))

    def artefact(self, owner: str, artefact_id: str) -> ArtefactView:
        with reading(self.engine) as session:
            return _artefact(job_rows.artefact(session, owner, artefact_id))

    def allocation(self, owner: str, job_id: str) -> dict[str, Any] | None:
        """The output {"files", "values"} of the job's allocate step, None while it has not finished."""
        with reading(self.engine) as session:
            job_rows.get(session, owner, job_id)
            return step_rows.output(session, job_id, "allocate")

    def usage(self, owner: str) -> Usage:
        with reading(self.engine) as session:
            counts = job_rows.counts(session, owner)
            checkpoints, checkpoint_bytes = checkpoint_rows.totals(session, owner)
            return Usage(
                queued_jobs=counts.get("queued", 0),
                running_jobs=counts.get("running", 0) + counts.get("cancelling", 0),
                checkpoints=checkpoints,
                checkpoint_bytes=checkpoint_bytes,
                artefact_bytes=job_rows.artefact_bytes(session, owner),
                upload_bytes=upload_rows.open_bytes(session, owner),
            )

    def _create(
        self, owner: str, request: SubmitJob, key: str | None, body_hash: str, retry_of: str | None
    ) -> Submitted:
        found = self._made_before(owner, key, body_hash)
        if found is None:
            try:
                with self.change() as change:
                    self._check_quota(change.session, owner)
                    job = _insert(change, owner, request, key=key, body_hash=body_hash, retry_of=retry_of)
                    lifecycle.advance(change, job)
                return Submitted(self.get(owner, job.id), created=True)
            except IntegrityError:  # another request with this key was faster
                found = self._made_before(owner, key, body_hash)
                if found is None:
                    raise
        return Submitted(found, created=False)

    def _made_before(self, owner: str, key: str | None, body_hash: str) -> JobView | None:
        if key is None:
            return None
        with reading(self.engine) as session:
            job = job_rows.by_idempotency_key(session, owner, key)
            if job is None:
                return None
            if job.body_hash != body_hash:
                raise IdempotencyMismatch("this Idempotency-Key was used with another body", where=key)
            return self._view(session, job)

    def _check_quota(self, session: WriteSession, owner: str) -> None:
        most = self.settings.max_queued_jobs
        quotas.hold(session, owner)
        if job_rows.count_live(session, owner) >= most:
            raise QuotaExceeded(f"{most} jobs are waiting or running", hint="wait for some to end, or cancel them")

    def _view(self, session: ReadSession, job: Job) -> JobView:
        return pictures(session, [job], now())[0]


def _insert(
    change: Change,
    owner: str,
    request: SubmitJob,
    *,
    purpose: graph.Purpose = "quantise",
    key: str | None = None,
    body_hash: str = "",
    retry_of: str | None = None,
) -> Job:
    """The rows of a new job, nothing of it ready yet."""
    checkpoint = checkpoint_rows.lock(change.session, owner, request.checkpoint)
    source = source_facts(change.session, checkpoint)
    specs = graph.build(request.recipe, source, change.settings.shard_bytes, purpose)
    job = Job(
        id=new_id("job"),
        owner=owner,
        purpose=purpose,
        name=request.name,
        labels=dict(request.labels),
        checkpoint_id=checkpoint.id,
        recipe=request.recipe,
        status="queued",
        max_pending_s=request.max_pending_s,
        max_runtime_s=request.max_runtime_s,
        idempotency_key=key,
        body_hash=body_hash,
        retry_of=retry_of,
        webhook_id=webhook_rows.usable(change.session, owner, request.webhook),
        event_seq=0,
    )
    change.session.add(job)
    change.session.flush()
    _insert_steps(change, job, specs)
    events.append(change.session, job, "job.queued")
    return job


def _insert_steps(change: Change, job: Job, specs: list[graph.StepSpec]) -> None:
    ids = [new_id("step") for _ in specs]
    for position, spec in enumerate(specs):
        change.session.add(
            Step(
                id=ids[position],
                job_id=job.id,
                position=position,
                kind=spec.kind,
                index=spec.index,
                count=spec.count,
                params=spec.params,
                seed=spec.seed,
                state="blocked",
            )
        )
    change.session.flush()
    change.session.add_all(
        StepDependency(step_id=ids[position], needs_id=ids[need])
        for position, spec in enumerate(specs)
        for need in spec.needs
    )


def source_facts(session: ReadSession, checkpoint: Checkpoint) -> graph.SourceFacts:
    """How the fetch step gets this checkpoint. Conflict when the checkpoint cannot be used."""
    if checkpoint.state == "failed":
        raise Conflict("the checkpoint could not be read", where=checkpoint.id, hint="register it again")
    size = checkpoint.size_bytes
    if checkpoint.source.get("kind") == "upload":
        files = checkpoint_rows.files(session, checkpoint.id)
        listed = [{"path": f.path, "size": f.size, "sha256": f.sha256, "key": f.key} for f in files]
        return graph.SourceFacts({"files": listed}, size)
    return graph.SourceFacts({"source": checkpoint.source, "checkpoint": checkpoint.id}, size)


def _artefact(row: Artefact) -> ArtefactView:
    return ArtefactView(
        id=row.id,
        job=row.job_id,
        export=row.export,
        path=row.path,
        sha256=row.sha256,
        size=row.size,
        created_at=row.created_at,
        key=row.key,
    )
