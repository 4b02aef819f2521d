"""Problem documents: a status for every error there is, and nothing of our inside in any of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from api.errors import Problem, problem, status_of
from core import errors
from core.errors import BitmillError, ErrorClass


def every_error(kind: type[BitmillError] = BitmillError) -> Iterator[type[BitmillError]]:
    """Those that the service knows; the client has errors of its own."""
    if kind.__module__ in ("core.errors", "api.errors"):
        yield kind
    for child in kind.__subclasses__():
        yield from every_error(child)


def body(error: BitmillError) -> dict[str, Any]:
    answer = problem(error, "req_1")
    found: dict[str, Any] = json.loads(bytes(answer.body))
    Problem.model_validate(found)
    return found


@pytest.mark.parametrize("kind", list(every_error()), ids=lambda kind: kind.__name__)
def test_every_error_has_a_status_that_fits_its_class(kind: type[BitmillError]) -> None:
    status = status_of(kind("detail"))
    user = kind.kind in (ErrorClass.USER, ErrorClass.NUMERICAL)
    assert (400 <= status < 500) is user
    assert body(kind("detail"))["status"] == status


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.Unauthenticated, 401), (errors.Forbidden, 403), (errors.NotFound, 404), (errors.Conflict, 409),
        (errors.IdempotencyMismatch, 422), (errors.QuotaExceeded, 429), (errors.InvalidRecipe, 422),
        (errors.StoreUnavailable, 503), (errors.OutOfDisk, 507), (errors.OutOfMemory, 503), (BitmillError, 500),
    ],
)  # fmt: skip
def test_the_statuses_that_clients_rely_on(kind: type[BitmillError], status: int) -> None:
    assert status_of(kind("")) == status


def test_a_problem_says_everything_that_the_error_says() -> None:
    items = ({"path": "format", "message": "unknown"},)
    found = body(errors.InvalidRecipe("no", where="format", hint="try int4@64", errors=items))
    assert found == {
        "type": "urn:bitmill:problem:invalid_recipe", "title": "Invalid recipe", "status": 422, "detail": "no",
        "code": "invalid_recipe", "class": "user", "retryable": False, "request_id": "req_1", "where": "format",
        "hint": "try int4@64", "errors": [{"path": "format", "message": "unknown"}],
    }  # fmt: skip


def test_an_error_of_ours_leaks_nothing() -> None:
    found = body(BitmillError("SELECT secret", where="/srv/inner.py", hint="password"))
    assert not {"SELECT secret", "/srv/inner.py", "password"} & {str(value) for value in found.values()}


@pytest.mark.parametrize("kind", [errors.StoreUnavailable, errors.QuotaExceeded, errors.OutOfDisk])
def test_what_may_pass_says_when_to_come_back(kind: type[BitmillError]) -> None:
    assert int(problem(kind(""), "req_1").headers["Retry-After"]) > 0
