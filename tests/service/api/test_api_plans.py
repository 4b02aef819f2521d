"""Plans over HTTP: an allocation for another target, from what is stored, waited for or looked at later."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from api.routes import plans
from core.errors import InfeasibleTarget
from core.jobs.sessions import reading
from core.jobs.tables import Step
from core.jobs.views import JobView

if TYPE_CHECKING:
    from tests.service.api.conftest import Kit
    from tests.service.conftest import Bench

PLAN = {
    "tensors": [{"name": "w", "format": "int4@128:absmax:bf16", "bits": 4.125, "stored_bytes": 66, "fisher_mean": 0.5,
                 "predicted_kl": 0.01}],
    "predicted_bytes": 1000, "predicted_bits_per_param": 4.2, "predicted_kl": 0.01, "warnings": ["two rounds"],
    "rounds": [],
}  # fmt: skip


def recipe(bits: float) -> dict[str, Any]:
    """Differs from the recipe of `bench` in its target only, so that its sensitivities are stored."""
    return {
        "target": {"bits_per_param": bits}, "format": "int4-asym@128:absmax:bf16", "allocation": "fisher",
        "calibration": {"text": "builtin", "sequences": 4, "sequence_length": 32, "seed": 0},
        "evaluation": False,
    }  # fmt: skip


def allocate(bench: Bench, job_id: str) -> None:
    """Do the allocate step of a plan, as a worker would."""
    job: JobView = bench.jobs.get("ada", job_id)
    claim = bench.claim(job, "allocate")
    bench.store.put_bytes(f"plans/{job_id}", json.dumps(PLAN).encode())
    file = {"key": f"plans/{job_id}", "sha256": "0" * 64, "size": 1}
    assert bench.queue.succeed(claim.attempt_id, {"files": {"allocation.json": file}, "values": {"predicted_kl": 0.01}})


def waiting(bench: Bench) -> str | None:
    """A job whose allocate step is ready to be claimed."""
    with reading(bench.engine) as session:
        return session.scalar(select(Step.job_id).where(Step.kind == "allocate", Step.state == "ready"))


@pytest.fixture
def planned(ada: TestClient, kit: Kit, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """POST a plan on a checkpoint whose sensitivities a finished job has left; not waited for unless asked."""
    checkpoint = kit.checkpoint(ada, {**kit.model_files(), "tokenizer.json": b"{}"})
    bench.work_off(bench.submit(checkpoint))

    def post(bits: float = 3.0, wait_s: float = 0.0, **headers: str) -> Any:
        monkeypatch.setattr(plans, "WAIT_S", wait_s)
        return ada.post("/v1/plans", json={"checkpoint": checkpoint, "recipe": recipe(bits)}, headers=headers)

    return post


def test_a_plan_that_takes_longer_is_accepted_and_found_later(
    ada: TestClient, bench: Bench, planned: Callable[..., Any]
) -> None:
    accepted = planned()
    assert accepted.status_code == 202, accepted.text
    assert int(accepted.headers["Retry-After"]) > 0
    place = accepted.headers["Location"]
    assert place == f"/v1/plans/{accepted.json()['id']}"
    assert ada.get(place).status_code == 202
    allocate(bench, accepted.json()["id"])
    plan = ada.get(place)
    assert plan.status_code == 200
    assert plan.json()["predicted_size_bytes"] == 1000
    assert plan.json()["predicted_bits_per_param"] == 4.2
    assert plan.json()["warnings"] == ["two rounds"]
    assert plan.json()["tensors"] == PLAN["tensors"]
    assert accepted.json()["id"] not in [job["id"] for job in ada.get("/v1/jobs").json()["items"]]


def test_a_plan_that_is_quick_is_the_answer(bench: Bench, planned: Callable[..., Any]) -> None:
    def work() -> None:
        deadline = time.monotonic() + 10
        while (job_id := waiting(bench)) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        allocate(bench, str(job_id))

    worker = threading.Thread(target=work)
    worker.start()
    answer = planned(wait_s=10.0)
    worker.join()
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded"), answer.text
    assert answer.json()["predicted_kl"] == 0.01


def test_without_stored_sensitivities_it_says_what_is_missing(ada: TestClient, bench: Bench) -> None:
    refused = ada.post("/v1/plans", json={"checkpoint": bench.checkpoint(), "recipe": recipe(3.0)})
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert refused.json()["errors"] == [{"path": "calibration", "message": "step calibrate has not been done"}]


def test_a_plan_that_fails_answers_with_the_reason(ada: TestClient, bench: Bench, planned: Callable[..., Any]) -> None:
    plan_id = planned().json()["id"]
    claim = bench.claim(bench.jobs.get("ada", plan_id), "allocate")
    bench.queue.fail(claim.attempt_id, InfeasibleTarget("the target is below 2.1 bits", hint="ask for more"))
    failed = ada.get(f"/v1/plans/{plan_id}")
    assert (failed.status_code, failed.json()["code"], failed.json()["hint"]) == (
        422, "infeasible_target", "ask for more",
    )  # fmt: skip


def test_a_key_makes_one_plan(planned: Callable[..., Any]) -> None:
    assert planned(**{"Idempotency-Key": "k"}).json()["id"] == planned(**{"Idempotency-Key": "k"}).json()["id"]
    assert planned(bits=5.0, **{"Idempotency-Key": "k"}).status_code == 422


def test_another_owner_sees_no_plan(eve: TestClient, planned: Callable[..., Any]) -> None:
    assert eve.get(f"/v1/plans/{planned().json()['id']}").status_code == 404
