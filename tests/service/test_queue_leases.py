"""Leases, fences and retries: whoever is killed, silent or late, each step ends with one result."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from core.errors import BitmillError, EngineDied, InvalidCheckpoint, OutOfMemory, StoreUnavailable
from core.jobs.reconcile import PASS_LOCK
from core.jobs.repository import attempts as attempt_rows
from core.jobs.sessions import writing

if TYPE_CHECKING:
    from tests.service.conftest import Bench


def test_one_of_sixteen_racing_claims_wins_each_step(bench: Bench) -> None:
    jobs = [bench.submit() for _ in range(12)]
    steps = [bench.step(job, "fetch").id for job in jobs]
    barrier = threading.Barrier(16)

    def race(number: int) -> list[str]:
        barrier.wait()
        order = steps if number % 2 else steps[::-1]
        return [step for step in order if bench.queue.claim(step, f"wrk_{number}") is not None]

    with ThreadPoolExecutor(16) as pool:
        won = [step for found in pool.map(race, range(16)) for step in found]
    assert sorted(won) == sorted(steps)


def test_a_lapsed_lease_is_charged_and_the_step_is_offered_ahead_of_new_work(bench: Bench) -> None:
    job = bench.submit()
    claim = bench.claim(job, "fetch")
    bench.let_leases_lapse()
    bench.outbox.sent.clear()
    assert bench.reconciler.run_once()["leases_expired"] == 1
    step = bench.step(job, "fetch")
    assert (step.status, step.attempts) == ("ready", 1)
    assert bench.outbox.sent == [(claim.step_id, "cpu.high")]
    assert bench.kinds(job)[-2:] == ["attempt.lost", "step.retrying"]


def test_a_zombie_that_wakes_after_its_lease_changes_nothing(bench: Bench) -> None:
    job = bench.submit()
    zombie = bench.claim(job, "fetch", worker="wrk_zombie")
    bench.let_leases_lapse()

    def try_everything() -> list[bool]:
        return [
            bench.queue.heartbeat(zombie.attempt_id, 0.9).ok,
            bench.queue.succeed(zombie.attempt_id, bench.output(zombie)),
            bench.queue.fail(zombie.attempt_id, OutOfMemory("too big")),
            bench.queue.interrupted(zombie.attempt_id),
            bench.queue.cancelled(zombie.attempt_id),
        ]

    before = bench.now(job), bench.kinds(job)
    assert try_everything() == [False] * 5  # lapsed, not yet reaped
    assert (bench.now(job), bench.kinds(job)) == before
    bench.reconciler.run_once()
    second = bench.claim(job, "fetch", worker="wrk_b")
    before = bench.now(job), bench.kinds(job)
    assert try_everything() == [False] * 5  # somebody else has the step
    assert bench.kinds(job) == before[1]
    assert bench.queue.succeed(second.attempt_id, bench.output(second))
    before = bench.now(job), bench.kinds(job)
    assert try_everything() == [False] * 5  # and has finished it
    assert (bench.now(job).steps, bench.kinds(job)) == (before[0].steps, before[1])


def test_a_lease_that_is_renewed_outlives_its_first_term(bench: Bench) -> None:
    short = bench.with_settings(lease_s=1.0)
    claim = short.claim(short.submit(), "fetch")
    for _ in range(8):
        time.sleep(0.15)
        assert short.queue.heartbeat(claim.attempt_id, 0.1).ok
        assert short.reconciler.run_once()["leases_expired"] == 0
    renewed = time.monotonic()
    while not (expired := short.reconciler.run_once()["leases_expired"]):
        time.sleep(0.1)
        assert time.monotonic() < renewed + 10
    assert expired == 1


def test_the_attempts_of_a_step_are_limited(bench: Bench) -> None:
    job = bench.submit()
    for number in range(1, 4):
        claim = bench.claim(job, "fetch")
        assert bench.queue.fail(claim.attempt_id, EngineDied("killed by signal 9"))
        assert [attempt.state for attempt in bench.attempts(claim.step_id)] == ["lost"] * number
    done = bench.now(job)
    assert done.status == "failed"
    assert done.failure is not None
    assert (done.failure.code, done.failure.kind, done.failure.retryable) == ("engine_died", "lost", True)
    assert bench.step(job, "fetch").attempts == 3


def test_an_interruption_costs_nothing_however_often_it_happens(bench: Bench) -> None:
    job = bench.submit()
    for _ in range(5):
        claim = bench.claim(job, "fetch")
        assert bench.queue.interrupted(claim.attempt_id)
    step = bench.step(job, "fetch")
    assert (step.status, step.attempts) == ("ready", 0)
    assert bench.work_off(job).status == "succeeded"


@pytest.mark.parametrize(
    ("error", "attempts"), [(InvalidCheckpoint("lies", where="a.safetensors"), 1), (OutOfMemory("gpu"), 2)]
)
def test_the_class_of_a_failure_decides_how_often_it_is_tried(bench: Bench, error: BitmillError, attempts: int) -> None:
    job = bench.submit()
    for _ in range(attempts):
        assert bench.now(job).status in ("queued", "running")
        with writing(bench.engine) as session:  # not before its time: pretend that it has come
            session.execute(text("UPDATE step SET not_before = NULL"))
        assert bench.queue.fail(bench.claim(job, "fetch").attempt_id, error)
    assert bench.now(job).status == "failed"


def test_a_store_that_does_not_answer_is_tried_again_after_a_wait(bench: Bench) -> None:
    job = bench.submit()
    claim = bench.claim(job, "fetch")
    bench.outbox.sent.clear()
    assert bench.queue.fail(claim.attempt_id, StoreUnavailable("503"))
    assert bench.queue.claim(claim.step_id, "wrk_a") is None  # too early
    assert bench.outbox.sent == []
    assert bench.reconciler.run_once()["redispatched"] == 0
    with writing(bench.engine) as session:
        session.execute(text("UPDATE step SET not_before = clock_timestamp() WHERE not_before IS NOT NULL"))
    assert bench.reconciler.run_once()["redispatched"] == 1
    assert bench.work_off(job).status == "succeeded"


def test_hints_are_sent_again_with_a_delay_that_doubles(bench: Bench) -> None:
    quick = bench.with_settings(redispatch_s=0.2)
    job = quick.submit()
    quick.outbox.sent.clear()
    began = time.monotonic()
    times: list[float] = []
    while len(times) < 3:
        if quick.reconciler.run_once()["redispatched"]:
            times.append(time.monotonic() - began)
        time.sleep(0.02)
    assert quick.outbox.ids() == [quick.step(job, "fetch").id] * 3
    assert times[1] - times[0] > 0.35
    assert times[2] - times[1] > 0.75


def test_a_step_that_is_running_or_done_is_not_sent_again(bench: Bench) -> None:
    quick = bench.with_settings(redispatch_s=0.0)
    job = quick.submit()
    quick.claim(job, "fetch")
    quick.outbox.sent.clear()
    quick.reconciler.run_once()
    assert quick.outbox.sent == []


def test_a_job_that_waits_too_long_expires_and_one_that_runs_too_long_fails(bench: Bench) -> None:
    waiting = bench.submit(max_pending_s=0.05)
    running = bench.submit(max_runtime_s=0.05, max_pending_s=0.01)
    claim = bench.claim(running, "fetch")
    time.sleep(0.1)
    counts = bench.reconciler.run_once()
    assert (counts["jobs_expired"], counts["jobs_overdue"]) == (1, 1)
    assert bench.now(waiting).status == "expired"
    assert bench.kinds(waiting)[-1] == "job.expired"
    done = bench.now(running)
    assert done.failure is not None
    assert (done.status, done.failure.code, done.failure.step) == ("failed", "deadline_exceeded", "fetch")
    assert not bench.queue.heartbeat(claim.attempt_id, 0.5).ok


def test_one_reconciler_at_a_time_does_a_pass(bench: Bench) -> None:
    with bench.engine.connect() as other:
        other.execute(text("SELECT pg_advisory_lock(:name)"), {"name": PASS_LOCK})
        assert bench.reconciler.run_once() == {}
        other.execute(text("SELECT pg_advisory_unlock(:name)"), {"name": PASS_LOCK})  # it outlives the transaction
    assert bench.reconciler.run_once() != {}


def test_progress_is_told_in_steps_of_a_twentieth_and_never_goes_back(bench: Bench) -> None:
    job = bench.submit()
    claim = bench.claim(job, "fetch")
    for progress in (0.01, 0.02, 0.3, 0.31, 0.2, 0.9):
        assert bench.queue.heartbeat(claim.attempt_id, progress, f"at {progress}").ok
    assert bench.kinds(job).count("step.progress") == 2
    step = bench.step(job, "fetch")
    assert (step.progress, step.message) == (0.9, "at 0.9")
    assert 0 < bench.now(job).progress < 0.1


def test_the_database_refuses_impossible_states(bench: Bench) -> None:
    job = bench.submit()
    bench.claim(job, "fetch")
    impossible = (
        "UPDATE job SET status = 'succeeded'",
        "UPDATE job SET status = 'failed', finished_at = now()",
        "UPDATE job SET status = 'lost'",
        "UPDATE step SET state = 'ready' WHERE state = 'blocked'",
        "UPDATE step SET attempt_id = NULL WHERE state = 'running'",
        "UPDATE step SET state = 'running' WHERE state = 'blocked'",
        "UPDATE step SET state = 'succeeded', finished_at = now(), attempt_id = NULL WHERE state = 'running'",
        "UPDATE step SET state = 'reused', finished_at = now() WHERE state = 'blocked'",
        "UPDATE step SET index = 7",
        "UPDATE attempt SET state = 'lost', finished_at = now()",
        "UPDATE attempt SET progress = 1.5",
        """INSERT INTO attempt (id, step_id, job_id, number, worker_id, state, message, lease_expires_at)
           SELECT 'att_2', step_id, job_id, 2, 'wrk_b', 'running', '', now() FROM attempt""",
        "INSERT INTO event (job_id, seq, kind) SELECT job_id, seq, kind FROM event",
    )
    for statement in impossible:
        with pytest.raises(IntegrityError), writing(bench.engine) as session:
            session.execute(text(statement))


def test_events_of_racing_changes_keep_their_order(bench: Bench) -> None:
    job = bench.submit()
    bench.work_off(job, before="quantise")
    claims = [bench.claim(job, "quantise", index) for index in range(3)]
    with ThreadPoolExecutor(6) as pool:
        beats = [pool.submit(bench.queue.heartbeat, claim.attempt_id, 0.5) for claim in claims]
        ends = [pool.submit(bench.queue.succeed, claim.attempt_id, bench.output(claim)) for claim in claims]
        assert all(end.result() for end in ends)
        for beat in beats:
            beat.result()
    events = bench.jobs.events("ada", job.id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert bench.states(job)["assemble"] == "ready"


def test_a_lease_is_measured_by_the_databases_clock_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = bench.submit()
    claim = bench.claim(job, "fetch")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    monkeypatch.setattr(time, "time_ns", lambda: 4_000_000_000_000_000_000)
    assert bench.reconciler.run_once()["leases_expired"] == 0
    assert bench.queue.heartbeat(claim.attempt_id, 0.5).ok


def test_lines_that_the_engine_logs_stay_with_the_attempt(bench: Bench) -> None:
    claim = bench.claim(bench.submit(), "fetch")
    bench.queue.log(claim.attempt_id, [("step.begin", {"device": "cpu"}), ("step.end", {})])
    with writing(bench.engine) as session:
        rows = session.execute(text("SELECT event, fields FROM attempt_log ORDER BY id")).all()
        assert [(event, fields) for event, fields in rows] == [("step.begin", {"device": "cpu"}), ("step.end", {})]
        assert attempt_rows.place(session, claim.attempt_id) == (claim.job_id, claim.step_id)
