"""Every error as a problem document (RFC 9457): what happened, where, and what to do, with a stable code.

The statuses follow from the error's code, else from its class. The framework's own errors (no such route, a body that
does not validate) take the same form. What is a defect of ours is told by its request id only: its detail is logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.exc import DataError, InterfaceError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import compile_path

from core.errors import BitmillError, ErrorClass, NotFound, StoreUnavailable, UserError

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"

_BY_CODE = {
    "unauthenticated": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "conflict": 409,
    "payload_too_large": 413,
    "malformed_request": 400,
    "quota_exceeded": 429,
    "out_of_disk": 507,
}
_BY_CLASS = {
    ErrorClass.USER: 422,
    ErrorClass.NUMERICAL: 422,
    ErrorClass.CAPACITY: 503,
    ErrorClass.TRANSIENT: 503,
    ErrorClass.LOST: 503,
    ErrorClass.INTERRUPTED: 503,
    ErrorClass.INTERNAL: 500,
}
_RETRY_AFTER_S = {429: 30, 503: 2, 507: 60}
_CHALLENGE = 'Bearer realm="bitmill"'


class ProblemItem(BaseModel):
    """One place of the request that is wrong."""

    path: str
    message: str


class Problem(BaseModel):
    """A problem document. `code` is stable; `class` says whether trying again can help."""

    model_config = ConfigDict(populate_by_name=True)

    type: str = Field(examples=["urn:bitmill:problem:not_found"])
    title: str
    status: int
    detail: str
    code: str
    kind: ErrorClass = Field(alias="class")
    retryable: bool
    request_id: str
    where: str = ""
    hint: str = ""
    errors: list[ProblemItem] = []


class MalformedRequest(UserError):
    """A body that is not JSON at all."""

    code = "malformed_request"


class PayloadTooLarge(UserError):
    """A body above the limit of its route."""

    code = "payload_too_large"


class MethodNotAllowed(UserError):
    """The path exists, but not for this method."""

    code = "method_not_allowed"


def status_of(error: BitmillError) -> int:
    """The HTTP status of an error: by its code, else by its class."""
    return _BY_CODE.get(error.code, _BY_CLASS[error.kind])


def request_id_of(request: Request) -> str:
    """The id that `api.middleware` gave this request."""
    return str(getattr(request.state, "request_id", ""))


def problem(error: BitmillError, request_id: str, headers: Mapping[str, str] | None = None, **more: Any) -> Response:
    """The answer that says `error`; `more` are members beside the standard ones."""
    status = status_of(error)
    body = {
        "type": f"urn:bitmill:problem:{error.code}",
        "title": error.code.replace("_", " ").capitalize(),
        "status": status,
        **error.to_dict(),
        "request_id": request_id,
        **more,
    }
    if error.kind is ErrorClass.INTERNAL:
        body |= {"detail": "an error inside the service; its log knows it by the request id", "where": "", "hint": ""}
    found = {**_headers(status), **(headers or {})}
    return JSONResponse(body, status, headers=found, media_type=MEDIA_TYPE)


def _headers(status: int) -> dict[str, str]:
    if status == HTTPStatus.UNAUTHORIZED:
        return {"WWW-Authenticate": _CHALLENGE}
    return {"Retry-After": str(_RETRY_AFTER_S[status])} if status in _RETRY_AFTER_S else {}


def internal(error: Exception, request_id: str) -> Response:
    """The answer to an exception that nobody expected; the traceback goes to the log only."""
    log.error("request_failed", request_id=request_id, exc_info=error)
    return problem(BitmillError("unexpected"), request_id)


def install(app: FastAPI) -> None:
    """Have the application answer all errors as problems."""
    handlers = {
        BitmillError: _bitmill_error,
        RequestValidationError: _validation_error,
        HTTPException: _http_error,
        DataError: _unstorable,
        PoolTimeout: _database_away,
        InterfaceError: _database_away,
        ClientDisconnect: _disconnected,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


async def _bitmill_error(request: Request, error: Exception) -> Response:
    found = error if isinstance(error, BitmillError) else BitmillError(str(error))
    if found.kind is ErrorClass.INTERNAL:
        return internal(found, request_id_of(request))
    return problem(found, request_id_of(request))


async def _validation_error(request: Request, error: Exception) -> Response:
    found = error.errors() if isinstance(error, RequestValidationError) else []
    if any(item["type"] == "json_invalid" for item in found):
        return problem(MalformedRequest("the body is not JSON"), request_id_of(request))
    items = tuple({"path": _path(item["loc"]), "message": str(item["msg"])} for item in found)
    first = items[0] if items else {"path": "", "message": "the request does not validate"}
    return problem(UserError(first["message"], where=first["path"], errors=items), request_id_of(request))


def _path(location: tuple[str | int, ...]) -> str:
    """`("body", "files", 0, "size")` as `files[0].size`; other places than the body keep their name."""
    parts = location[1:] if location and location[0] == "body" and len(location) > 1 else location
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else ("." if text else "") + part
    return text


async def _http_error(request: Request, error: Exception) -> Response:
    """An error of the framework: no route, another method, a body that is too large or cannot be parsed."""
    status, detail, headers = 500, "", None
    if isinstance(error, HTTPException):
        status, detail, headers = error.status_code, str(error.detail), error.headers
    kinds: dict[int, type[BitmillError]] = {404: NotFound, 405: MethodNotAllowed, 413: PayloadTooLarge}
    make = kinds.get(status, MalformedRequest if status < 500 else BitmillError)
    if status == HTTPStatus.METHOD_NOT_ALLOWED and (allowed := _methods_of(request)):
        headers = {"Allow": ", ".join(allowed)}
    return problem(make(detail, where=request.url.path[:200]), request_id_of(request), headers)


def _methods_of(request: Request) -> list[str]:
    """The methods of all routes that have this path; the framework names those of the first only."""
    paths: dict[str, dict[str, Any]] = request.app.openapi()["paths"]
    found = [methods for path, methods in paths.items() if compile_path(path)[0].match(request.url.path)]
    return sorted({method.upper() for methods in found for method in methods})


async def _unstorable(request: Request, _: Exception) -> Response:
    return problem(UserError("a value of the request cannot be looked up or stored"), request_id_of(request))


async def _database_away(request: Request, _: Exception) -> Response:
    return problem(StoreUnavailable("the database did not answer", where="database"), request_id_of(request))


async def _disconnected(request: Request, _: Exception) -> Response:
    return problem(MalformedRequest("the body broke off"), request_id_of(request))
