"""Keys over HTTP: made once, shown never again, revoked for good, and only administered by admins."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from cli.main import run
from tests.service.api.conftest import ADMIN, running
from tests.service.api.test_api_service import problem


@pytest.fixture
def admin(app: FastAPI, nobody: TestClient) -> TestClient:
    return TestClient(app, headers={"Authorization": f"Bearer {ADMIN}"}, raise_server_exceptions=False)


def opens(nobody: TestClient, secret: str) -> bool:
    return nobody.get("/v1/jobs", headers={"Authorization": f"Bearer {secret}"}).status_code == 200


def test_a_key_that_is_made_opens_its_owners_things_until_it_is_revoked(admin: TestClient, nobody: TestClient) -> None:
    answer = admin.post("/v1/keys", json={"owner": "ada", "scopes": ["write"]})
    made = answer.json()
    assert (answer.status_code, made["owner"], made["scopes"]) == (201, "ada", ["write"])
    assert answer.headers["Cache-Control"] == "no-store"
    assert made["secret"].startswith(made["prefix"])
    assert opens(nobody, made["secret"])
    (listed,) = admin.get("/v1/keys", params={"owner": "ada"}).json()["items"]
    assert listed == {key: value for key, value in made.items() if key != "secret"}
    assert admin.delete(f"/v1/keys/{made['id']}", params={"owner": "ada"}).status_code == 204
    assert not opens(nobody, made["secret"])
    assert admin.get("/v1/keys", params={"owner": "ada"}).json()["items"][0]["revoked_at"]
    problem(admin.delete(f"/v1/keys/{made['id']}", params={"owner": "ada"}), 404, "not_found")


def test_a_repeated_request_makes_no_second_key_and_is_not_told_the_secret(admin: TestClient) -> None:
    body, headers = {"owner": "ada", "scopes": ["read"]}, {"Idempotency-Key": "once"}
    first, again = (admin.post("/v1/keys", json=body, headers=headers) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json() | {"secret": None}
    assert len(admin.get("/v1/keys", params={"owner": "ada"}).json()["items"]) == 1


@pytest.mark.parametrize("scope", ["read", "write"])
def test_keys_are_for_admins(caller: Callable[..., TestClient], nobody: TestClient, scope: str) -> None:
    ada = caller("ada", scope)
    for answer in (ada.get("/v1/keys"), ada.post("/v1/keys", json={"scopes": ["read"]}), ada.delete("/v1/keys/key_1")):
        problem(answer, 403, "forbidden")
    problem(nobody.get("/v1/keys"), 401, "unauthenticated")


def test_the_key_that_asks_is_not_revoked(admin: TestClient) -> None:
    (own,) = admin.get("/v1/keys").json()["items"]
    problem(admin.delete(f"/v1/keys/{own['id']}"), 409, "conflict")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"scopes": []},
        {"scopes": ["root"]},
        {"scopes": ["read"], "owner": ""},
        {"scopes": ["read"], "owner": "a/b"},
        {"scopes": ["read"], "owner": "\u202eada"},
        {"scopes": ["read"], "secret": "mine"},
    ],
)
def test_what_no_key_can_be_is_refused(admin: TestClient, body: dict[str, object]) -> None:
    problem(admin.post("/v1/keys", json=body), 422, "invalid_request")


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The object on stdout, after what the service in this process logs there."""
    text = capsys.readouterr().out
    found: dict[str, Any] = json.loads(text[text.index("{\n") :])
    return found


def test_the_command_line_makes_lists_and_revokes(app: FastAPI, capsys: pytest.CaptureFixture[str]) -> None:
    with running(app) as url:
        service = ["--url", url, "--key", ADMIN, "--json"]
        assert run(["keys", "create", "--scope", "read", "--scope", "write", "--owner", "ada", *service]) == 0
        made = told(capsys)
        assert made["scopes"] == ["read", "write"]
        assert run(["keys", "list", "--url", url, "--key", made["secret"], "--json"]) == 2
        assert told(capsys)["error"]["code"] == "forbidden"
        assert run(["keys", "revoke", made["id"], "--owner", "ada", *service]) == 0
        told(capsys)
        assert run(["keys", "list", "--owner", "ada", *service]) == 0
        assert told(capsys)["items"][0]["revoked_at"]
        assert run(["keys", "create", "--scope", "read", "--url", url, "--key", ADMIN]) == 0
        assert "\nbm_" in capsys.readouterr().out
        assert run(["keys", "list", "--url", url, "--key", ADMIN]) == 0
        assert "begins with" in capsys.readouterr().out
