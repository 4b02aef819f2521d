"""Webhooks over HTTP and from the command line: registered once, tested, read, deleted, and one's own only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import Engine
from standardwebhooks import Webhook as Standard
from starlette.testclient import TestClient

from api.main import create_app
from cli.main import run
from core.config import Settings
from core.jobs.access import AccessService
from core.jobs.deliveries import Deliverer
from tests.service.api.conftest import running
from tests.service.api.test_api_service import problem
from tests.service.receiver import Receiver, receiving

if TYPE_CHECKING:
    from tests.service.api.conftest import Kit
    from tests.service.conftest import Bench

PUBLIC = "https://example.org/hook"
KINDS = ["job.started", "job.succeeded", "job.failed", "job.cancelled", "job.expired"]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"allow_private_webhooks": True, "max_webhooks": 3})


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


def make(client: TestClient, url: str = PUBLIC, **more: Any) -> dict[str, Any]:
    answer = client.post("/v1/webhooks", json={"url": url, **more})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def test_a_webhook_is_made_with_a_secret_that_is_told_once(ada: TestClient) -> None:
    answer = ada.post("/v1/webhooks", json={"url": PUBLIC})
    made = answer.json()
    assert (answer.status_code, made["url"], made["kinds"]) == (201, PUBLIC, KINDS)
    assert made["secret"].startswith("whsec_")
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Location"] == f"/v1/webhooks/{made['id']}"
    shown = {key: value for key, value in made.items() if key != "secret"}
    assert ada.get(answer.headers["Location"]).json() == shown
    assert ada.get("/v1/webhooks").json() == {"items": [shown], "next_cursor": None}


def test_a_repeated_request_makes_no_second_one_and_is_not_told_the_secret(ada: TestClient) -> None:
    body, headers = {"url": PUBLIC, "kinds": ["job.failed"]}, {"Idempotency-Key": "once"}
    first, again = (ada.post("/v1/webhooks", json=body, headers=headers) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json() | {"secret": None}
    assert len(ada.get("/v1/webhooks").json()["items"]) == 1
    place = f"/v1/webhooks/{first.json()['id']}/test"
    pings = [ada.post(place, headers={"Idempotency-Key": "ping"}).json()["id"] for _ in range(2)]
    assert pings[0] == pings[1]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "invalid_request"),
        ({"url": ""}, "address_refused"),
        ({"url": "ftp://example.org"}, "address_refused"),
        ({"url": "https://user:pass@example.org"}, "address_refused"),
        ({"url": "https://169.254.169.254/latest"}, "address_refused"),
        ({"url": "https://example.org/" + "a" * 2048}, "invalid_request"),
        ({"url": PUBLIC, "kinds": ["job.queued"]}, "invalid_request"),
        ({"url": PUBLIC, "kinds": ["ping"]}, "invalid_request"),
        ({"url": PUBLIC, "kinds": ["job.failed"] * 6}, "invalid_request"),
        ({"url": PUBLIC, "secret": "mine"}, "invalid_request"),
    ],
)
def test_what_no_webhook_can_be_is_refused(ada: TestClient, body: dict[str, Any], code: str) -> None:
    problem(ada.post("/v1/webhooks", json=body), 422, code)
    assert ada.get("/v1/webhooks").json()["items"] == []


@pytest.mark.parametrize("url", ["http://example.org/", "https://10.0.0.1/", "https://localhost/"])
def test_private_receivers_are_refused_unless_they_are_allowed(settings: Settings, url: str) -> None:
    usual = settings.model_copy(update={"auth": "off", "allow_private_webhooks": False})
    with TestClient(create_app(usual)) as client:
        assert problem(client.post("/v1/webhooks", json={"url": url}), 422, "address_refused")["where"] == "url"


def test_one_too_many_is_refused(ada: TestClient, eve: TestClient) -> None:
    for _ in range(3):
        make(ada)
    problem(ada.post("/v1/webhooks", json={"url": PUBLIC}), 429, "quota_exceeded")
    make(eve)


def test_another_owner_sees_and_does_nothing_with_it(ada: TestClient, eve: TestClient, kit: Kit) -> None:
    place = f"/v1/webhooks/{make(ada)['id']}"
    for answer in (
        eve.get(place),
        eve.delete(place),
        eve.get(f"{place}/deliveries"),
        eve.post(f"{place}/test"),
        eve.post(
            "/v1/jobs", json={"checkpoint": kit.checkpoint(eve), "recipe": "fast", "webhook": place.rpartition("/")[2]}
        ),
    ):
        problem(answer, 404, "not_found")
    assert eve.get("/v1/webhooks").json()["items"] == []
    assert ada.get(place).status_code == 200


def test_reading_does_not_allow_writing(ada: TestClient, caller: Callable[..., TestClient]) -> None:
    reader, place = caller("ada", "read"), f"/v1/webhooks/{make(ada)['id']}"
    for allowed in (reader.get("/v1/webhooks"), reader.get(place), reader.get(f"{place}/deliveries")):
        assert allowed.status_code == 200
    for answer in (
        reader.post("/v1/webhooks", json={"url": PUBLIC}),
        reader.delete(place),
        reader.post(f"{place}/test"),
    ):
        problem(answer, 403, "forbidden")


def test_a_job_tells_the_webhook_that_it_names_and_the_log_says_so(
    ada: TestClient, kit: Kit, bench: Bench, receiver: Receiver, engine: Engine, settings: Settings
) -> None:
    made = make(ada, receiver.url, kinds=[])
    body = {"checkpoint": kit.checkpoint(ada), "recipe": "fast", "webhook": made["id"]}
    job = ada.post("/v1/jobs", json=body).json()
    assert job["webhook"] == made["id"]
    bench.work_off(bench.jobs.get("ada", job["id"]))
    deliverer = Deliverer(engine, settings)
    while deliverer.run_once():
        pass
    messages = [Standard(made["secret"]).verify(got.body, got.headers) for got in receiver.received]
    assert [message["type"] for message in messages] == ["job.started", "job.succeeded"]
    assert messages[-1]["data"] == ada.get(f"/v1/jobs/{job['id']}").json()
    first = ada.get(f"/v1/webhooks/{made['id']}/deliveries", params={"limit": 1}).json()
    query = {"limit": 1, "cursor": first["next_cursor"]}
    second = ada.get(f"/v1/webhooks/{made['id']}/deliveries", params=query).json()
    log = [*first["items"], *second["items"]]
    assert second["next_cursor"] is None
    assert [(row["kind"], row["state"], row["job"]) for row in log] == [
        ("job.succeeded", "delivered", job["id"]),
        ("job.started", "delivered", job["id"]),
    ]


def test_a_test_is_accepted_and_a_deleted_webhook_takes_none(ada: TestClient) -> None:
    place = f"/v1/webhooks/{make(ada)['id']}"
    sent = ada.post(f"{place}/test")
    assert (sent.status_code, sent.json()["kind"], sent.json()["state"]) == (202, "ping", "pending")
    assert ada.get(sent.headers["Location"]).json()["items"] == [sent.json()]
    assert ada.delete(place).status_code == 204
    for answer in (ada.delete(place), ada.get(place), ada.post(f"{place}/test"), ada.get(f"{place}/deliveries")):
        problem(answer, 404, "not_found")


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The object on stdout, after what the service in this process logs there."""
    text = capsys.readouterr().out
    found: dict[str, Any] = json.loads(text[text.index("{\n") :])
    return found


def test_the_command_line_makes_tests_lists_and_deletes(
    app: FastAPI, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    key = AccessService(engine).create_key("ada", ["write"]).secret
    with running(app) as url:
        plain = ["--url", url, "--key", key]
        service = [*plain, "--json"]
        assert run(["webhooks", "create", PUBLIC, "--kind", "job.failed", "--kind", "job.expired", *service]) == 0
        made = told(capsys)
        assert made["kinds"] == ["job.failed", "job.expired"]
        assert run(["webhooks", "create", PUBLIC, "--named-only", *service]) == 0
        assert told(capsys)["kinds"] == []
        assert run(["webhooks", "create", PUBLIC, *plain]) == 0
        assert "\nwhsec_" in capsys.readouterr().out
        assert run(["webhooks", "create", "https://user:pass@example.org", *service]) == 2
        assert told(capsys)["error"]["code"] == "address_refused"
        assert run(["webhooks", "test", made["id"], *service]) == 0
        sent = told(capsys)
        assert run(["webhooks", "deliveries", made["id"], *service]) == 0
        assert told(capsys)["items"] == [sent]
        assert run(["webhooks", "deliveries", made["id"], *plain]) == 0
        assert "next attempt" in capsys.readouterr().out
        assert run(["webhooks", "delete", made["id"], *service]) == 0
        assert told(capsys) == {"id": made["id"], "deleted": True}
        assert run(["webhooks", "test", made["id"], *service]) == 2
        assert told(capsys)["error"]["code"] == "not_found"
        assert run(["webhooks", "list", *service]) == 0
        assert len(told(capsys)["items"]) == 2
        assert run(["webhooks", "list", *plain]) == 0
        assert "failing since" in capsys.readouterr().out


def test_the_document_describes_them(served: httpx.Client) -> None:
    paths = served.get("/openapi.json").json()["paths"]
    found = {(method, path) for path, methods in paths.items() for method in methods if "webhooks" in path}
    assert found == {
        ("post", "/v1/webhooks"),
        ("get", "/v1/webhooks"),
        ("get", "/v1/webhooks/{webhook_id}"),
        ("delete", "/v1/webhooks/{webhook_id}"),
        ("get", "/v1/webhooks/{webhook_id}/deliveries"),
        ("post", "/v1/webhooks/{webhook_id}/test"),
    }
