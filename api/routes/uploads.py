"""Uploads: promise files, PUT their parts in any order, complete. `GET` tells a resuming client what has arrived."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated

import anyio
from fastapi import APIRouter, Path, Request, Response
from starlette.concurrency import run_in_threadpool

from api.auth import Writer
from api.dependencies import IdempotencyOf, ServicesOf
from api.schemas import NewUpload, SentPart, UploadAnswer, part_url
from api.streaming import consume
from core.errors import DigestMismatch, QuotaExceeded

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

_OCTETS = {"requestBody": {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string"}}}}}
FileNumber = Annotated[int, Path(ge=0, le=1_000_000)]
PartNumber = Annotated[int, Path(ge=1, le=1_000_000_000)]


@router.post("", status_code=201)
def create_upload(
    body: NewUpload, response: Response, services: ServicesOf, caller: Writer, idempotency: IdempotencyOf
) -> UploadAnswer:
    """Promise the files of a checkpoint; the answer lists the URL of every part."""
    upload_id = idempotency.once(
        services, caller.owner, body, lambda: services.uploads.create(caller.owner, body.files).id
    )
    response.headers["Location"] = f"/v1/uploads/{upload_id}"
    return UploadAnswer.of(services.uploads.get(caller.owner, upload_id))


@router.get("/{upload_id}")
def get_upload(upload_id: str, services: ServicesOf, caller: Writer) -> UploadAnswer:
    """The upload and which of its parts have arrived."""
    return UploadAnswer.of(services.uploads.get(caller.owner, upload_id))


@router.put("/{upload_id}/parts/{file}/{number}", openapi_extra=_OCTETS)
async def put_part(
    upload_id: str, file: FileNumber, number: PartNumber, request: Request, services: ServicesOf, caller: Writer
) -> SentPart:
    """Send the bytes of one part; sending it again replaces it."""
    if services.transfers.available_tokens < 1:
        raise QuotaExceeded("too many parts are in flight", hint="send fewer at a time")
    length = await run_in_threadpool(services.uploads.part_size_of, caller.owner, upload_id, file, number)
    declared = request.headers.get("content-length", str(length))
    if declared != str(length):
        raise DigestMismatch(f"this part has {length} bytes, not {declared}", where=f"{upload_id}/{file}/{number}")

    def store(chunks: Iterator[bytes]) -> SentPart:
        part = services.uploads.put_part(caller.owner, upload_id, file, number, chunks)
        return SentPart(**part.model_dump(), url=part_url(upload_id, part))

    with services.metrics.parts_in_flight.track_inprogress():
        return await consume(request, services.transfers, store)


@router.post("/{upload_id}/complete")
async def complete_upload(upload_id: str, services: ServicesOf, caller: Writer) -> UploadAnswer:
    """Verify every file against its promise; from here on the upload can become a checkpoint."""
    complete = partial(services.uploads.complete, caller.owner, upload_id)
    return UploadAnswer.of(await anyio.to_thread.run_sync(complete, limiter=services.transfers))


@router.delete("/{upload_id}", status_code=204)
def abort_upload(upload_id: str, services: ServicesOf, caller: Writer) -> None:
    """Forget the upload and its parts."""
    services.uploads.abort(caller.owner, upload_id)
