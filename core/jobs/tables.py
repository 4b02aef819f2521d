"""The tables, as SQLAlchemy maps them; what is impossible in the domain is impossible here.

CHECK constraints repeat `core.jobs.states`: running has started, terminal has finished, failed has a reason. A partial
unique index lets a step have one running attempt. Relationships are not mapped: every read says what it loads.
`migrations` holds the same tables; a test compares the two.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar, get_args

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    MetaData,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from core.jobs.states import ATTEMPT, JOB, STEP, Machine
from core.jobs.steps import STEP_KINDS
from core.jobs.views import DeliveryKind, DeliveryState, WebhookKind

Json = dict[str, Any]


class Base(DeclarativeBase):
    """Names of constraints are fixed, so that migrations can drop them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: Text(),
        Json: JSONB(),
        list[Json]: JSONB(),
        list[int]: JSONB(),
        list[str]: ARRAY(Text()),
        datetime: DateTime(timezone=True),
    }


def _one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_known")


def _terminal_has_finished(column: str, machine: Machine) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in sorted(machine.terminal))
    return CheckConstraint(f"({column} IN ({listed})) = (finished_at IS NOT NULL)", name="terminal_has_finished")


def _created() -> Mapped[datetime]:
    return mapped_column(server_default=func.now())


class Checkpoint(Base):
    """A registered source model. A source by reference has no files before a fetch step has read it."""

    __tablename__ = "checkpoint"
    __table_args__ = (
        _one_of("state", ("pending", "ready", "failed", "deleted")),
        CheckConstraint("state <> 'ready' OR size_bytes IS NOT NULL", name="ready_has_size"),
        Index("ix_checkpoint_owner_id", "owner", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    name: Mapped[str]
    state: Mapped[str]
    source: Mapped[Json]
    sha256: Mapped[str | None]
    size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    inspection: Mapped[Json] = mapped_column(server_default=text("'{}'"))
    created_at: Mapped[datetime] = _created()


class CheckpointFile(Base):
    """A file of a checkpoint; sha256 and key are empty until a fetch step has stored it."""

    __tablename__ = "checkpoint_file"
    __table_args__ = (CheckConstraint("size >= 0", name="size_not_negative"),)

    checkpoint_id: Mapped[str] = mapped_column(ForeignKey("checkpoint.id", ondelete="CASCADE"), primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(server_default="")
    key: Mapped[str] = mapped_column(server_default="")


class Upload(Base):
    """A promise of files: `files` is [{path, size, sha256}] and never changes."""

    __tablename__ = "upload"
    __table_args__ = (
        _one_of("state", ("open", "complete", "aborted", "expired")),
        CheckConstraint("(state = 'complete') = (sha256 IS NOT NULL)", name="complete_has_digest"),
        Index("ix_upload_owner_id", "owner", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    state: Mapped[str]
    files: Mapped[list[Json]]
    part_size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str | None]
    inspection: Mapped[Json] = mapped_column(server_default=text("'{}'"))
    created_at: Mapped[datetime] = _created()
    expires_at: Mapped[datetime]


class UploadPart(Base):
    """A part that has arrived."""

    __tablename__ = "upload_part"

    upload_id: Mapped[str] = mapped_column(ForeignKey("upload.id", ondelete="CASCADE"), primary_key=True)
    file_no: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    key: Mapped[str]
    arrived_at: Mapped[datetime] = _created()


class Job(Base):
    """A recipe applied to a checkpoint. `event_seq` is the number of its last event, taken under this row's lock."""

    __tablename__ = "job"
    __table_args__ = (
        _one_of("status", JOB.states),
        _one_of("purpose", ("quantise", "plan")),
        _terminal_has_finished("status", JOB),
        CheckConstraint("status <> 'running' OR started_at IS NOT NULL", name="running_has_started"),
        CheckConstraint("status <> 'queued' OR started_at IS NULL", name="queued_has_not_started"),
        CheckConstraint("(status = 'failed') = (error_code IS NOT NULL)", name="failed_has_code"),
        CheckConstraint("(error_code IS NULL) = (failure IS NULL)", name="code_has_failure"),
        UniqueConstraint("owner", "idempotency_key"),
        ForeignKeyConstraint(["owner", "webhook_id"], ["webhook.owner", "webhook.id"], name="fk_job_webhook_of_owner"),
        Index("ix_job_owner_id", "owner", "id"),
        Index("ix_job_live", "status", postgresql_where=text("status IN ('queued', 'running', 'cancelling')")),
        Index("ix_job_checkpoint_id", "checkpoint_id"),
        Index("ix_job_labels", "labels", postgresql_using="gin"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    purpose: Mapped[str] = mapped_column(server_default="quantise")
    name: Mapped[str]
    labels: Mapped[Json]
    checkpoint_id: Mapped[str] = mapped_column(ForeignKey("checkpoint.id"))
    recipe: Mapped[Json]
    status: Mapped[str]
    max_pending_s: Mapped[float | None]
    max_runtime_s: Mapped[float | None]
    idempotency_key: Mapped[str | None]
    body_hash: Mapped[str] = mapped_column(server_default="")
    retry_of: Mapped[str | None] = mapped_column(ForeignKey("job.id"))
    webhook_id: Mapped[str | None]
    event_seq: Mapped[int] = mapped_column(BigInteger, server_default="0")
    summary: Mapped[Json | None]
    failure: Mapped[Json | None]
    error_code: Mapped[str | None]
    created_at: Mapped[datetime] = _created()
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Step(Base):
    """One unit of a job's work. `position` orders the steps of a job; `not_before` holds a retry back."""

    __tablename__ = "step"
    __table_args__ = (
        _one_of("state", STEP.states),
        _one_of("kind", STEP_KINDS),
        _terminal_has_finished("state", STEP),
        CheckConstraint("(state = 'running') = (attempt_id IS NOT NULL)", name="running_has_attempt"),
        CheckConstraint("state <> 'running' OR started_at IS NOT NULL", name="running_has_started"),
        CheckConstraint("state NOT IN ('succeeded', 'reused') OR output IS NOT NULL", name="done_has_output"),
        CheckConstraint("(output IS NULL) = (output_hash IS NULL)", name="output_has_hash"),
        CheckConstraint("state NOT IN ('ready', 'running') OR input_hash IS NOT NULL", name="ready_has_input_hash"),
        CheckConstraint("(state = 'reused') = (reused_from IS NOT NULL)", name="reused_has_origin"),
        CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name="failed_has_error"),
        CheckConstraint("index >= 0 AND index < count", name="shard_in_range"),
        CheckConstraint("charged >= 0", name="charged_not_negative"),
        UniqueConstraint("job_id", "kind", "index"),
        Index("ix_step_ready", "dispatched_at", postgresql_where=text("state = 'ready'")),
        Index("ix_step_input_hash", "input_hash", postgresql_where=text("state IN ('ready', 'running', 'succeeded')")),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    position: Mapped[int]
    kind: Mapped[str]
    index: Mapped[int]
    count: Mapped[int]
    state: Mapped[str]
    params: Mapped[Json]
    seed: Mapped[int] = mapped_column(BigInteger)
    charged: Mapped[int] = mapped_column(server_default="0")
    attempt_id: Mapped[str | None]  # of the running attempt
    input_hash: Mapped[str | None]
    output: Mapped[Json | None]
    output_hash: Mapped[str | None]
    reused_from: Mapped[str | None]
    error: Mapped[Json | None]
    queue: Mapped[str] = mapped_column(server_default="cpu")
    not_before: Mapped[datetime | None]
    dispatched_at: Mapped[datetime | None]
    dispatches: Mapped[int] = mapped_column(server_default="0")
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class StepDependency(Base):
    """`step_id` waits for `needs_id`."""

    __tablename__ = "step_dependency"
    __table_args__ = (Index("ix_step_dependency_needs_id", "needs_id"),)

    step_id: Mapped[str] = mapped_column(ForeignKey("step.id", ondelete="CASCADE"), primary_key=True)
    needs_id: Mapped[str] = mapped_column(ForeignKey("step.id", ondelete="CASCADE"), primary_key=True)


class Attempt(Base):
    """One execution of a step by one worker, under a lease that ends by the database's clock."""

    __tablename__ = "attempt"
    __table_args__ = (
        _one_of("state", ATTEMPT.states),
        _terminal_has_finished("state", ATTEMPT),
        CheckConstraint("state NOT IN ('failed', 'lost') OR error_code IS NOT NULL", name="failed_has_code"),
        CheckConstraint("progress >= 0 AND progress <= 1", name="progress_in_range"),
        UniqueConstraint("step_id", "number"),
        Index("uq_attempt_running", "step_id", unique=True, postgresql_where=text("state = 'running'")),
        Index("ix_attempt_lease", "lease_expires_at", postgresql_where=text("state = 'running'")),
        Index("ix_attempt_job_id", "job_id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    step_id: Mapped[str] = mapped_column(ForeignKey("step.id", ondelete="CASCADE"))
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    number: Mapped[int]
    worker_id: Mapped[str]
    state: Mapped[str]
    charged: Mapped[bool] = mapped_column(server_default=text("false"))
    progress: Mapped[float] = mapped_column(server_default="0")
    reported: Mapped[float] = mapped_column(server_default="0")  # the progress of the last step.progress event
    message: Mapped[str] = mapped_column(server_default="")
    error: Mapped[Json | None]
    error_code: Mapped[str | None]
    error_class: Mapped[str | None]
    started_at: Mapped[datetime] = _created()
    heartbeat_at: Mapped[datetime] = _created()
    lease_expires_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]


class AttemptLog(Base):
    """A line that the engine logged."""

    __tablename__ = "attempt_log"
    __table_args__ = (Index("ix_attempt_log_attempt_id_id", "attempt_id", "id"),)

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=True)
    attempt_id: Mapped[str] = mapped_column(ForeignKey("attempt.id", ondelete="CASCADE"))
    at: Mapped[datetime] = _created()
    event: Mapped[str]
    fields: Mapped[Json]


class Event(Base):
    """A numbered fact about a job, written in the transaction of the change that it tells of."""

    __tablename__ = "event"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    kind: Mapped[str]
    step_id: Mapped[str | None]
    attempt_id: Mapped[str | None]
    data: Mapped[Json] = mapped_column(server_default=text("'{}'"))


class Artefact(Base):
    """A file of an export; the row is what publishes it."""

    __tablename__ = "artefact"
    __table_args__ = (
        UniqueConstraint("job_id", "export", "path"),
        CheckConstraint("size >= 0", name="size_not_negative"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    export: Mapped[str]
    path: Mapped[str]
    key: Mapped[str]
    sha256: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = _created()


class Metric(Base):
    """A number that a step of a job measured."""

    __tablename__ = "metric"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]


class TensorResult(Base):
    """What became of one tensor of a job."""

    __tablename__ = "tensor_result"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    shape: Mapped[list[int]]
    format: Mapped[str]
    bits: Mapped[float]
    relative_rms_error: Mapped[float | None]
    fisher_mean: Mapped[float | None]
    predicted_kl: Mapped[float | None]


class Worker(Base):
    """A worker process as it last reported itself."""

    __tablename__ = "worker"
    __table_args__ = (_one_of("state", ("alive", "gone")),)

    id: Mapped[str] = mapped_column(primary_key=True)
    hostname: Mapped[str]
    queues: Mapped[list[str]]
    device: Mapped[str]
    state: Mapped[str]
    started_at: Mapped[datetime] = _created()
    beat_at: Mapped[datetime] = _created()


class ApiKey(Base):
    """A key by the sha256 of its secret (256 random bits, so a fast hash is enough); the secret itself is not kept."""

    __tablename__ = "api_key"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    sha256: Mapped[str] = mapped_column(unique=True)
    prefix: Mapped[str]
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime] = _created()
    revoked_at: Mapped[datetime | None]


class Webhook(Base):
    """A receiver of events. One that is deleted stays, without its secret, for the jobs that name it."""

    __tablename__ = "webhook"
    __table_args__ = (
        _one_of("disabled_reason", ("gone", "failing", "deleted")),
        CheckConstraint("(disabled_at IS NULL) = (disabled_reason IS NULL)", name="disabled_has_reason"),
        CheckConstraint(
            "(disabled_reason IS NOT DISTINCT FROM 'deleted') = (secret = '')", name="deleted_has_no_secret"
        ),
        CheckConstraint(f"kinds <@ ARRAY{list(get_args(WebhookKind))!r}::text[]", name="kinds_known"),
        UniqueConstraint("owner", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    url: Mapped[str]
    kinds: Mapped[list[str]]
    secret: Mapped[str]
    created_at: Mapped[datetime] = _created()
    failing_since: Mapped[datetime | None]  # the first failed attempt after the last successful one
    disabled_at: Mapped[datetime | None]
    disabled_reason: Mapped[str | None]


class WebhookDelivery(Base):
    """A message to a webhook, its body exactly as it is sent. `next_at` is also the end of the lease of an attempt."""

    __tablename__ = "webhook_delivery"
    __table_args__ = (
        _one_of("state", get_args(DeliveryState)),
        _one_of("kind", get_args(DeliveryKind)),
        CheckConstraint("(kind = 'ping') = (job_id IS NULL)", name="ping_has_no_job"),
        CheckConstraint("(job_id IS NULL) = (event_seq IS NULL)", name="job_has_event"),
        CheckConstraint("(state = 'pending') = (next_at IS NOT NULL)", name="pending_has_next"),
        CheckConstraint("(state = 'delivered') = (delivered_at IS NOT NULL)", name="delivered_has_time"),
        CheckConstraint(
            "state <> 'delivered' OR (last_status BETWEEN 200 AND 299) IS TRUE", name="delivered_was_accepted"
        ),
        CheckConstraint("state <> 'failed' OR last_error IS NOT NULL", name="failed_has_error"),
        CheckConstraint("attempts >= 0", name="attempts_not_negative"),
        CheckConstraint("(attempts = 0) = (attempted_at IS NULL)", name="attempted_has_time"),
        UniqueConstraint("job_id", "event_seq", "webhook_id"),
        Index("ix_webhook_delivery_webhook_id_id", "webhook_id", "id"),
        Index("ix_webhook_delivery_due", "next_at", "webhook_id", postgresql_where=text("state = 'pending'")),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhook.id", ondelete="CASCADE"))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    event_seq: Mapped[int | None] = mapped_column(BigInteger)
    kind: Mapped[str]
    body: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="pending")
    attempts: Mapped[int] = mapped_column(server_default="0")
    next_at: Mapped[datetime | None]
    attempted_at: Mapped[datetime | None]
    last_status: Mapped[int | None]
    last_error: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())
    delivered_at: Mapped[datetime | None]


class Idempotency(Base):
    """The answer to a POST that created something; `answer` is null while the first request is in flight."""

    __tablename__ = "idempotency"

    owner: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_hash: Mapped[str]
    answer: Mapped[Json | None]
    created_at: Mapped[datetime] = _created()
