"""What the services answer: immutable pictures of rows, shaped exactly as the public contract's JSON.

Every view is a frozen pydantic model, so that HTTP can use it as a response schema and tests can compare it as a value.
`to_json()` is the wire form. Nothing here reads or writes anything.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelling", "cancelled", "expired"]
StepStatus = Literal["blocked", "ready", "running", "succeeded", "failed", "cancelled", "reused"]
StepKindName = Literal["fetch", "calibrate", "allocate", "quantise", "assemble", "evaluate", "export"]
UploadState = Literal["open", "complete", "aborted", "expired"]
CheckpointState = Literal["pending", "ready", "failed", "deleted"]
Scope = Literal["read", "write", "admin"]
WebhookKind = Literal["job.started", "job.succeeded", "job.failed", "job.cancelled", "job.expired"]
DeliveryKind = Literal["job.started", "job.succeeded", "job.failed", "job.cancelled", "job.expired", "ping"]
DeliveryState = Literal["pending", "delivered", "failed"]
DisabledReason = Literal["gone", "failing"]

T = TypeVar("T")


class View(BaseModel):
    """An immutable answer."""

    model_config = ConfigDict(frozen=True)

    def to_json(self) -> dict[str, Any]:
        """The wire form: plain JSON values, times in RFC 3339."""
        return self.model_dump(mode="json")


class Page(View, Generic[T]):
    """One page of a keyset listing, newest first; `next_cursor` is None on the last one."""

    items: tuple[T, ...]
    next_cursor: str | None = None


class StepView(View):
    """One step of a job. `attempts` counts those that are charged against the limit; `progress` is 0..1."""

    id: str
    kind: StepKindName
    index: int
    status: StepStatus
    progress: float
    attempts: int
    message: str = ""
    started_at: datetime | None = None
    finished_at: datetime | None = None


class Summary(View):
    """The numbers of a finished job; None where the recipe did not ask for them or they are not known yet."""

    bits_per_param: float | None = None
    size_bytes: int | None = None
    kl_mean: float | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    predicted_kl: float | None = None


class FailureView(View):
    """Why a job failed; `step` is the kind of the step, `tensor` is there when one tensor is to blame."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, serialize_by_alias=True)

    code: str
    kind: str = Field(alias="class")
    retryable: bool
    step: str
    tensor: str | None = None
    where: str = ""
    detail: str
    hint: str = ""


class Limits(View):
    """How long a job may wait and how long it may run, in seconds; None: no limit."""

    max_pending_s: float | None = Field(default=None, gt=0)
    max_runtime_s: float | None = Field(default=None, gt=0)


class JobView(View):
    """The contract's job."""

    id: str
    status: JobStatus
    name: str
    labels: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    recipe: dict[str, Any]
    checkpoint: str
    limits: Limits
    webhook: str | None
    retry_of: str | None
    steps: tuple[StepView, ...]
    progress: float
    eta_s: float | None
    summary: Summary | None
    failure: FailureView | None


class EventView(View):
    """A numbered fact about a job; `seq` starts at 1 and has no gaps."""

    seq: int
    kind: str
    at: datetime
    job: str
    step: str | None = None
    step_kind: str | None = None
    step_index: int | None = None
    attempt: str | None = None
    data: dict[str, Any] = Field(default_factory=dict)


class ArtefactView(View):
    """A file of a job's export. `key` is its name in the object store and not for clients."""

    id: str
    job: str
    export: str
    path: str
    sha256: str
    size: int
    created_at: datetime
    key: str = Field(exclude=True)


class TensorView(View):
    """What became of one tensor: `predicted_kl` is its predicted share of the KL divergence (nats per token)."""

    name: str
    shape: tuple[int, ...]
    format: str
    bits: float
    relative_rms_error: float | None
    fisher_mean: float | None
    predicted_kl: float | None


class CheckpointFileView(View):
    """A file of a checkpoint; `sha256` is empty until the fetch step has read a source that came without one."""

    path: str
    size: int
    sha256: str = ""
    key: str = Field(default="", exclude=True)


class CheckpointView(View):
    """A registered source model. `inspection` is the storage room's JSON, {} while the source is pending."""

    id: str
    name: str
    state: CheckpointState
    source: dict[str, Any]
    sha256: str | None
    size_bytes: int | None
    created_at: datetime
    files: tuple[CheckpointFileView, ...]
    inspection: dict[str, Any]


class UploadFileView(View):
    """A file as promised when the upload was created; `file` numbers them from 0."""

    file: int
    path: str
    size: int
    sha256: str


class UploadPartView(View):
    """One part: numbers start at 1; `arrived` tells a resuming client what it need not send again."""

    file: int
    number: int
    size: int
    arrived: bool
    sha256: str | None = None


class UploadView(View):
    """An upload and the state of all its parts."""

    id: str
    state: UploadState
    part_size: int
    files: tuple[UploadFileView, ...]
    parts: tuple[UploadPartView, ...]
    created_at: datetime
    expires_at: datetime
    sha256: str | None = None


class WorkerView(View):
    """A worker process as it last reported itself."""

    id: str
    hostname: str
    queues: tuple[str, ...]
    device: str
    started_at: datetime
    beat_at: datetime
    state: Literal["alive", "gone"]
    step: str | None = None


class KeyView(View):
    """An API key without its secret."""

    id: str
    owner: str
    prefix: str
    scopes: tuple[Scope, ...]
    created_at: datetime
    revoked_at: datetime | None = None


class WebhookView(View):
    """A receiver of events, without its secret. `failing_since`: the first failure that no success has followed."""

    id: str
    url: str
    kinds: tuple[WebhookKind, ...]
    created_at: datetime
    failing_since: datetime | None = None
    disabled_at: datetime | None = None
    disabled_reason: DisabledReason | None = None


class DeliveryView(View):
    """A message to a webhook; `id` is its `webhook-id`. `next_at`: when it is tried (again), None when it has ended."""

    id: str
    webhook: str
    kind: DeliveryKind
    job: str | None
    event: int | None
    state: DeliveryState
    attempts: int
    created_at: datetime
    attempted_at: datetime | None
    next_at: datetime | None
    delivered_at: datetime | None
    last_status: int | None
    last_error: str | None


class Usage(View):
    """What an owner holds."""

    queued_jobs: int
    running_jobs: int
    checkpoints: int
    checkpoint_bytes: int
    artefact_bytes: int
    upload_bytes: int
