"""Artefacts over HTTP: listed with digests, sent whole or by range, or by a signed URL of the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from core.jobs.sessions import writing
from core.jobs.tables import Artefact

if TYPE_CHECKING:
    from tests.service.conftest import Bench

BYTES = bytes(range(64))


@pytest.fixture
def artefact(ada: TestClient, bench: Bench) -> str:
    """The path of an artefact of 64 bytes, named beyond ASCII."""
    job = bench.submit()
    bench.work_off(job)
    bench.store.put_bytes("artefacts/sixty-four", BYTES)
    with writing(bench.engine) as session:
        session.execute(update(Artefact).values(path='tables/Größe "1".bin', size=64, key="artefacts/sixty-four"))
    [item] = ada.get(f"/v1/jobs/{job.id}/artefacts").json()["items"]
    return f"/v1/artefacts/{item['id']}/content"


def test_artefacts_are_listed_with_digest_and_size_and_without_their_key(ada: TestClient, bench: Bench) -> None:
    job = bench.submit()
    assert ada.get(f"/v1/jobs/{job.id}/artefacts").json() == {"items": []}
    bench.work_off(job)
    [item] = ada.get(f"/v1/jobs/{job.id}/artefacts").json()["items"]
    assert (item["path"], item["size"], item["sha256"], item["export"]) == (
        "model.safetensors", 64, "0" * 64, "bitmill",
    )  # fmt: skip
    assert "key" not in item


def test_an_artefact_is_sent_whole(ada: TestClient, artefact: str) -> None:
    answer = ada.get(artefact)
    assert (answer.status_code, answer.content) == (200, BYTES)
    assert answer.headers["Content-Length"] == "64"
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["ETag"] == f'"{"0" * 64}"'
    assert answer.headers["Content-Disposition"] == (
        "attachment; filename=\"Gr__e _1_.bin\"; filename*=UTF-8''Gr%C3%B6%C3%9Fe%20%221%22.bin"
    )


def test_a_range_is_sent_as_such(ada: TestClient, artefact: str) -> None:
    table = {"0-0": (0, 1), "10-19": (10, 20), "60-": (60, 64), "60-1000": (60, 64), "-4": (60, 64), "-1000": (0, 64)}
    for wanted, (start, end) in table.items():
        answer = ada.get(artefact, headers={"Range": f"bytes={wanted}"})
        assert (answer.status_code, answer.content) == (206, BYTES[start:end]), wanted
        assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/64"
        assert answer.headers["Content-Length"] == str(end - start)


def test_a_range_behind_the_end_is_told_the_size(ada: TestClient, artefact: str) -> None:
    for wanted in ("bytes=64-", "bytes=100-200", "bytes=-0"):
        answer = ada.get(artefact, headers={"Range": wanted})
        assert (answer.status_code, answer.headers["Content-Range"]) == (416, "bytes */64"), wanted


def test_what_is_not_one_range_is_ignored(ada: TestClient, artefact: str) -> None:
    for wanted in ("bytes=0-1,3-4", "bytes=5-4", "bytes=-", "lines=1-2", "bytes=a-b"):
        assert ada.get(artefact, headers={"Range": wanted}).status_code == 200, wanted


def test_a_range_of_another_version_is_not_sent(ada: TestClient, artefact: str) -> None:
    etag = ada.get(artefact).headers["ETag"]
    asked = {"Range": "bytes=1-2"}
    assert ada.get(artefact, headers={**asked, "If-Range": etag}).status_code == 206
    assert ada.get(artefact, headers={**asked, "If-Range": '"other"'}).status_code == 200
    assert ada.get(artefact, headers={"If-None-Match": etag}).status_code == 304


def test_head_tells_the_length_without_the_bytes(ada: TestClient, artefact: str) -> None:
    answer = ada.head(artefact)
    assert (answer.status_code, answer.content, answer.headers["Content-Length"]) == (200, b"", "64")


def test_a_store_with_signed_urls_is_redirected_to(
    ada: TestClient, artefact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signed(key: str, expires_s: int, filename: str) -> str:
        return f"http://store/{key}?for={expires_s}"

    monkeypatch.setattr(ada.app.state.services.store, "presigned_url", signed)  # type: ignore[attr-defined]
    answer = ada.get(artefact)
    assert (answer.status_code, answer.headers["Location"]) == (307, "http://store/artefacts/sixty-four?for=900")
    assert answer.headers["Cache-Control"] == "no-store"


def test_another_owner_and_nobody_get_no_bytes(eve: TestClient, nobody: TestClient, artefact: str) -> None:
    assert eve.get(artefact).status_code == 404
    assert nobody.get(artefact).status_code == 401


def test_a_browser_downloads_with_the_key_that_the_page_lent_it(
    ada: TestClient, nobody: TestClient, artefact: str
) -> None:
    key = ada.headers["Authorization"].removeprefix("Bearer ")
    lent = {"Cookie": f"bitmill_download={key}"}
    assert nobody.get(artefact, headers=lent).content == BYTES
    assert nobody.get("/v1/jobs", headers=lent).status_code == 401, "the cookie opens nothing else"
