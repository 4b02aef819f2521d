"""What follows a failure: every class, with every history."""

from __future__ import annotations

import itertools

import pytest

from core.errors import ErrorClass
from core.jobs.retry import Decision, History, backoff, decide

# class -> how many attempts a step gets in all when it fails like that every time, of at most three and of at most five
ATTEMPTS = {
    ErrorClass.USER: (1, 1),
    ErrorClass.NUMERICAL: (1, 1),
    ErrorClass.CAPACITY: (2, 2),
    ErrorClass.INTERNAL: (2, 2),
    ErrorClass.TRANSIENT: (3, 5),
    ErrorClass.LOST: (3, 5),
}


@pytest.mark.parametrize("kind", ATTEMPTS)
@pytest.mark.parametrize(("column", "most"), [(0, 3), (1, 5)])
def test_a_step_that_always_fails_is_tried_so_often(kind: ErrorClass, column: int, most: int) -> None:
    tried = 1
    while decide(kind, History(charged=tried - 1, same_class=tried - 1), most).retry:
        tried += 1
    assert tried == ATTEMPTS[kind][column]


def test_the_table_covers_every_class() -> None:
    assert set(ATTEMPTS) | {ErrorClass.INTERRUPTED} == set(ErrorClass)


@pytest.mark.parametrize(("kind", "charged", "same"), itertools.product(ErrorClass, range(6), range(3)))
def test_only_interruptions_are_free_and_nothing_goes_beyond_the_limit(
    kind: ErrorClass, charged: int, same: int
) -> None:
    decision = decide(kind, History(charged, min(charged, same)), 3)
    if kind is ErrorClass.INTERRUPTED:
        assert decision == Decision(retry=True, charged=False)
        return
    assert decision.charged
    if charged >= 2:
        assert not decision.retry
    if not decision.retry:
        assert decision.delay_s == 0


def test_waiting_doubles_up_to_five_minutes() -> None:
    assert [backoff(earlier) for earlier in (0, 1, 2, 3, 6, 50)] == [5, 10, 20, 40, 300, 300]


def test_lost_work_is_offered_at_once_and_a_silent_store_is_given_time() -> None:
    assert decide(ErrorClass.LOST, History(0, 0), 3).delay_s == 0
    assert decide(ErrorClass.TRANSIENT, History(1, 1), 3).delay_s == 10
