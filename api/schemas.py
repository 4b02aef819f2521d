"""Bodies, queries and answers of HTTP, where they are not the services' own requests and views.

Bodies are frozen and refuse unknown keys, and text that no database or header could hold (NUL, lone surrogates,
numbers that JSON does not have) before anything is done with it.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Annotated, Any, Generic, Self, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from core.jobs.requests import (
    HubSource,
    Label,
    NewWebhook,
    PathSource,
    Request,
    S3Source,
    Source,
    UploadFile,
    UploadSource,
)
from core.jobs.views import (
    CheckpointState,
    EventView,
    JobStatus,
    KeyView,
    Scope,
    UploadFileView,
    UploadPartView,
    UploadState,
    UploadView,
    Usage,
    View,
    WebhookKind,
    WebhookView,
)

T = TypeVar("T")

_LONGEST_S = 366 * 86400.0
_MOST_SEQ = (1 << 63) - 1
_OWNER = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,99}$"


class Body(Request):
    """A JSON body."""

    @model_validator(mode="before")
    @classmethod
    def _only_what_can_be_stored(cls, value: Any) -> Any:
        _check_storable(value)
        return value


def _check_storable(value: Any) -> None:
    if isinstance(value, str):
        if "\0" in value or any(0xD800 <= ord(char) < 0xE000 for char in value):
            raise ValueError("text with NUL or half a surrogate pair")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("NaN and Infinity are not JSON")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_storable(key)
            _check_storable(item)
    elif isinstance(value, list):
        for item in value:
            _check_storable(item)


class Items(BaseModel, Generic[T]):
    """A whole listing."""

    items: tuple[T, ...]


class Query(BaseModel):
    """Query parameters; unknown ones are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PageQuery(Query):
    """Where a page begins and how long it is."""

    cursor: str | None = Field(default=None, max_length=200, description="`next_cursor` of the page before")
    limit: int = Field(default=50, ge=1, le=200)


class NewKey(Body):
    """A key to be made. `owner`: whose; yours if left out."""

    scopes: tuple[Scope, ...] = Field(min_length=1, max_length=len(get_args(Scope)))
    owner: str | None = Field(default=None, pattern=_OWNER)


class KeyMade(KeyView):
    """A key that was made. `secret`: only in the answer that made it."""

    secret: str | None


class KeyQuery(Query):
    """Whose keys."""

    owner: str | None = Field(default=None, pattern=_OWNER)


class WebhookBody(Body, NewWebhook):
    """A webhook to be made."""

    kinds: tuple[WebhookKind, ...] = Field(default=get_args(WebhookKind), max_length=len(get_args(WebhookKind)))


class WebhookMade(WebhookView):
    """A webhook that was made. `secret`: only in the answer that made it."""

    secret: str | None


class JobQuery(PageQuery):
    """Which jobs: filters that must all hold."""

    status: JobStatus | None = None
    checkpoint: str | None = None
    label: str | None = Field(default=None, min_length=1, description="`key` or `key=value`")


class EventQuery(Query):
    """Events with a number above `after`."""

    after: int = Field(default=0, ge=0, le=_MOST_SEQ)
    limit: int = Field(default=500, ge=1, le=1000)


class NewUpload(Body):
    """The files that will be sent."""

    files: list[UploadFile] = Field(min_length=1)


class SentPart(UploadPartView):
    """A part and where its bytes are PUT; the URL is relative to the service's own."""

    url: str


class UploadAnswer(View):
    """An upload with the state of all its parts."""

    id: str
    state: UploadState
    part_size: int
    files: tuple[UploadFileView, ...]
    parts: tuple[SentPart, ...]
    created_at: datetime
    expires_at: datetime
    sha256: str | None = None

    @classmethod
    def of(cls, view: UploadView) -> Self:
        parts = tuple(SentPart(**part.model_dump(), url=part_url(view.id, part)) for part in view.parts)
        return cls(**{**dict(view), "parts": parts})


def part_url(upload_id: str, part: UploadPartView) -> str:
    return f"/v1/uploads/{upload_id}/parts/{part.file}/{part.number}"


def _s3(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class SourceBody(Body):
    """Where a checkpoint comes from: exactly one of these."""

    upload: str | None = Field(default=None, description="the id of a completed upload")
    hf: HubSource | None = None
    s3: Annotated[S3Source | None, BeforeValidator(_s3)] = None
    path: str | None = Field(default=None, description="a folder of the service's machine, under an allowed root")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.upload, self.hf, self.s3, self.path)) != 1:
            raise ValueError("a source is exactly one of upload, hf, s3 and path")
        return self

    @property
    def source(self) -> Source:
        """What the register of checkpoints is asked for."""
        if self.upload is not None:
            return UploadSource(upload=self.upload)
        if self.path is not None:
            return PathSource(path=self.path)
        found = self.hf or self.s3
        if found is None:
            raise ValueError("a source that was validated has one of the four")
        return found


class NewCheckpoint(Body):
    """A source model to be registered."""

    source: SourceBody
    name: str = Field(default="", max_length=200)


class CheckpointItem(View):
    """A checkpoint in a listing: without its files and the table of its tensors."""

    id: str
    name: str
    state: CheckpointState
    source: dict[str, Any]
    sha256: str | None
    size_bytes: int | None
    created_at: datetime
    inspection: dict[str, Any]


class NewLimits(Body):
    """How long a job may wait and run, in seconds; null: no limit."""

    max_pending_s: float | None = Field(default=None, gt=0, le=_LONGEST_S)
    max_runtime_s: float | None = Field(default=None, gt=0, le=_LONGEST_S)


class NewPlan(Body):
    """A recipe, by the name of a preset or written out, and the checkpoint that it is for."""

    checkpoint: str
    recipe: str | dict[str, Any]


class NewJob(NewPlan):
    """A job to be done."""

    name: str = Field(default="", max_length=200)
    labels: dict[Label, Annotated[str, Field(max_length=256)]] = Field(default_factory=dict, max_length=32)
    limits: NewLimits = NewLimits()
    webhook: str | None = Field(
        default=None, min_length=1, max_length=100, description="the id of a webhook that hears of all this job does"
    )


class EventPage(View):
    """Events in order; `next_after` is the `after` of the next page."""

    items: tuple[EventView, ...]
    next_after: int


class PlannedTensor(View):
    """What the allocation chose for a tensor; `predicted_kl` is its share in nats per token."""

    model_config = ConfigDict(extra="allow")

    name: str
    format: str
    bits: float
    stored_bytes: int
    fisher_mean: float | None = None
    predicted_kl: float | None = None


class PlanAnswer(View):
    """An allocation. While it is computed (`queued`, `running`) the numbers are null and there are no tensors."""

    id: str
    status: JobStatus
    checkpoint: str
    recipe: dict[str, Any]
    predicted_bits_per_param: float | None = None
    predicted_size_bytes: int | None = None
    predicted_kl: float | None = None
    warnings: tuple[str, ...] = ()
    tensors: tuple[PlannedTensor, ...] = ()


class CatalogueItem(BaseModel):
    """Something that a recipe can name; the other members depend on what it is."""

    model_config = ConfigDict(extra="allow")

    name: str
    description: str = ""


class RecipeItem(BaseModel):
    """A preset in its canonical form."""

    name: str
    description: str
    recipe: dict[str, Any]


class RecipeCatalogue(Items[RecipeItem]):
    """The presets, and the JSON Schema of all recipes."""

    json_schema: dict[str, Any] = Field(serialization_alias="schema")


class UsageItem(View):
    """How much is used of what; `limit` is null where there is none."""

    name: str
    used: int
    limit: int | None = None


class UsageAnswer(Usage):
    """What the caller's owner holds, by name and as a list with the limits."""

    items: tuple[UsageItem, ...]


class Check(View):
    """Whether one server answers, and why not."""

    ok: bool
    why: str = ""


class Health(View):
    """Whether the service can work."""

    ready: bool
    checks: dict[str, Check]
