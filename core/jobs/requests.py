"""What callers ask the services for: values that are validated before a transaction begins."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from core.jobs.views import WebhookKind

Label = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Request(BaseModel):
    """A frozen value; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SubmitJob(Request):
    """A recipe (canonical form of `core.recipe`) applied to a checkpoint. Limits are seconds; None: no limit.

    `webhook`: one that is told of every change of this job, whatever kinds it has chosen.
    """

    checkpoint: str
    recipe: dict[str, Any]
    name: str = Field(default="", max_length=200)
    labels: dict[Label, Annotated[str, StringConstraints(max_length=256)]] = Field(default_factory=dict, max_length=32)
    webhook: str | None = None
    max_pending_s: float | None = Field(default=None, gt=0)
    max_runtime_s: float | None = Field(default=None, gt=0)


class NewWebhook(Request):
    """A receiver of events. `kinds`: those it hears of, of all jobs of its owner; () of jobs that name it only."""

    url: str = Field(max_length=2048)
    kinds: tuple[WebhookKind, ...] = get_args(WebhookKind)


class UploadFile(Request):
    """A file that will be uploaded: its relative path, exact size and sha256 (hex)."""

    path: str
    size: int = Field(ge=0)
    sha256: Digest


class UploadSource(Request):
    """A completed upload."""

    kind: Literal["upload"] = "upload"
    upload: str


class PathSource(Request):
    """A folder on the service's own machine, under one of the allowed roots."""

    kind: Literal["path"] = "path"
    path: str


class HubSource(Request):
    """A hub repository at a revision."""

    kind: Literal["hf"] = "hf"
    repo: Annotated[str, StringConstraints(pattern=r"^\w[\w.\-]{0,95}/\w[\w.\-]{0,95}$")]
    revision: Annotated[str, StringConstraints(pattern=r"^[\w.\-/]{1,128}$")] = "main"


class S3Source(Request):
    """An `s3://bucket/prefix`."""

    kind: Literal["s3"] = "s3"
    url: Annotated[str, StringConstraints(pattern=r"^s3://[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9](/[^\s]*)?$")]


Source = UploadSource | PathSource | HubSource | S3Source
