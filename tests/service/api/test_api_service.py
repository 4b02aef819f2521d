"""What holds for the whole service: keys and scopes, problem documents, health, numbers, catalogues and pages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from sqlalchemy import Engine
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from api.main import create_app
from api.middleware import MAX_BODY_BYTES
from core.config import Settings
from core.jobs.access import AccessService
from core.jobs.workers import WorkerRegistry

if TYPE_CHECKING:
    from tests.service.conftest import Bench

ADMIN = {"Authorization": "Bearer bm_bootstrap_0123456789"}
PROBLEM = {
    "type", "title", "status", "detail", "code", "class", "retryable", "request_id", "where", "hint", "errors",
}  # fmt: skip


def problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    """The problem document of an answer, checked for its form."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert set(body) >= PROBLEM
    assert (body["status"], body["code"]) == (status, code)
    assert body["request_id"] == answer.headers["X-Request-Id"]
    return body


class TestAccess:
    """Keys, scopes and owners."""

    def test_without_a_key_the_door_says_what_it_wants(self, nobody: TestClient) -> None:
        answer = nobody.get("/v1/jobs")
        problem(answer, 401, "unauthenticated")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")

    @pytest.mark.parametrize("given", ["Bearer wrong", "Basic YTpi", "Bearer"])
    def test_a_key_that_is_none_is_refused(self, nobody: TestClient, given: str) -> None:
        problem(nobody.get("/v1/jobs", headers={"Authorization": given}), 401, "unauthenticated")

    def test_the_key_of_the_settings_works_from_the_start(self, nobody: TestClient) -> None:
        assert nobody.get("/v1/jobs", headers=ADMIN).status_code == 200

    def test_reading_does_not_allow_writing(self, caller: Callable[..., TestClient], bench: Bench) -> None:
        reader, job = caller("ada", "read"), bench.submit()
        assert reader.get(f"/v1/jobs/{job.id}").status_code == 200
        problem(reader.post(f"/v1/jobs/{job.id}/cancel"), 403, "forbidden")
        problem(reader.post("/v1/jobs", json={"checkpoint": "x", "recipe": "fast"}), 403, "forbidden")

    def test_a_revoked_key_is_of_no_use(self, ada: TestClient, engine: Engine) -> None:
        [key] = AccessService(engine).list_keys("ada")
        AccessService(engine).revoke("ada", key.id)
        assert ada.get("/v1/jobs").status_code == 401

    def test_every_route_of_v1_wants_a_key(self, app: FastAPI, nobody: TestClient) -> None:
        for path, methods in app.openapi()["paths"].items():
            for method in methods:
                if path.startswith("/v1"):
                    place = re.sub(r"\{[^}]*\}", "1", path)
                    assert nobody.request(method.upper(), place, json={}).status_code == 401, (method, path)

    def test_where_authentication_is_off_everybody_is_local(self, settings: Settings) -> None:
        with TestClient(create_app(settings.model_copy(update={"auth": "off"}))) as client:
            assert client.get("/v1/jobs").json() == {"items": [], "next_cursor": None}


class TestProblems:
    """Every error has one form."""

    def test_a_path_that_is_not_there(self, nobody: TestClient) -> None:
        problem(nobody.get("/v2/jobs"), 404, "not_found")
        problem(nobody.get("/v1/jobs/"), 404, "not_found")

    def test_a_method_that_is_not_allowed(self, nobody: TestClient) -> None:
        answer = nobody.delete("/v1/jobs")
        problem(answer, 405, "method_not_allowed")
        assert answer.headers["Allow"] == "GET, POST"

    def test_a_body_that_is_not_json(self, ada: TestClient) -> None:
        sent = {"Content-Type": "application/json"}
        problem(ada.post("/v1/jobs", content=b"{", headers=sent), 400, "malformed_request")
        problem(ada.post("/v1/jobs", content=b"[" * 100_000, headers=sent), 400, "malformed_request")

    def test_a_number_that_json_does_not_have(self, ada: TestClient) -> None:
        body = b'{"checkpoint": "c", "recipe": {"target": {"bits_per_param": NaN}}}'
        answer = ada.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
        problem(answer, 422, "invalid_request")

    def test_a_body_that_does_not_validate_names_each_place(self, ada: TestClient) -> None:
        files = [{"path": "a.safetensors", "size": -1, "sha256": "0" * 64}, {"path": "b", "size": 1, "sha256": "x"}]
        body = problem(ada.post("/v1/uploads", json={"files": files}), 422, "invalid_request")
        assert [item["path"] for item in body["errors"]] == ["files[0].size", "files[1].sha256"]
        assert body["where"] == "files[0].size"

    def test_text_that_the_database_cannot_hold(self, ada: TestClient) -> None:
        problem(ada.get("/v1/jobs/job_%00"), 422, "invalid_request")
        problem(ada.get("/v1/jobs", params={"label": "a\0"}), 422, "invalid_request")

    @pytest.mark.parametrize("declared", [True, False])
    def test_a_body_above_the_limit(self, ada: TestClient, declared: bool) -> None:
        pieces = (b" " * (1 << 20) for _ in range(MAX_BODY_BYTES // (1 << 20) + 1))
        content = b"".join(pieces) if declared else pieces
        answer = ada.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
        problem(answer, 413, "payload_too_large")

    def test_a_defect_of_ours_tells_nothing_of_itself(
        self, app: FastAPI, ada: TestClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("secret detail at 10.0.0.7")

        monkeypatch.setattr(app.state.services.jobs, "list", broken)
        with capture_logs() as logged:
            body = problem(ada.get("/v1/jobs"), 500, "internal_error")
        assert "secret" not in json.dumps(body)
        failed = next(line for line in logged if line["event"] == "request_failed")
        assert (failed["request_id"], str(failed["exc_info"])) == (body["request_id"], "secret detail at 10.0.0.7")
        assert (body["class"], body["retryable"]) == ("internal", True)

    def test_a_request_keeps_the_id_that_it_came_with(self, nobody: TestClient) -> None:
        given = {"X-Request-Id": "trace-1.2_3"}
        assert nobody.get("/livez", headers=given).headers["X-Request-Id"] == "trace-1.2_3"
        assert nobody.get("/livez", headers={"X-Request-Id": "a b"}).headers["X-Request-Id"].startswith("req_")


class TestHealth:
    """Who is there."""

    def test_all_servers_are_named(self, nobody: TestClient) -> None:
        assert nobody.get("/livez").json() == {"status": "alive"}
        ready = nobody.get("/readyz")
        assert (ready.status_code, ready.json()["ready"]) == (200, True), ready.text
        assert set(ready.json()["checks"]) == {"database", "broker", "store"}

    @pytest.mark.parametrize(
        ("away", "change"),
        [
            ("database", {"database_url": "postgresql://127.0.0.1:1/none"}),
            ("broker", {"broker_url": "redis://127.0.0.1:1/0"}),
            ("store", {"store_url": "s3://bucket", "s3_endpoint": "http://127.0.0.1:1"}),
        ],
    )
    def test_a_server_that_is_away_is_named_with_the_reason(
        self, settings: Settings, away: str, change: dict[str, str]
    ) -> None:
        keys = {"s3_access_key": "a", "s3_secret_key": "b", "bootstrap_key": "bm_bootstrap_0123456789"}
        with TestClient(create_app(settings.model_copy(update={**change, **keys}))) as client:
            assert client.get("/livez").status_code == 200
            body = problem(client.get("/readyz"), 503, "store_unavailable")
        assert {name for name, check in body["checks"].items() if not check["ok"]} == {away}
        assert body["checks"][away]["why"]

    def test_without_the_database_requests_are_told_to_come_back(self, settings: Settings) -> None:
        with TestClient(
            create_app(settings.model_copy(update={"database_url": "postgresql://127.0.0.1:1/n"}))
        ) as client:
            answer = client.get("/v1/jobs", headers=ADMIN)
            problem(answer, 503, "store_unavailable")
            assert int(answer.headers["Retry-After"]) > 0
            assert "database_up 0.0" in client.get("/metrics").text

    def test_the_numbers_of_the_queue_and_of_http_are_read_together(self, ada: TestClient, bench: Bench) -> None:
        bench.work_off(bench.submit())
        ada.get("/v1/jobs/job_none")
        shown = ada.get("/metrics").text
        for line in (
            "jobs_submitted_total 1.0",
            'jobs{status="succeeded"} 1.0',
            'attempts_total{error_code="",outcome="succeeded"} 9.0',
            'step_seconds_count{kind="quantise"} 3.0',
            "oldest_queued_seconds 0.0",
            "leases_expired_total 0.0",
            "artefact_bytes_total 64.0",
            "database_up 1.0",
            'http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"} 1.0',
        ):
            assert line in shown, shown

    def test_ready_steps_are_the_depth_of_their_queue(self, nobody: TestClient, bench: Bench) -> None:
        bench.submit()
        assert 'queue_depth{queue="cpu"} 1.0' in nobody.get("/metrics").text


class TestCatalogues:
    """What there is to choose from."""

    @pytest.mark.parametrize(
        ("name", "known"), [("formats", "int"), ("roundings", "nearest"), ("exports", "bitmill"), ("recipes", "fast")]
    )
    def test_each_is_a_list_of_names_with_what_they_are(self, ada: TestClient, name: str, known: str) -> None:
        items = ada.get(f"/v1/{name}").json()["items"]
        assert known in [item["name"] for item in items]
        assert all(item["description"] for item in items)

    def test_parameters_have_schemas(self, ada: TestClient) -> None:
        [nearest] = [item for item in ada.get("/v1/roundings").json()["items"] if item["name"] == "nearest"]
        assert nearest["parameters"]["type"] == "object"
        assert "properties" in ada.get("/v1/recipes").json()["schema"]

    def test_workers_are_those_that_report(self, ada: TestClient, engine: Engine) -> None:
        WorkerRegistry(engine).hello("wrk_1", hostname="h", queues=("cpu",), device="cpu")
        [worker] = ada.get("/v1/workers").json()["items"]
        assert (worker["id"], worker["state"], worker["queues"]) == ("wrk_1", "alive", ["cpu"])

    def test_usage_counts_what_is_the_owners(self, ada: TestClient, eve: TestClient, bench: Bench) -> None:
        bench.submit()
        assert ada.get("/v1/usage").json()["queued_jobs"] == 1
        items = {item["name"]: item for item in ada.get("/v1/usage").json()["items"]}
        assert items["queued_jobs"] == {"name": "queued_jobs", "used": 1, "limit": 1000}
        assert eve.get("/v1/usage").json()["queued_jobs"] == 0


class TestDocuments:
    """The OpenAPI document and the pages."""

    def test_every_operation_has_an_id_an_answer_and_the_problem(self, app: FastAPI) -> None:
        document = app.openapi()
        operations = [one for methods in document["paths"].values() for one in methods.values()]
        names = [one["operationId"] for one in operations]
        assert len(set(names)) == len(names)
        assert {"submit_job", "get_job", "list_events", "put_part", "get_artefact_content"} <= set(names)
        for one in operations:
            assert set(one["responses"]["default"]["content"]) == {"application/problem+json"}
            assert "422" not in one["responses"]
        assert document["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"
        assert "class" in document["components"]["schemas"]["Problem"]["properties"]
        assert "HTTPValidationError" not in document["components"]["schemas"]

    def test_every_reference_of_the_document_leads_somewhere(self, nobody: TestClient) -> None:
        text = nobody.get("/openapi.json").text
        known = set(json.loads(text)["components"]["schemas"])
        assert set(re.findall(r'"#/components/schemas/([^"]+)"', text)) <= known

    @pytest.mark.parametrize("path", ["/", f"/jobs/job_{'0' * 32}", "/docs"])
    def test_pages_are_shown_to_everybody_and_load_nothing_from_elsewhere(self, nobody: TestClient, path: str) -> None:
        page = nobody.get(path)
        assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        policy = page.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert not re.search(r"https?:", policy)
        assets = re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text)
        assert assets
        for asset in assets:
            assert nobody.get(asset).status_code == 200
        assert not re.findall(r'(?:src|href)="(?:https?:)?//', page.text)
        assert not re.search(r"<script(?![^>]*src=)|style=|onclick=", page.text), "the policy forbids inline code"

    def test_a_page_of_no_job_is_not_made(self, nobody: TestClient) -> None:
        assert nobody.get('/jobs/job_"><script>').status_code == 422

    def test_the_reference_shows_every_operation(self, nobody: TestClient, app: FastAPI) -> None:
        page = nobody.get("/docs").text
        for methods in app.openapi()["paths"].values():
            for one in methods.values():
                assert f'id="{one["operationId"]}"' in page


def test_a_bootstrap_key_that_is_too_short_stops_the_start(settings: Settings) -> None:
    with (
        pytest.raises(Exception, match="at least"),
        TestClient(create_app(settings.model_copy(update={"bootstrap_key": "short"}))),
    ):
        pass


def test_scripts_name_the_elements_that_the_pages_have() -> None:
    """A page's script would fail silently in the browser at an id that its template does not have."""
    root = Path(__file__).parents[3] / "api"
    base = (root / "templates" / "base.html").read_text()
    for name in ("jobs", "job"):
        ids = set(re.findall(r'id="([\w-]+)"', base + (root / "templates" / f"{name}.html").read_text()))
        scripts = (root / "static" / f"{name}.js").read_text() + (root / "static" / "api.js").read_text()
        assert set(re.findall(r'byId\("([\w-]+)"\)', scripts)) <= ids
