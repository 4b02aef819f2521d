"""Cursors, parts of uploads, queues, devices, progress: the pure pieces around the queue."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidCheckpoint, UserError
from core.ids import new_id
from core.jobs.dispatch import celery_url, queue_for
from core.jobs.pages import decode_cursor, encode_cursor
from core.jobs.parts import PartsSource, part_count, part_length
from core.jobs.picture import eta, job_progress
from core.jobs.results import objects_of
from core.jobs.tables import Attempt, Job, Step
from core.storage.local_store import LocalStore
from worker.devices import likely_device, queues_of


def test_a_cursor_gives_its_id_back_and_nothing_else_is_one() -> None:
    made = new_id("job")
    assert decode_cursor(encode_cursor(made)) == made
    assert decode_cursor(None) is None
    for wrong in ("x", "!!", encode_cursor("job_1"), encode_cursor("' OR 1=1"), "é", encode_cursor(made) + "AAAA"):
        with pytest.raises(UserError):
            decode_cursor(wrong)


@given(size=st.integers(0, 10_000), part=st.integers(1, 3000))
def test_parts_cover_a_file_exactly(size: int, part: int) -> None:
    lengths = [part_length(size, part, number) for number in range(1, part_count(size, part) + 1)]
    assert None not in lengths
    assert sum(length or 0 for length in lengths) == size
    assert all(length == part for length in lengths[:-1])
    assert part_length(size, part, 0) is None
    assert part_length(size, part, len(lengths) + 1) is None


@given(data=st.binary(max_size=60), cut=st.integers(1, 20), start=st.integers(0, 60), length=st.integers(0, 60))
def test_a_file_reads_the_same_through_its_parts(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int, start: int, length: int
) -> None:
    store = LocalStore(tmp_path_factory.mktemp("parts"))
    pieces = [data[at : at + cut] for at in range(0, len(data), cut)]
    for number, piece in enumerate(pieces):
        store.put_bytes(f"p/{number}", piece)
    source = PartsSource(store, [(f"p/{number}", len(piece)) for number, piece in enumerate(pieces)], "file")
    assert source.size == len(data)
    assert b"".join(source.stream()) == data
    if start + length <= len(data):
        assert source.read(start, length) == data[start : start + length]
    else:
        with pytest.raises(InvalidCheckpoint):
            source.read(start, length)


@pytest.mark.parametrize(
    ("kind", "gpu", "urgent", "queue"),
    [
        ("fetch", True, False, "cpu"),
        ("calibrate", True, False, "gpu"),
        ("quantise", True, True, "gpu.high"),
        ("quantise", False, False, "cpu"),
        ("export", True, True, "cpu.high"),
    ],
)
def test_steps_go_to_the_queue_of_who_can_do_them(kind: str, gpu: bool, urgent: bool, queue: str) -> None:
    assert queue_for(kind, gpu_workers=gpu, urgent=urgent) == queue


def test_urgent_queues_are_listened_to_first() -> None:
    assert queues_of("cpu, gpu,cpu") == ("cpu.high", "gpu.high", "cpu", "gpu")


def test_a_broker_on_a_unix_socket_is_named_as_celery_does() -> None:
    assert celery_url("unix:///run/valkey.sock") == "redis+socket:///run/valkey.sock"
    assert celery_url("redis://host:6379/0") == "redis://host:6379/0"


def test_a_gpu_is_seen_by_its_files_unless_it_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nothing = tmp_path / "none"
    assert likely_device("auto", nothing, tmp_path) == "cpu"
    (tmp_path / "nvidia0").touch()
    assert likely_device("auto", nothing, tmp_path) == "cuda"
    assert likely_device("cpu", nothing, tmp_path) == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert likely_device("auto", nothing, tmp_path) == "cpu"


def _steps(**states: str) -> list[Step]:
    return [Step(id=kind, kind=kind, index=0, count=1, state=state) for kind, state in states.items()]


def test_progress_weighs_steps_and_counts_the_one_at_work() -> None:
    steps = _steps(fetch="succeeded", quantise="running", export="blocked")
    assert job_progress(steps, {}) == 1 / 8
    assert job_progress(steps, {"quantise": Attempt(progress=0.5)}) == 4 / 8
    assert job_progress(_steps(fetch="reused", export="succeeded"), {}) == 1
    assert job_progress([], {}) == 0


def test_the_time_left_assumes_that_reused_steps_took_none() -> None:
    began = datetime(2026, 1, 1, tzinfo=UTC)
    job = Job(status="running", started_at=began)
    now = began + timedelta(seconds=60)
    assert eta(job, _steps(calibrate="succeeded", quantise="blocked"), {}, now) == 60
    assert eta(job, _steps(calibrate="reused", quantise="blocked"), {}, now) is None
    assert eta(Job(status="queued"), _steps(fetch="ready"), {}, now) is None


def test_the_objects_of_an_output_are_all_that_it_names() -> None:
    output: dict[str, Any] = {
        "files": {"a.bin": {"key": "steps/1/a", "sha256": "", "size": 1}},
        "values": {
            "files": [{"path": "x", "key": "checkpoints/1/x"}],
            "artefacts": [{"key": "steps/2/b"}, {"key": ""}],
        },
    }
    assert objects_of(output) == ["steps/1/a", "checkpoints/1/x", "steps/2/b"]
