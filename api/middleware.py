"""What surrounds every request: its id, its line in the log, its numbers, and a limit for its body.

Plain ASGI, so that streams pass through unbuffered. `RequestContext` is the outermost: whatever fails inside is
answered as a problem with the request's id.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import PayloadTooLarge, internal, problem
from api.metrics import Metrics
from core.clock import monotonic
from core.ids import new_id

log = structlog.get_logger()

MAX_BODY_BYTES = 8 << 20
_GIVEN_ID = re.compile(r"[A-Za-z0-9._\-]{1,64}")
_QUIET = frozenset({"/livez", "/readyz", "/metrics"})


@dataclass
class _Answer:
    """What is known of the answer so far."""

    status: int = 0
    started_at: float = 0.0


class RequestContext:
    """Gives every request an id, logs and counts it, and answers what nobody caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(started_at=monotonic())

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_named)
            except Exception as error:  # noqa: BLE001 - the last place that can answer
                await self._failed(error, answer, request_id, (scope, receive, send_named))
            finally:
                self._note(scope, answer)

    async def _failed(
        self, error: Exception, answer: _Answer, request_id: str, call: tuple[Scope, Receive, Send]
    ) -> None:
        response = internal(error, request_id)
        if answer.status:
            raise error  # half of an answer is out already: the connection has to break
        await response(*call)

    def _note(self, scope: Scope, answer: _Answer) -> None:
        route = _route(scope)
        seconds = monotonic() - answer.started_at
        self.metrics.requests.labels(scope["method"], route, str(answer.status)).inc()
        self.metrics.seconds.labels(scope["method"], route).observe(seconds)
        principal = scope["state"].get("principal")
        fields: dict[str, Any] = {"key_id": principal.key_id} if principal else {}
        write = log.debug if route in _QUIET else log.info
        write(
            "request",
            method=scope["method"],
            path=scope["path"][:300],
            status=answer.status,
            ms=round(1000 * seconds, 1),
            **fields,
        )


def _request_id(headers: Headers) -> str:
    """The id that the caller gave, when it is one that can stand in a log, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _GIVEN_ID.fullmatch(given) else new_id("request")


def _route(scope: Scope) -> str:
    """The path as its route writes it, so that labels do not grow with ids."""
    return str(getattr(scope.get("route"), "path", "") or "unmatched")


class BodyLimit:
    """Refuses bodies above `MAX_BODY_BYTES`, declared or not. Parts of uploads (PUT) have their own exact lengths."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "PUT":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
            refused = PayloadTooLarge(f"more than {MAX_BODY_BYTES} bytes", hint="checkpoints are sent as uploads")
            await problem(refused, scope["state"]["request_id"])(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise HTTPException(413, f"more than {MAX_BODY_BYTES} bytes")
            return message

        await self.app(scope, limited, send)
