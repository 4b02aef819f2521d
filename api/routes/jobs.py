"""Jobs: submit, look, cancel, retry. A job's ETag is the hash of its JSON: a poll that finds nothing new is small."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response

from api.auth import Reader, Writer
from api.dependencies import IdempotencyOf, ServicesOf
from api.recipes import check_in_advance, read_recipe
from api.schemas import Items, JobQuery, NewJob
from api.streaming import matches
from core.jobs.requests import SubmitJob
from core.jobs.service import Submitted
from core.jobs.views import JobView, Page, TensorView

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.post("", status_code=201)
def submit_job(
    body: NewJob, response: Response, services: ServicesOf, caller: Writer, idempotency: IdempotencyOf
) -> JobView:
    """Apply a recipe to a checkpoint. What can be known now is refused now."""
    recipe = read_recipe(body.recipe)
    check_in_advance(services.checkpoints, caller.owner, body.checkpoint, recipe)
    request = SubmitJob(
        checkpoint=body.checkpoint,
        recipe=recipe.canonical(),
        name=body.name,
        labels=body.labels,
        webhook=body.webhook,
        max_pending_s=body.limits.max_pending_s,
        max_runtime_s=body.limits.max_runtime_s,
    )
    submitted = services.jobs.submit(caller.owner, request, idempotency.key, idempotency.body_hash(body))
    return _created(submitted, response)


@router.get("")
def list_jobs(query: Annotated[JobQuery, Query()], services: ServicesOf, caller: Reader) -> Page[JobView]:
    """Jobs, newest first."""
    return services.jobs.list(
        caller.owner,
        status=query.status,
        checkpoint=query.checkpoint,
        label=query.label,
        cursor=query.cursor,
        limit=query.limit,
    )


@router.get("/{job_id}", response_model=JobView, responses={304: {"description": "Nothing new since that ETag."}})
def get_job(
    job_id: str, services: ServicesOf, caller: Reader, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """One job with its steps, numbers and, if it failed, the reason."""
    body = services.jobs.get(caller.owner, job_id).model_dump_json().encode()
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


@router.post("/{job_id}/cancel", responses={202: {"model": JobView, "description": "Its running steps are stopping."}})
def cancel_job(job_id: str, response: Response, services: ServicesOf, caller: Writer) -> JobView:
    """Stop the job; asking twice is like asking once."""
    job = services.jobs.cancel(caller.owner, job_id)
    response.status_code = 202 if job.status == "cancelling" else 200
    return job


@router.post("/{job_id}/retry", status_code=201)
def retry_job(
    job_id: str, response: Response, services: ServicesOf, caller: Writer, idempotency: IdempotencyOf
) -> JobView:
    """A new job like one that ended badly; its finished steps are used again."""
    return _created(services.jobs.retry(caller.owner, job_id, idempotency.key, idempotency.body_hash()), response)


@router.get("/{job_id}/tensors")
def list_tensors(job_id: str, services: ServicesOf, caller: Reader) -> Items[TensorView]:
    """What became of each tensor; empty until the first quantise step is done."""
    return Items[TensorView](items=services.jobs.tensors(caller.owner, job_id))


def _created(submitted: Submitted, response: Response) -> JobView:
    response.headers["Location"] = f"/v1/jobs/{submitted.job.id}"
    if not submitted.created:
        response.headers["Idempotency-Replayed"] = "true"
    return submitted.job
