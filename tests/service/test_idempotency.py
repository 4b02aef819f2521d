"""Remembered answers: one key does one thing, whoever asks again, and a request that died does not hold it for ever."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import Engine, text

from core.errors import BitmillError, Conflict, IdempotencyMismatch
from core.jobs.idempotency import IdempotencyService

ANSWER: dict[str, Any] = {"id": "upl_1", "parts": [{"file": 0, "arrived": False, "sha256": None}], "€": 1.5}


@pytest.fixture
def remembered(engine: Engine) -> IdempotencyService:
    return IdempotencyService(engine)


def grow_older(engine: Engine, seconds: int) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE idempotency SET created_at = created_at - interval '{seconds} s'"))


def test_the_same_key_and_body_give_the_same_answer(remembered: IdempotencyService) -> None:
    assert remembered.begin("ada", "k", "body") is None
    remembered.finish("ada", "k", ANSWER)
    assert remembered.begin("ada", "k", "body") == ANSWER
    assert remembered.begin("ada", "k", "body") == ANSWER


@pytest.mark.parametrize("answered", [True, False])
def test_another_body_is_refused_whether_or_not_there_is_an_answer(
    remembered: IdempotencyService, answered: bool
) -> None:
    remembered.begin("ada", "k", "body")
    if answered:
        remembered.finish("ada", "k", ANSWER)
    with pytest.raises(IdempotencyMismatch) as refused:
        remembered.begin("ada", "k", "other")
    assert refused.value.where == "k"


def test_a_request_in_flight_is_not_done_twice(remembered: IdempotencyService) -> None:
    remembered.begin("ada", "k", "body")
    with pytest.raises(Conflict, match="in flight") as refused:
        remembered.begin("ada", "k", "body")
    assert (refused.value.where, refused.value.hint) == ("k", "wait and try again")


def test_of_many_at_the_same_time_one_does_the_work(remembered: IdempotencyService) -> None:
    together = Barrier(8)

    def ask(_: int) -> str:
        together.wait()
        try:
            return "does it" if remembered.begin("ada", "k", "body") is None else "answered"
        except BitmillError as error:
            return error.code

    with ThreadPoolExecutor(8) as pool:
        outcomes = sorted(pool.map(ask, range(8)))
    assert outcomes == ["conflict"] * 7 + ["does it"]


def test_a_request_that_failed_gives_its_key_back(remembered: IdempotencyService) -> None:
    remembered.begin("ada", "k", "body")
    remembered.release("ada", "k")
    assert remembered.begin("ada", "k", "other") is None


def test_an_answer_is_not_forgotten_by_giving_the_key_back(remembered: IdempotencyService) -> None:
    remembered.begin("ada", "k", "body")
    remembered.finish("ada", "k", ANSWER)
    remembered.release("ada", "k")
    assert remembered.begin("ada", "k", "body") == ANSWER


def test_a_holder_that_died_gives_the_key_up_after_a_minute_to_the_same_body(
    remembered: IdempotencyService, engine: Engine
) -> None:
    remembered.begin("ada", "k", "body")
    grow_older(engine, 50)
    with pytest.raises(Conflict):
        remembered.begin("ada", "k", "body")
    grow_older(engine, 11)
    with pytest.raises(IdempotencyMismatch):
        remembered.begin("ada", "k", "other")
    assert remembered.begin("ada", "k", "body") is None
    with pytest.raises(Conflict):  # the one who took it over holds it as long as the first did
        remembered.begin("ada", "k", "body")


def test_an_answer_does_not_grow_old(remembered: IdempotencyService, engine: Engine) -> None:
    remembered.begin("ada", "k", "body")
    remembered.finish("ada", "k", ANSWER)
    grow_older(engine, 3600)
    assert remembered.begin("ada", "k", "body") == ANSWER


def test_keys_belong_to_their_owners(remembered: IdempotencyService) -> None:
    remembered.begin("ada", "k", "body")
    remembered.finish("ada", "k", ANSWER)
    assert remembered.begin("eve", "k", "other") is None
    remembered.release("eve", "k")
    assert remembered.begin("ada", "k", "body") == ANSWER
