"""A job from its submission to its end: order of steps, events, results, reuse, cancel, retry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from core.errors import Conflict, IdempotencyMismatch, NonFiniteWeights, NotFound, QuotaExceeded
from core.jobs.requests import SubmitJob

if TYPE_CHECKING:
    from tests.service.conftest import Bench


def test_steps_become_ready_when_what_they_wait_for_is_done(bench: Bench) -> None:
    job = bench.submit()
    assert bench.states(job) == {
        "fetch": "ready",
        "calibrate": "blocked",
        "allocate": "blocked",
        "quantise.0": "blocked",
        "quantise.1": "blocked",
        "quantise.2": "blocked",
        "assemble": "blocked",
        "evaluate": "blocked",
        "export": "blocked",
    }
    bench.work_off(job, before="quantise")
    assert {bench.states(job)[f"quantise.{index}"] for index in range(3)} == {"ready"}
    bench.finish(job, "quantise", 0)
    bench.finish(job, "quantise", 2)
    assert bench.states(job)["assemble"] == "blocked"
    bench.finish(job, "quantise", 1)
    assert bench.states(job)["assemble"] == "ready"


def test_a_finished_job_has_its_summary_tensors_and_artefacts(bench: Bench) -> None:
    job = bench.submit(name="first", labels={"team": "nlp"})
    done = bench.work_off(job)
    assert done.status == "succeeded"
    assert done.progress == 1.0
    assert done.eta_s is None
    assert done.finished_at is not None
    assert done.summary is not None
    assert done.summary.to_json() == {
        "bits_per_param": 3.99,
        "size_bytes": 1000,
        "kl_mean": 0.1,
        "perplexity": 11.0,
        "reference_perplexity": 10.0,
        "predicted_kl": 0.125,
    }
    assert [tensor.name for tensor in bench.jobs.tensors("ada", job.id)] == ["w0", "w1", "w2"]
    (artefact,) = bench.jobs.artefacts("ada", job.id)
    assert bench.jobs.artefact("ada", artefact.id) == artefact
    assert "key" not in artefact.to_json()


def test_every_change_tells_an_event_and_their_numbers_have_no_gaps(bench: Bench) -> None:
    job = bench.submit()
    bench.work_off(job)
    events = bench.jobs.events("ada", job.id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.kind for event in events][:4] == ["job.queued", "step.ready", "job.started", "step.started"]
    assert events[-1].kind == "job.succeeded"
    assert bench.jobs.events("ada", job.id, after=3, limit=2) == events[3:5]


def test_only_a_step_id_is_sent_and_only_after_the_commit(bench: Bench) -> None:
    job = bench.submit()
    assert bench.outbox.sent == [(bench.step(job, "fetch").id, "cpu")]
    bench.finish(job, "fetch")
    assert bench.outbox.ids()[-1] == bench.step(job, "calibrate").id


def test_a_request_holds_the_outputs_that_the_step_waits_for(bench: Bench) -> None:
    job = bench.submit()
    bench.work_off(job, before="quantise")
    claim = bench.claim(job, "quantise", 1)
    request = claim.request
    assert (request.kind, request.index, request.count) == ("quantise", 1, 3)
    assert [given.kind for given in request.inputs] == ["fetch", "calibrate", "allocate"]
    assert request.outputs("allocate")[0].values == {"predicted_kl": 0.125}


def test_a_step_is_won_once(bench: Bench) -> None:
    job = bench.submit()
    step = bench.step(job, "fetch")
    assert bench.queue.claim(step.id, "wrk_a") is not None
    assert bench.queue.claim(step.id, "wrk_b") is None
    assert bench.queue.claim("step_" + "0" * 32, "wrk_b") is None


def test_a_second_job_on_the_same_checkpoint_reuses_what_was_done(bench: Bench) -> None:
    checkpoint = bench.checkpoint()
    first = bench.submit(checkpoint)
    bench.work_off(first)
    other: dict[str, Any] = {**bench.now(first).recipe, "target": {"bits_per_param": 3.0}}
    second = bench.submit(checkpoint, recipe=other)
    assert bench.states(second)["fetch"] == bench.states(second)["calibrate"] == "reused"
    assert bench.states(second)["allocate"] == "ready"
    assert bench.kinds(second)[:3] == ["job.queued", "step.reused", "step.reused"]
    assert second.progress > 0


def test_the_same_job_again_is_done_at_once_and_has_its_own_artefacts(bench: Bench) -> None:
    checkpoint = bench.checkpoint()
    bench.work_off(bench.submit(checkpoint))
    again = bench.submit(checkpoint)
    assert again.status == "succeeded"
    assert {step.status for step in again.steps} == {"reused"}
    assert len(bench.jobs.artefacts("ada", again.id)) == 1
    assert bench.kinds(again)[-2:] == ["job.started", "job.succeeded"]


def test_work_whose_objects_are_gone_is_done_again(bench: Bench) -> None:
    checkpoint = bench.checkpoint()
    first = bench.submit(checkpoint)
    bench.work_off(first)
    for key, _ in list(bench.store.list("steps/")):
        if "calibrate" in key:
            bench.store.delete(key)
    second = bench.submit(checkpoint)
    assert bench.states(second)["fetch"] == "reused"
    assert bench.states(second)["calibrate"] == "ready"


def test_work_that_another_job_finishes_meanwhile_is_reused_at_the_claim(bench: Bench) -> None:
    checkpoint = bench.checkpoint()
    first, second = bench.submit(checkpoint), bench.submit(checkpoint)
    running = bench.claim(first, "fetch")
    waiting = bench.step(second, "fetch")
    assert bench.queue.claim(waiting.id, "wrk_b") is None  # somebody does this very work
    assert bench.step(second, "fetch").status == "ready"
    bench.outbox.sent.clear()
    bench.queue.succeed(running.attempt_id, bench.output(running))
    assert waiting.id in bench.outbox.ids()  # offered again
    assert bench.queue.claim(waiting.id, "wrk_b") is None
    assert bench.states(second)["fetch"] == "reused"
    assert bench.states(second)["calibrate"] == "ready"


def test_a_failure_of_the_numbers_ends_the_job_and_stops_its_other_steps(bench: Bench) -> None:
    job = bench.submit()
    bench.work_off(job, before="quantise")
    failing, beside = bench.claim(job, "quantise", 0), bench.claim(job, "quantise", 1)
    assert bench.queue.fail(failing.attempt_id, NonFiniteWeights("NaN at [3, 4]", where="layer.7.weight"))
    done = bench.now(job)
    assert done.status == "failed"
    assert done.failure is not None
    assert done.failure.to_json() == {
        "code": "non_finite_weights",
        "class": "numerical",
        "retryable": False,
        "step": "quantise",
        "tensor": "layer.7.weight",
        "where": "layer.7.weight",
        "detail": "NaN at [3, 4]",
        "hint": "",
    }
    assert bench.states(job)["quantise.1"] == "cancelled"
    assert not bench.queue.heartbeat(beside.attempt_id, 0.5).ok
    assert not bench.queue.succeed(beside.attempt_id, bench.output(beside))


def test_a_gate_that_fails_fails_the_job_and_keeps_the_artefacts(bench: Bench) -> None:
    job = bench.submit()
    bench.work_off(job, before="export")
    claim = bench.claim(job, "export")
    output = bench.output(claim)
    output["values"]["gate"] = {"ok": False, "failures": [{"limit": "max_kl", "allowed": 0.05, "measured": 0.1}]}
    assert bench.queue.succeed(claim.attempt_id, output)
    done = bench.now(job)
    assert done.status == "failed"
    assert done.failure is not None
    assert (done.failure.code, done.failure.step) == ("gate_failed", "export")
    assert bench.states(job)["export"] == "succeeded"
    assert len(bench.jobs.artefacts("ada", job.id)) == 1


def test_cancelling_a_queued_job_ends_it_at_once(bench: Bench) -> None:
    job = bench.submit()
    assert bench.jobs.cancel("ada", job.id).status == "cancelled"
    assert set(bench.states(job).values()) == {"cancelled"}
    assert bench.kinds(job)[-2:] == ["job.cancelling", "job.cancelled"]
    assert bench.queue.claim(bench.step(job, "fetch").id, "wrk_a") is None
    assert bench.jobs.cancel("ada", job.id).status == "cancelled"  # once more changes nothing


def test_cancelling_a_running_job_waits_for_its_engine_to_stop(bench: Bench) -> None:
    job = bench.submit()
    claim = bench.claim(job, "fetch")
    assert bench.jobs.cancel("ada", job.id).status == "cancelling"
    beat = bench.queue.heartbeat(claim.attempt_id, 0.1)
    assert beat.ok
    assert beat.cancel
    assert bench.queue.cancelled(claim.attempt_id)
    assert bench.now(job).status == "cancelled"
    assert bench.states(job)["fetch"] == "cancelled"
    assert bench.step(job, "fetch").attempts == 0


def test_a_result_that_arrives_while_cancelling_is_kept_for_others(bench: Bench) -> None:
    checkpoint = bench.checkpoint()
    job = bench.submit(checkpoint)
    claim = bench.claim(job, "fetch")
    bench.jobs.cancel("ada", job.id)
    assert bench.queue.succeed(claim.attempt_id, bench.output(claim))
    assert bench.now(job).status == "cancelled"
    assert bench.states(bench.submit(checkpoint))["fetch"] == "reused"


def test_an_engine_that_dies_while_cancelling_ends_the_job_as_cancelled(bench: Bench) -> None:
    job = bench.submit()
    bench.claim(job, "fetch")
    bench.jobs.cancel("ada", job.id)
    bench.let_leases_lapse()
    assert bench.reconciler.run_once()["leases_expired"] == 1
    assert bench.now(job).status == "cancelled"


def test_a_job_that_ended_well_cannot_be_cancelled_or_retried(bench: Bench) -> None:
    job = bench.submit()
    bench.work_off(job)
    with pytest.raises(Conflict):
        bench.jobs.cancel("ada", job.id)
    with pytest.raises(Conflict):
        bench.jobs.retry("ada", job.id)


def test_a_retry_is_a_new_job_that_reuses_finished_steps(bench: Bench) -> None:
    job = bench.submit(labels={"a": "b"})
    bench.work_off(job, before="quantise")
    bench.jobs.cancel("ada", job.id)
    again = bench.jobs.retry("ada", job.id).job
    assert (again.retry_of, again.labels, again.recipe) == (job.id, {"a": "b"}, job.recipe)
    assert bench.states(again)["allocate"] == "reused"
    assert bench.work_off(again).status == "succeeded"


def test_the_same_key_and_body_give_the_same_job_another_body_is_refused(bench: Bench) -> None:
    checkpoint = bench.checkpoint()
    request = SubmitJob(checkpoint=checkpoint, recipe=bench.submit(checkpoint).recipe)
    first = bench.jobs.submit("ada", request, "key-1", "hash-a")
    second = bench.jobs.submit("ada", request, "key-1", "hash-a")
    assert (first.created, second.created) == (True, False)
    assert first.job.id == second.job.id
    with pytest.raises(IdempotencyMismatch):
        bench.jobs.submit("ada", request, "key-1", "hash-b")


def test_an_owner_sees_nothing_of_others(bench: Bench) -> None:
    job = bench.submit(owner="ada")
    bench.work_off(job)
    (artefact,) = bench.jobs.artefacts("ada", job.id)
    for call in (
        lambda: bench.jobs.get("eve", job.id),
        lambda: bench.jobs.cancel("eve", job.id),
        lambda: bench.jobs.retry("eve", job.id),
        lambda: bench.jobs.events("eve", job.id),
        lambda: bench.jobs.tensors("eve", job.id),
        lambda: bench.jobs.artefacts("eve", job.id),
        lambda: bench.jobs.artefact("eve", artefact.id),
        lambda: bench.jobs.allocation("eve", job.id),
        lambda: bench.submit(job.checkpoint, owner="eve"),
    ):
        with pytest.raises(NotFound):
            call()
    assert bench.jobs.list("eve").items == ()
    assert bench.jobs.usage("eve").checkpoint_bytes == 0


def test_jobs_are_listed_newest_first_in_pages_and_by_filter(bench: Bench) -> None:
    checkpoint = bench.checkpoint()
    made = [bench.submit(checkpoint, labels={"n": str(number)}).id for number in range(5)]
    bench.jobs.cancel("ada", made[0])
    first = bench.jobs.list("ada", limit=3)
    rest = bench.jobs.list("ada", limit=3, cursor=first.next_cursor)
    assert [job.id for job in (*first.items, *rest.items)] == made[::-1]
    assert rest.next_cursor is None
    assert [job.id for job in bench.jobs.list("ada", status="cancelled").items] == [made[0]]
    assert [job.id for job in bench.jobs.list("ada", label="n=2").items] == [made[2]]
    assert len(bench.jobs.list("ada", label="n").items) == 5
    assert bench.jobs.list("ada", checkpoint=bench.checkpoint()).items == ()


def test_the_quota_of_waiting_jobs_holds(bench: Bench) -> None:
    narrow = bench.with_settings(max_queued_jobs=1)
    narrow.submit()
    with pytest.raises(QuotaExceeded):
        narrow.submit()


def test_a_plan_needs_stored_sensitivities_and_ends_with_the_allocation(bench: Bench) -> None:
    checkpoint = bench.checkpoint()
    job = bench.submit(checkpoint)
    request = SubmitJob(checkpoint=checkpoint, recipe={**job.recipe, "target": {"bits_per_param": 3.0}})
    with pytest.raises(Conflict, match="no stored sensitivities"):
        bench.jobs.plan("ada", request)
    bench.work_off(job)
    plan = bench.jobs.plan("ada", request)
    assert bench.states(plan) == {"fetch": "reused", "calibrate": "reused", "allocate": "ready"}
    bench.finish(plan, "allocate")
    assert bench.now(plan).status == "succeeded"
    allocation = bench.jobs.allocation("ada", plan.id)
    assert allocation is not None
    assert allocation["values"] == {"predicted_kl": 0.125}
    assert plan.id not in [listed.id for listed in bench.jobs.list("ada").items]


def test_without_a_broker_a_job_is_accepted_and_sent_later(bench: Bench) -> None:
    bench.outbox.down = True
    job = bench.submit()
    assert job.status == "queued"
    assert bench.reconciler.run_once()["redispatched"] == 0
    bench.outbox.down = False
    assert bench.reconciler.run_once()["redispatched"] == 1
    assert bench.outbox.ids() == [bench.step(job, "fetch").id]
