"""The events of a job: a page of JSON, or as they happen to whoever accepts text/event-stream."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from api.auth import Reader
from api.dependencies import Services, ServicesOf
from api.schemas import EventPage, EventQuery
from api.streaming import event_stream
from core.errors import UserError
from core.jobs.states import JOB
from core.jobs.views import EventView

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
    204: {"description": "The job has ended and there is nothing after that event: do not reconnect."},
}
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@router.get("/{job_id}/events", response_model=EventPage, responses=_STREAM)
async def list_events(
    job_id: str,
    query: Annotated[EventQuery, Query()],
    services: ServicesOf,
    caller: Reader,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[str | None, Header(max_length=20)] = None,
) -> Response | EventPage:
    """Events with a number above `after`; a stream goes on after `Last-Event-ID`."""

    def read(after: int, limit: int) -> tuple[EventView, ...]:
        return services.jobs.events(caller.owner, job_id, after, limit)

    if "text/event-stream" not in accept:
        found = await run_in_threadpool(read, query.after, query.limit)
        return EventPage(items=found, next_after=found[-1].seq if found else query.after)
    after = query.after if last_event_id is None else _number(last_event_id)
    if await run_in_threadpool(_over, services, caller.owner, job_id, after):
        return Response(status_code=204)
    stream = event_stream(read, after, services.metrics)
    return StreamingResponse(stream, media_type="text/event-stream", headers=_STREAM_HEADERS)


def _over(services: Services, owner: str, job_id: str, after: int) -> bool:
    """Whether the job has ended and no event comes after that number."""
    ended = services.jobs.get(owner, job_id).status in JOB.terminal
    return ended and not services.jobs.events(owner, job_id, after, 1)


def _number(last_event_id: str) -> int:
    if not last_event_id.isdecimal() or int(last_event_id) >= 1 << 63:
        raise UserError("not the number of an event", where="Last-Event-ID")
    return int(last_event_id)
