"""The events of a job: pages that join without gaps, and streams that end with the job."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from starlette.testclient import TestClient

from api import streaming
from core.jobs.events import TERMINAL

if TYPE_CHECKING:
    from tests.service.conftest import Bench

STREAM = {"Accept": "text/event-stream"}


def messages(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """The messages of a stream, comments under the name ''."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
        else:
            yield fields
            fields = {}


def events_of(client: httpx.Client, path: str, **headers: str) -> list[dict[str, str]]:
    with client.stream("GET", path, headers={**STREAM, **headers}) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        return [message for message in messages(answer.iter_lines()) if "id" in message]


def test_pages_join_without_gaps(ada: TestClient, bench: Bench) -> None:
    job = bench.submit()
    bench.work_off(job)
    seen: list[dict[str, Any]] = []
    after = 0
    while True:
        page = ada.get(f"/v1/jobs/{job.id}/events", params={"after": after, "limit": 7}).json()
        if not page["items"]:
            break
        seen += page["items"]
        after = page["next_after"]
    assert [event["seq"] for event in seen] == list(range(1, len(seen) + 1))
    assert (seen[0]["kind"], seen[-1]["kind"]) == ("job.queued", "job.succeeded")
    assert page["next_after"] == after, "an empty page leaves the reader where it is"


def test_a_stream_tells_what_happens_and_ends_with_the_job(served: httpx.Client, bench: Bench) -> None:
    job = bench.submit()
    worker = threading.Thread(target=bench.work_off, args=(job,))
    worker.start()
    found = events_of(served, f"/v1/jobs/{job.id}/events")
    worker.join()
    assert [int(message["id"]) for message in found] == list(range(1, len(found) + 1))
    assert found[-1]["event"] in TERMINAL
    assert '"kind":"job.queued"' in found[0]["data"]


def test_a_stream_goes_on_after_the_last_event_that_was_seen(served: httpx.Client, bench: Bench) -> None:
    job = bench.submit()
    bench.work_off(job)
    everything = events_of(served, f"/v1/jobs/{job.id}/events")
    rest = events_of(served, f"/v1/jobs/{job.id}/events", **{"Last-Event-ID": "3"})
    assert rest == everything[3:]
    path, last = f"/v1/jobs/{job.id}/events", {"Last-Event-ID": everything[-1]["id"]}
    assert served.get(path, headers={**STREAM, **last}).status_code == 204, "a browser then stops reconnecting"


def test_a_silent_stream_pings_and_is_counted_while_it_is_open(
    served: httpx.Client, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PING_S", 0.05)
    monkeypatch.setattr(streaming, "POLL_S", 0.02)
    job = bench.submit()
    with served.stream("GET", f"/v1/jobs/{job.id}/events", headers=STREAM) as answer:
        lines = answer.iter_lines()
        assert any(line == ": ping" for line in lines)
        assert "sse_connections 1.0" in served.get("/metrics").text


def test_a_stream_is_closed_after_its_longest_time(
    served: httpx.Client, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "LONGEST_S", 0.05)
    monkeypatch.setattr(streaming, "POLL_S", 0.02)
    assert events_of(served, f"/v1/jobs/{bench.submit().id}/events")[-1]["event"] not in TERMINAL


def test_numbers_that_no_event_has_are_refused(ada: TestClient, bench: Bench) -> None:
    path = f"/v1/jobs/{bench.submit().id}/events"
    for query in ({"after": -1}, {"after": 1 << 63}, {"limit": 0}):
        assert ada.get(path, params=query).status_code == 422, query
    assert ada.get(path, headers={"Last-Event-ID": "x", **STREAM}).status_code == 422


def test_a_stream_of_nothing_is_not_begun(ada: TestClient) -> None:
    assert ada.get("/v1/jobs/job_x/events", headers=STREAM).status_code == 404
