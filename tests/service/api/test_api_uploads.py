"""Uploads and checkpoints over HTTP: promised, sent in parts, verified, registered, and seen by their owner only."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.testclient import TestClient

from core.config import Settings

if TYPE_CHECKING:
    from tests.service.api.conftest import Kit


def test_files_go_up_in_parts_and_become_a_checkpoint(ada: TestClient, kit: Kit) -> None:
    files = kit.model_files()
    upload_id = kit.upload(ada, files)
    completed = ada.post(f"/v1/uploads/{upload_id}/complete").json()
    assert completed["state"] == "complete"
    assert [file["path"] for file in completed["files"]] == ["config.json", "model.safetensors"]
    made = ada.post("/v1/checkpoints", json={"source": {"upload": upload_id}, "name": "small"})
    assert made.headers["Location"] == f"/v1/checkpoints/{made.json()['id']}"
    found = ada.get(made.headers["Location"]).json()
    assert (found["name"], found["state"], found["inspection"]["parameters"]) == ("small", "ready", 2 * 64 * 64)
    assert "key" not in found["files"][0], "keys of the store are not for clients"


def test_an_upload_tells_what_has_arrived_and_where_the_rest_goes(ada: TestClient, kit: Kit) -> None:
    files = kit.model_files()
    made = ada.post("/v1/uploads", json={"files": kit.promised(files)})
    upload = made.json()
    assert made.headers["Location"] == f"/v1/uploads/{upload['id']}"
    assert ada.put(upload["parts"][0]["url"], content=files["config.json"]).json()["arrived"] is True
    parts = ada.get(made.headers["Location"]).json()["parts"]
    assert [part["arrived"] for part in parts] == [True, False]
    assert parts[0]["sha256"] == hashlib.sha256(files["config.json"]).hexdigest()
    assert {"id", "state", "part_size", "files", "parts", "expires_at"} <= set(upload)
    refused = ada.post(f"/v1/uploads/{upload['id']}/complete")
    assert refused.status_code == 409
    assert refused.json()["errors"] == [{"path": "model.safetensors", "message": "part 1 has not arrived"}]


def test_a_part_of_another_length_is_refused_before_it_is_read(ada: TestClient, kit: Kit) -> None:
    upload = ada.post("/v1/uploads", json={"files": kit.promised(kit.model_files())}).json()
    refused = ada.put(upload["parts"][0]["url"], content=b"too long for this part" * 10)
    assert (refused.status_code, refused.json()["code"]) == (422, "digest_mismatch")
    assert ada.put(f"/v1/uploads/{upload['id']}/parts/0/2", content=b"x").status_code == 404


@pytest.mark.parametrize("extra", [b"", b"!"])
def test_a_part_whose_length_is_not_declared_is_counted(served: httpx.Client, kit: Kit, extra: bytes) -> None:
    files = kit.model_files()
    upload = served.post("/v1/uploads", json={"files": kit.promised(files)}).json()

    def pieces() -> Iterator[bytes]:
        data = files["model.safetensors"]
        yield from (data[start : start + 1000] for start in range(0, len(data), 1000))
        yield extra

    sent = served.put(upload["parts"][1]["url"], content=pieces())
    assert sent.status_code == (422 if extra else 200)


def test_a_part_that_breaks_off_leaves_nothing(served: httpx.Client, kit: Kit, settings: Settings) -> None:
    files = kit.model_files()
    upload = served.post("/v1/uploads", json={"files": kit.promised(files)}).json()
    place, key = urlsplit(str(served.base_url)), served.headers["Authorization"]
    head = f"PUT {upload['parts'][1]['url']} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n"
    with socket.create_connection((place.hostname or "", place.port or 0)) as connection:
        length = len(files["model.safetensors"])
        connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + files["model.safetensors"][:5000])
    parts = served.get(f"/v1/uploads/{upload['id']}").json()["parts"]
    assert [part["arrived"] for part in parts] == [False, False]
    sent = served.put(upload["parts"][1]["url"], content=files["model.safetensors"])
    assert sent.status_code == 200
    assert list((settings.scratch / "uploads").iterdir()) == []


def test_files_that_are_not_safetensors_are_refused_when_they_are_promised(ada: TestClient, kit: Kit) -> None:
    refused = ada.post("/v1/uploads", json={"files": kit.promised({"pytorch_model.bin": b"\x80"})})
    assert (refused.status_code, refused.json()["code"]) == (422, "pickle_refused")


def test_paths_that_leave_the_checkpoint_are_refused(ada: TestClient, kit: Kit) -> None:
    for path in ("../x.safetensors", "/x.safetensors", "a//x.safetensors"):
        refused = ada.post("/v1/uploads", json={"files": kit.promised({path: b"x"})})
        assert refused.json()["code"] == "path_not_allowed", path


def test_an_aborted_upload_takes_no_more_parts(ada: TestClient, kit: Kit) -> None:
    upload = ada.post("/v1/uploads", json={"files": kit.promised(kit.model_files())}).json()
    assert ada.delete(f"/v1/uploads/{upload['id']}").status_code == 204
    assert ada.put(upload["parts"][0]["url"], content=kit.model_files()["config.json"]).status_code == 409


def test_a_source_elsewhere_waits_for_the_first_job(ada: TestClient) -> None:
    bucket = {"kind": "s3", "url": "s3://bucket/prefix"}
    sources: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({"hf": {"repo": "org/name", "revision": "v1"}}, {"kind": "hf", "repo": "org/name", "revision": "v1"}),
        ({"s3": {"url": "s3://bucket/prefix"}}, bucket),
        ({"s3": "s3://bucket/prefix"}, bucket),
    ]
    for source, kept in sources:
        made = ada.post("/v1/checkpoints", json={"source": source})
        assert made.status_code == 201, made.text
        assert (made.json()["state"], made.json()["source"]) == ("pending", kept)


def test_a_local_folder_is_registered_under_an_allowed_root_only(
    ada: TestClient, kit: Kit, settings: Settings, tmp_path: Path
) -> None:
    folder = settings.allowed_roots[0] / "model"
    folder.mkdir(parents=True)
    for path, data in kit.model_files().items():
        (folder / path).write_bytes(data)
    assert ada.post("/v1/checkpoints", json={"source": {"path": str(folder)}}).json()["state"] == "ready"
    refused = ada.post("/v1/checkpoints", json={"source": {"path": str(tmp_path)}})
    assert (refused.status_code, refused.json()["code"]) == (422, "path_not_allowed")


def test_a_source_is_exactly_one_known_thing(ada: TestClient) -> None:
    wrong: list[dict[str, Any]] = [{}, {"path": "/x", "s3": "s3://bucket"}, {"ftp": "x"}, {"hf": {"repo": "no"}}]
    for source in wrong:
        refused = ada.post("/v1/checkpoints", json={"source": source})
        assert refused.status_code == 422, source
        assert refused.json()["where"].startswith("source")


def test_checkpoints_are_listed_in_pages_and_can_be_forgotten(ada: TestClient, kit: Kit) -> None:
    made = [kit.checkpoint(ada) for _ in range(3)]
    first = ada.get("/v1/checkpoints", params={"limit": 2}).json()
    rest = ada.get("/v1/checkpoints", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [item["id"] for item in first["items"] + rest["items"]] == made[::-1]
    assert "tensors" not in first["items"][0]["inspection"]
    assert ada.delete(f"/v1/checkpoints/{made[0]}").status_code == 204
    assert ada.get(f"/v1/checkpoints/{made[0]}").status_code == 404


def test_nothing_of_another_owner_can_be_seen(ada: TestClient, eve: TestClient, kit: Kit) -> None:
    upload = kit.upload(ada, kit.model_files())
    found = kit.checkpoint(ada)
    assert eve.get(f"/v1/uploads/{upload}").status_code == 404
    assert eve.put(f"/v1/uploads/{upload}/parts/0/1", content=b"x").status_code == 404
    assert eve.post(f"/v1/uploads/{upload}/complete").status_code == 404
    assert eve.delete(f"/v1/uploads/{upload}").status_code == 404
    assert eve.post("/v1/checkpoints", json={"source": {"upload": upload}}).status_code == 404
    assert eve.get(f"/v1/checkpoints/{found}").status_code == 404
    assert eve.delete(f"/v1/checkpoints/{found}").status_code == 404
    assert eve.get("/v1/checkpoints").json()["items"] == []


def test_a_key_makes_one_upload_and_one_checkpoint(ada: TestClient, kit: Kit) -> None:
    body, key = {"files": kit.promised(kit.model_files())}, {"Idempotency-Key": "k"}
    ids = {ada.post("/v1/uploads", json=body, headers=key).json()["id"] for _ in range(2)}
    assert len(ids) == 1
    source = {"source": {"hf": {"repo": "org/name"}}}
    again = {"Idempotency-Key": "l"}
    ids = {ada.post("/v1/checkpoints", json=source, headers=again).json()["id"] for _ in range(2)}
    assert len(ids) == 1
    other = ada.post("/v1/checkpoints", json={"source": {"hf": {"repo": "org/other"}}}, headers=again)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")


def test_a_key_is_free_again_when_its_request_failed(ada: TestClient, kit: Kit) -> None:
    key = {"Idempotency-Key": "k"}
    upload = kit.upload(ada, kit.model_files())
    body = {"source": {"upload": upload}}
    assert ada.post("/v1/checkpoints", json=body, headers=key).status_code == 409
    ada.post(f"/v1/uploads/{upload}/complete")
    assert ada.post("/v1/checkpoints", json=body, headers=key).status_code == 201
