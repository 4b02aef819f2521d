"""Jobs over HTTP: submitted, looked at, cancelled, retried; refused at once for what can be known at once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from starlette.testclient import TestClient

from api.dependencies import Idempotency
from api.schemas import NewCheckpoint
from core.errors import NonFiniteWeights
from core.jobs.idempotency import IdempotencyService
from core.recipe.recipe import presets

if TYPE_CHECKING:
    from tests.service.api.conftest import Kit
    from tests.service.conftest import Bench

FAST = {"recipe": "fast"}


def test_a_submitted_job_is_answered_with_its_place(ada: TestClient, kit: Kit) -> None:
    found = kit.checkpoint(ada)
    body = {"checkpoint": found, **FAST, "name": "first", "labels": {"team": "nlp"}, "limits": {"max_runtime_s": 60}}
    made = ada.post("/v1/jobs", json=body)
    assert made.status_code == 201, made.text
    job = made.json()
    assert made.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert ada.get(made.headers["Location"]).json()["id"] == job["id"]
    assert (job["status"], job["name"], job["labels"], job["checkpoint"]) == ("queued", "first", {"team": "nlp"}, found)
    assert job["recipe"] == presets()["fast"].canonical()
    assert job["limits"] == {"max_pending_s": None, "max_runtime_s": 60.0}
    assert [step["kind"] for step in job["steps"]] == ["fetch", "allocate", "quantise", "assemble", "export"]


def test_a_recipe_may_be_written_out(ada: TestClient, kit: Kit) -> None:
    recipe = {"target": {"bits_per_param": 6}, "format": "int4@64", "allocation": "uniform", "evaluation": False}
    made = ada.post("/v1/jobs", json={"checkpoint": kit.checkpoint(ada), "recipe": recipe})
    assert made.status_code == 201, made.text
    assert made.json()["recipe"]["rounding"] == {"name": "nearest"}


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"recipe": "defualt"}, "invalid_recipe", "recipe"),
    ({"recipe": "/etc/passwd"}, "invalid_recipe", "recipe"),
    ({"recipe": {"target": {"bits_per_param": 4}, "format": "int4@64", "gruops": "auto"}}, "invalid_recipe", "gruops"),
    ({"recipe": {"target": {"bits_per_param": 0.5}, "format": "int4@64", "allocation": "uniform",
                 "evaluation": False}}, "infeasible_target", "target"),
    ({"recipe": {"target": {"bits_per_param": 4}, "format": "int4@64",
                 "calibration": {"text": "/etc/passwd"}}}, "path_not_allowed", "calibration.text"),
    ({"recipe": {"target": {"bits_per_param": 4}, "format": "int4@64", "allocation": "uniform",
                 "evaluation": {"text": "notes.txt"}}}, "path_not_allowed", "evaluation.text"),
    ({"webhook": "https://example.org"}, "not_found", "https://example.org"),
    ({"checkpoint": "ckpt_unknown"}, "not_found", "ckpt_unknown"),
    ({"lables": {}}, "invalid_request", "lables"),
    ({"name": "a\0b"}, "invalid_request", ""),
    ({"name": "half a pair \ud800"}, "invalid_request", ""),
    ({"limits": {"max_runtime_s": -1}}, "invalid_request", "limits.max_runtime_s"),
]  # fmt: skip


def test_what_is_wrong_is_refused_by_its_place(ada: TestClient, kit: Kit) -> None:
    checkpoint = kit.checkpoint(ada)
    for change, code, where in WRONG:
        body = json.dumps({"checkpoint": checkpoint, **FAST, **change})
        refused = ada.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        problem = refused.json()
        assert (refused.status_code, problem["code"]) == (404 if code == "not_found" else 422, code), problem
        assert problem["where"].startswith(where), problem
    assert ada.get("/v1/jobs").json()["items"] == [], "nothing was queued"


def test_a_misspelt_preset_is_told_the_nearest(ada: TestClient, kit: Kit) -> None:
    refused = ada.post("/v1/jobs", json={"checkpoint": kit.checkpoint(ada), "recipe": "defualt"})
    assert refused.json()["hint"] == "did you mean default?"


def test_a_recipe_that_needs_a_tokenizer_is_refused_before_it_is_queued(ada: TestClient, kit: Kit) -> None:
    refused = ada.post("/v1/jobs", json={"checkpoint": kit.checkpoint(ada), "recipe": "default"})
    assert (refused.status_code, refused.json()["code"]) == (422, "missing_file")


def test_the_same_key_makes_one_job(ada: TestClient, eve: TestClient, kit: Kit) -> None:
    body, key = {"checkpoint": kit.checkpoint(ada), **FAST}, {"Idempotency-Key": "k"}
    first, second = (ada.post("/v1/jobs", json=body, headers=key) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["id"] == second.json()["id"]
    assert ("Idempotency-Replayed" in first.headers, second.headers["Idempotency-Replayed"]) == (False, "true")
    other = ada.post("/v1/jobs", json={**body, "name": "another"}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    hers = {"checkpoint": kit.checkpoint(eve), **FAST}
    assert eve.post("/v1/jobs", json=hers, headers=key).status_code == 201, "keys belong to owners"


def test_a_key_whose_request_is_in_flight_is_a_conflict(ada: TestClient, bench: Bench) -> None:
    body = NewCheckpoint.model_validate({"source": {"hf": {"repo": "org/name"}}})
    same = Idempotency("k", "/v1/checkpoints").body_hash(body)
    IdempotencyService(bench.engine).begin("ada", "k", same)
    busy = ada.post("/v1/checkpoints", json=body.model_dump(mode="json"), headers={"Idempotency-Key": "k"})
    assert (busy.status_code, busy.json()["code"]) == (409, "conflict")


def test_polling_with_the_etag_answers_nothing_until_something_is_new(ada: TestClient, bench: Bench) -> None:
    job = bench.submit()
    first = ada.get(f"/v1/jobs/{job.id}")
    etag = first.headers["ETag"]
    assert etag.startswith('"')
    again = ada.get(f"/v1/jobs/{job.id}", headers={"If-None-Match": f'"other", {etag}'})
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", etag)
    bench.finish(job, "fetch")
    assert ada.get(f"/v1/jobs/{job.id}", headers={"If-None-Match": etag}).status_code == 200


def test_a_finished_job_tells_everything_that_the_contract_names(ada: TestClient, bench: Bench) -> None:
    job = bench.submit()
    bench.work_off(job)
    found = ada.get(f"/v1/jobs/{job.id}").json()
    assert found["status"] == "succeeded"
    assert set(found) >= {
        "id", "status", "created_at", "started_at", "finished_at", "recipe", "checkpoint", "steps", "progress", "eta_s",
        "summary", "failure",
    }  # fmt: skip
    assert set(found["summary"]) == {
        "bits_per_param", "size_bytes", "kl_mean", "perplexity", "reference_perplexity", "predicted_kl",
    }  # fmt: skip
    tensors = ada.get(f"/v1/jobs/{job.id}/tensors").json()["items"]
    assert [(row["name"], row["shape"], row["bits"]) for row in tensors] == [(f"w{i}", [2, 3], 4.25) for i in range(3)]


def test_a_failure_is_told_with_its_class_and_place(ada: TestClient, bench: Bench) -> None:
    job = bench.submit()
    claim = bench.claim(job, "fetch")
    bench.queue.fail(claim.attempt_id, NonFiniteWeights("NaN", where="layer.weight", hint="look at the source"))
    failure = ada.get(f"/v1/jobs/{job.id}").json()["failure"]
    assert failure == {
        "code": "non_finite_weights", "class": "numerical", "retryable": False, "step": "fetch",
        "tensor": "layer.weight", "where": "layer.weight", "detail": "NaN", "hint": "look at the source",
    }  # fmt: skip


def test_jobs_are_listed_newest_first_in_pages_and_by_filters(ada: TestClient, bench: Bench) -> None:
    checkpoint = bench.checkpoint()
    jobs = [bench.submit(checkpoint, labels={"n": str(n)}).id for n in range(3)]
    other = bench.submit()
    first = ada.get("/v1/jobs", params={"limit": 3}).json()
    rest = ada.get("/v1/jobs", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [job["id"] for job in first["items"] + rest["items"]] == [other.id, *jobs[::-1]]
    assert rest["next_cursor"] is None

    def listed(**query: str) -> list[str]:
        return [job["id"] for job in ada.get("/v1/jobs", params=query).json()["items"]]

    assert listed(checkpoint=checkpoint) == jobs[::-1]
    assert listed(label="n=1") == [jobs[1]]
    assert listed(label="n") == jobs[::-1]
    assert listed(status="running") == []


def test_a_listing_refuses_parameters_that_it_does_not_know(ada: TestClient) -> None:
    wrong: list[dict[str, Any]] = [{"limit": 0}, {"limit": 201}, {"status": "lost"}, {"cursor": "x!"}, {"stauts": "x"}]
    for query in wrong:
        assert ada.get("/v1/jobs", params=query).status_code == 422, query


def test_cancelling_is_accepted_and_then_done(ada: TestClient, bench: Bench) -> None:
    queued, running = bench.submit(), bench.submit()
    bench.claim(running, "fetch")
    first = ada.post(f"/v1/jobs/{queued.id}/cancel")
    assert (first.status_code, first.json()["status"]) == (200, "cancelled")
    second = ada.post(f"/v1/jobs/{running.id}/cancel")
    assert (second.status_code, second.json()["status"]) == (202, "cancelling")
    assert ada.post(f"/v1/jobs/{running.id}/cancel").status_code == 202, "once is like twice"


def test_a_job_that_has_ended_cannot_be_cancelled_and_only_bad_ends_are_retried(ada: TestClient, bench: Bench) -> None:
    job = bench.submit()
    bench.work_off(job)
    assert ada.post(f"/v1/jobs/{job.id}/cancel").json()["code"] == "conflict"
    assert ada.post(f"/v1/jobs/{job.id}/retry").status_code == 409


def test_a_retry_is_a_new_job_and_its_key_makes_one(ada: TestClient, bench: Bench) -> None:
    job = bench.submit()
    ada.post(f"/v1/jobs/{job.id}/cancel")
    made = [ada.post(f"/v1/jobs/{job.id}/retry", headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert {answer.status_code for answer in made} == {201}
    assert len({answer.json()["id"] for answer in made}) == 1
    assert made[0].json()["retry_of"] == job.id
    assert made[0].headers["Location"] == f"/v1/jobs/{made[0].json()['id']}"


def test_the_quota_of_waiting_jobs_is_answered_with_when_to_come_back(bench: Bench, ada: TestClient, kit: Kit) -> None:
    services = ada.app.state.services  # type: ignore[attr-defined]
    services.jobs.settings = services.settings.model_copy(update={"max_queued_jobs": 1})
    body = {"checkpoint": kit.checkpoint(ada), **FAST}
    assert ada.post("/v1/jobs", json=body).status_code == 201
    refused = ada.post("/v1/jobs", json=body)
    assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
    assert int(refused.headers["Retry-After"]) > 0


def test_another_owner_sees_and_changes_nothing_of_a_job(eve: TestClient, bench: Bench) -> None:
    job = bench.submit()
    for verb in ("", "/events", "/tensors", "/artefacts"):
        assert eve.get(f"/v1/jobs/{job.id}{verb}").status_code == 404, verb
    for verb in ("cancel", "retry"):
        assert eve.post(f"/v1/jobs/{job.id}/{verb}").status_code == 404, verb
    assert eve.get("/v1/jobs").json()["items"] == []
    assert bench.now(job).status == "queued"
