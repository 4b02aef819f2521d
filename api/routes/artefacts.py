"""Artefacts: what a job published, and the bytes of each, by a signed URL of the store or from here."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from starlette.responses import RedirectResponse, StreamingResponse

from api.auth import Downloader, Reader
from api.dependencies import Services, ServicesOf
from api.schemas import Items
from api.streaming import ByteRange, UnsatisfiableRangeError, attachment, matches, parse_range
from core.jobs.views import ArtefactView

router = APIRouter(prefix="/v1", tags=["artefacts"])

_SIGNED_FOR_S = 900
_OCTETS = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


@router.get("/jobs/{job_id}/artefacts")
def list_artefacts(job_id: str, services: ServicesOf, caller: Reader) -> Items[ArtefactView]:
    """The files of the job's exports; empty until the export is done."""
    return Items[ArtefactView](items=services.jobs.artefacts(caller.owner, job_id))


@router.head("/artefacts/{artefact_id}/content", include_in_schema=False)
@router.get(
    "/artefacts/{artefact_id}/content",
    response_class=Response,
    responses={
        200: {**_OCTETS, "description": "All bytes."},
        206: {**_OCTETS, "description": "The bytes of `Range`."},
        304: {"description": "The client has these bytes."},
        307: {"description": "A signed URL of the store."},
    },
)
def get_artefact_content(
    artefact_id: str,
    request: Request,
    services: ServicesOf,
    caller: Downloader,
    range_: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """The bytes of an artefact. A single range is served, so that a broken download can go on."""
    artefact = services.jobs.artefact(caller.owner, artefact_id)
    filename = PurePosixPath(artefact.path).name
    etag = f'"{artefact.sha256}"'
    if matches(if_none_match, etag):
        return Response(status_code=304, headers={"ETag": etag})
    signed = services.store.presigned_url(artefact.key, _SIGNED_FOR_S, filename)
    if signed is not None:
        return RedirectResponse(signed, 307, headers={"Cache-Control": "no-store"})
    headers = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Disposition": attachment(filename)}
    try:
        wanted = parse_range(range_, artefact.size) if if_range in (None, etag) else None
    except UnsatisfiableRangeError:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{artefact.size}"})
    return _content(services, artefact, wanted, headers, with_body=request.method == "GET")


def _content(
    services: Services, artefact: ArtefactView, wanted: ByteRange | None, headers: dict[str, str], *, with_body: bool
) -> Response:
    start, end = (wanted.start, wanted.end) if wanted else (0, artefact.size)
    headers["Content-Length"] = str(end - start)
    if wanted:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{artefact.size}"
    status = 206 if wanted else 200
    if not with_body:
        return Response(status_code=status, headers=headers, media_type="application/octet-stream")
    pieces = services.store.stream(artefact.key, start, end - start)
    return StreamingResponse(pieces, status, headers, media_type="application/octet-stream")
