"""Bodies that are never held whole: parts that come in, artefacts that go out, events as they happen.

A part is read by the event loop and consumed by a thread of its own pool, one chunk ahead of the disk at most. Events
are read from the database in the thread pool; the loop itself never waits for SQL.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import quote

import anyio
import structlog
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from api.metrics import Metrics
from core.clock import monotonic
from core.errors import BitmillError
from core.jobs.events import TERMINAL
from core.jobs.views import EventView

log = structlog.get_logger()

PING_S = 15.0
LONGEST_S = 600.0
POLL_S = 0.5
_PAGE = 200

T = TypeVar("T")
EventReader = Callable[[int, int], tuple[EventView, ...]]


async def consume(request: Request, limiter: anyio.CapacityLimiter, work: Callable[[Iterator[bytes]], T]) -> T:
    """What `work` makes of the request's body, in a thread of `limiter`, without the body ever being whole."""
    body = request.stream()

    async def following() -> bytes | None:
        return await anext(body, None)

    def chunks() -> Iterator[bytes]:
        while (chunk := anyio.from_thread.run(following)) is not None:
            yield chunk

    return await anyio.to_thread.run_sync(lambda: work(chunks()), limiter=limiter)


@dataclass(frozen=True)
class ByteRange:
    """The bytes `start` up to, not including, `end`."""

    start: int
    end: int


class UnsatisfiableRangeError(Exception):
    """A range that begins behind the last byte."""


def parse_range(header: str | None, size: int) -> ByteRange | None:
    """The one range that `Range` asks for (RFC 9110, section 14); None to send everything.

    Several ranges, other units and what is not a range are ignored, as the RFC allows. UnsatisfiableRangeError when
    the range begins behind the last byte.
    """
    found = re.fullmatch(r"bytes=(\d{0,19})-(\d{0,19})", (header or "").strip())
    if not found or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1 if last else size)
        if last and int(last) < start:
            return None
    if start >= size:
        raise UnsatisfiableRangeError
    return ByteRange(start, end)


def attachment(filename: str) -> str:
    """A Content-Disposition that browsers save under that name, in any script (RFC 6266, RFC 8187)."""
    plain = re.sub(r"[^A-Za-z0-9._\- ]", "_", filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


def matches(header: str | None, etag: str) -> bool:
    """Whether `If-None-Match` lists that ETag."""
    listed = [part.strip().removeprefix("W/") for part in (header or "").split(",")]
    return "*" in listed or etag in listed


async def event_stream(read: EventReader, after: int, metrics: Metrics) -> AsyncIterator[str]:
    """Server-sent events from number `after` on, until the job has ended or ten minutes are over.

    `read(after, limit)` is called in the thread pool. The client goes on with `Last-Event-ID`.
    """
    began = spoke = monotonic()
    yield "retry: 2000\n\n"
    with metrics.sse_connections.track_inprogress():
        while monotonic() - began < LONGEST_S:
            try:
                found = await run_in_threadpool(read, after, _PAGE)
            except BitmillError as error:
                log.warning("event_stream_broken", error=str(error))
                return
            for event in found:
                yield sse(event)
                after, spoke = event.seq, monotonic()
                if event.kind in TERMINAL:
                    return
            if len(found) == _PAGE:
                continue
            if monotonic() - spoke >= PING_S:
                yield ": ping\n\n"
                spoke = monotonic()
            await anyio.sleep(POLL_S)


def sse(event: EventView) -> str:
    """One event in the wire format of text/event-stream; JSON has no line breaks."""
    return f"id: {event.seq}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"
