"""The sweeper removes what no row speaks for and nothing else, whoever publishes or reuses while it looks."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from safetensors.numpy import save
from sqlalchemy import Engine, delete, func, select, text, update
from sqlalchemy.orm import DeclarativeBase

from cli.servers import S3Endpoint, seaweed
from core.config import Settings
from core.errors import QuotaExceeded, StoreUnavailable
from core.ids import new_id
from core.jobs import sweeper as sweeper_module
from core.jobs.checkpoints import CheckpointService
from core.jobs.queue import Claim
from core.jobs.requests import UploadFile, UploadSource
from core.jobs.results import objects_of
from core.jobs.service import JobService
from core.jobs.sessions import reading, writing
from core.jobs.sweeper import SWEEP_LOCK, Sweeper
from core.jobs.tables import Attempt, AttemptLog, Event, Idempotency, Job, Step, Upload
from core.jobs.uploads import UploadService
from core.jobs.views import JobView
from core.storage import s3_store
from core.storage.keys import owner_of
from core.storage.local_store import LocalStore
from core.storage.object_store import ObjectStore, open_store
from worker.reconciler import count_swept

if TYPE_CHECKING:
    from tests.service.conftest import Bench

OLD = timedelta(days=3)  # longer than the grace period
LONG_AGO = timedelta(days=400)  # longer than anything is kept


class Attic:
    """A bench, its sweeper, and hands that make objects and rows old."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.store = bench.store
        self.sweeper = Sweeper(bench.engine, bench.settings, bench.store)

    def put(self, key: str, age: timedelta = OLD) -> str:
        self.store.put_bytes(key, key.encode())
        self.age(key, age)
        return key

    def age(self, key: str, age: timedelta = OLD) -> None:
        path = self.store.local_path(key)
        assert path is not None
        then = time.time() - age.total_seconds()
        os.utime(path, (then, then))

    def age_all(self) -> None:
        for key in self.keys():
            self.age(key)

    def keys(self) -> set[str]:
        return {key for key, _ in self.store.list("")}

    def sweep(self) -> dict[str, int]:
        return {name: count for name, count in self.sweeper.run_once().items() if count}

    def removed(self) -> set[str]:
        """What a sweep removes."""
        before = self.keys()
        self.sweeper.run_once()
        return before - self.keys()

    def backdate(self, table: type[DeclarativeBase], *columns: str, by: timedelta = LONG_AGO) -> None:
        with writing(self.bench.engine) as session:
            for column in columns:
                session.execute(update(table).values({column: getattr(table, column) - by}))


@pytest.fixture
def attic(bench: Bench) -> Attic:
    return Attic(bench)


def finished(attic: Attic, **changes: Any) -> JobView:
    done = attic.bench.work_off(attic.bench.submit(**changes))
    assert done.status == "succeeded"
    return done


ORPHANS = [
    "steps/ffff/0123456789abcdef-shard.safetensors",
    "checkpoints/ffff/model.safetensors",
    "checkpoints/ffff/deep/er/config.json",
    "uploads/upl_gone/000000/000001-0123456789abcdef",
    "jobs/job_gone/att_gone/part.bin",
    "artefacts/job_gone/bitmill/model.safetensors",
]


@pytest.mark.parametrize("key", ORPHANS)
def test_what_no_row_names_is_removed_once_it_is_old(attic: Attic, key: str) -> None:
    attic.put(key, timedelta(hours=1))
    assert attic.sweep() == {}
    assert attic.keys() == {key}
    attic.age(key)
    assert attic.sweep() == {"objects": 1, "bytes": len(key)}
    assert attic.keys() == set()


@pytest.mark.parametrize("key", ["other/thing", "steps/only-two", "jobs/job_1/no-attempt", "README"])
def test_what_is_none_of_ours_stays(attic: Attic, key: str) -> None:
    attic.put(key)
    assert attic.removed() == set()


def test_owners_are_read_from_keys() -> None:
    assert owner_of("steps/abc/0-x.bin") == ("steps", "abc")
    assert owner_of("checkpoints/abc/a/b/c.json") == ("checkpoints", "abc")
    assert owner_of("jobs/job_1/att_2/x") == ("jobs", "att_2")
    assert owner_of("elsewhere/abc/x") == ("", "")


def test_a_finished_jobs_results_stay_for_reuse_and_then_only_what_it_published(attic: Attic) -> None:
    job = finished(attic)
    attic.age_all()
    assert attic.removed() == set()
    attic.backdate(Step, "finished_at")
    removed = attic.removed()
    assert removed
    published = {artefact.key for artefact in attic.bench.jobs.artefacts("ada", job.id)}
    assert attic.keys() == published
    assert attic.removed() == set()


def test_a_result_that_is_reused_is_as_young_as_its_last_use(attic: Attic) -> None:
    job = finished(attic)
    attic.age_all()
    attic.backdate(Step, "finished_at")
    again = finished(attic, checkpoint=job.checkpoint)
    assert {step.status for step in again.steps} == {"reused"}
    assert attic.removed() == set()


def test_results_that_were_removed_are_made_again(attic: Attic) -> None:
    job = finished(attic)
    attic.age_all()
    attic.backdate(Step, "finished_at")
    attic.sweep()
    again = finished(attic, checkpoint=job.checkpoint)
    assert [a.sha256 for a in attic.bench.jobs.artefacts("ada", again.id)] == [
        a.sha256 for a in attic.bench.jobs.artefacts("ada", job.id)
    ]
    assert all(attic.store.size(a.key) is not None for a in attic.bench.jobs.artefacts("ada", again.id))


def test_a_living_jobs_results_stay_however_old_they_are(attic: Attic) -> None:
    job = attic.bench.submit()
    attic.bench.work_off(job, before="assemble")
    attic.age_all()
    attic.backdate(Step, "finished_at")
    assert attic.removed() == set()
    assert attic.bench.work_off(job).status == "succeeded"


@pytest.mark.parametrize("state", ["ready", "running"])
def test_what_a_step_at_work_has_written_stays_although_no_row_names_it(attic: Attic, state: str) -> None:
    job = attic.bench.submit()
    claim = attic.bench.claim(job, "fetch")
    if state == "ready":
        attic.bench.let_leases_lapse()
        attic.bench.reconciler.run_once()
    assert attic.bench.step(job, "fetch").status == state
    attic.put(f"steps/{claim.request.input_hash}/0123456789abcdef-half.bin")
    assert attic.removed() == set()


def test_what_an_attempt_left_that_will_not_be_tried_again_is_removed(attic: Attic) -> None:
    job = attic.bench.submit()
    claim = attic.bench.claim(job, "fetch")
    key = attic.put(f"steps/{claim.request.input_hash}/0123456789abcdef-half.bin")
    staged = attic.put(f"jobs/{job.id}/{claim.attempt_id}/part")
    assert attic.removed() == set()
    attic.bench.jobs.cancel("ada", job.id)
    assert attic.bench.queue.cancelled(claim.attempt_id)
    assert attic.removed() == {key, staged}


def test_a_zombies_other_bytes_are_removed_and_the_winners_stay(attic: Attic) -> None:
    job = attic.bench.submit()
    zombie = attic.bench.claim(job, "fetch")
    other = attic.put(f"steps/{zombie.request.input_hash}/ffffffffffffffff-other.bin")
    attic.bench.let_leases_lapse()
    attic.bench.reconciler.run_once()
    attic.bench.work_off(job)
    attic.age_all()
    assert attic.removed() == {other}


def test_a_deleted_jobs_artefacts_are_removed(attic: Attic) -> None:
    job = finished(attic)
    attic.age_all()
    with writing(attic.bench.engine) as session:
        session.execute(delete(Job).where(Job.id == job.id))
    attic.sweep()
    assert attic.keys() == set()


def uploaded(attic: Attic) -> tuple[UploadService, str]:
    """An upload of a tiny checkpoint all of whose parts have arrived."""
    data = {"config.json": b"{}", "model.safetensors": save({"w": np.zeros((2, 2), np.float32)})}
    uploads = UploadService(attic.bench.engine, attic.bench.settings, attic.store)
    files = [
        UploadFile(path=path, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        for path, content in data.items()
    ]
    view = uploads.create("ada", files)
    for part in view.parts:
        uploads.put_part("ada", view.id, part.file, part.number, [data[view.files[part.file].path]])
    return uploads, view.id


def test_an_open_uploads_parts_stay_and_an_aborted_ones_go(attic: Attic) -> None:
    _, upload_id = uploaded(attic)
    attic.age_all()
    parts = attic.keys()
    assert attic.removed() == set()
    with writing(attic.bench.engine) as session:  # as if the process had died before it removed them
        session.execute(update(Upload).where(Upload.id == upload_id).values(state="aborted"))
    assert attic.removed() == parts


def test_an_expired_uploads_parts_are_removed_by_the_reconcilers_pass(attic: Attic) -> None:
    uploads, upload_id = uploaded(attic)
    attic.backdate(Upload, "expires_at", by=timedelta(days=8))
    assert attic.bench.reconciler.run_once()["uploads_expired"] == 1
    assert uploads.get("ada", upload_id).state == "expired"
    assert attic.keys() == set()


def test_a_complete_uploads_files_stay_until_it_is_clear_that_nobody_wants_them(attic: Attic) -> None:
    uploads, upload_id = uploaded(attic)
    uploads.complete("ada", upload_id)
    attic.age_all()
    assert attic.sweep() == {}
    attic.backdate(Upload, "created_at")
    assert attic.sweep() == {"uploads": 1}
    assert len(attic.keys()) == 2, "a checkpoint may be made of it in this very moment: the next sweep knows"
    assert attic.sweep()["objects"] == 2
    assert uploads.get("ada", upload_id).state == "expired"


def test_a_checkpoints_files_stay_until_it_is_deleted(attic: Attic) -> None:
    uploads, upload_id = uploaded(attic)
    uploads.complete("ada", upload_id)
    checkpoints = CheckpointService(attic.bench.engine, attic.bench.settings, attic.store)
    made = checkpoints.register("ada", UploadSource(upload=upload_id))
    attic.age_all()
    attic.backdate(Upload, "created_at")
    assert attic.sweep() == {}
    checkpoints.delete("ada", made.id)
    assert attic.sweep() == {"uploads": 1}
    assert attic.sweep()["objects"] == 2
    assert attic.keys() == set()


def test_files_that_an_open_upload_will_find_in_their_place_stay(attic: Attic) -> None:
    uploads, upload_id = uploaded(attic)
    uploads.complete("ada", upload_id)
    attic.age_all()
    with writing(attic.bench.engine) as session:
        session.execute(update(Upload).values(state="expired", sha256=None))
    _, again = uploaded(attic)
    attic.age_all()
    assert attic.removed() == set()
    assert uploads.complete("ada", again).state == "complete"
    with writing(attic.bench.engine) as session:
        session.execute(update(Upload).values(state="expired", sha256=None))
    assert len(attic.removed()) == 2


def test_no_checkpoints_files_are_removed_while_a_fetch_step_may_find_them(attic: Attic) -> None:
    job = attic.bench.submit()
    attic.bench.claim(job, "fetch")
    attic.put("checkpoints/ffff/model.safetensors")
    assert attic.removed() == set()
    attic.bench.let_leases_lapse()
    attic.bench.reconciler.run_once()
    assert attic.removed() == {"checkpoints/ffff/model.safetensors"}


class Gate:
    """A store that stops in one call until it is let go."""

    def __init__(self, store: LocalStore, call: str) -> None:
        self._store, self._call = store, call
        self.reached, self.open = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._store, name)
        if name != self._call:
            return real

        def stopped(*arguments: Any) -> Any:
            answer = real(*arguments) if name == "size" else None
            self.reached.set()
            assert self.open.wait(20)
            return answer if name == "size" else real(*arguments)

        return stopped


def in_thread(act: Callable[[], Any]) -> Callable[[], Any]:
    """Begin; call for the result."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return lambda: future.result(60)


def unused_results(attic: Attic) -> JobView:
    """A finished job none of whose unpublished results is kept any longer."""
    job = finished(attic)
    attic.age_all()
    attic.backdate(Step, "finished_at")
    return job


def test_what_a_submission_has_just_found_is_not_removed_under_it(
    attic: Attic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper_module, "_TRIES", 3)
    job = unused_results(attic)
    gate = Gate(attic.store, "size")
    jobs = JobService(attic.bench.engine, attic.bench.settings, attic.bench.outbox, gate)
    attic.bench.jobs = jobs
    submitted = in_thread(lambda: attic.bench.submit(job.checkpoint))
    assert gate.reached.wait(10)  # it has seen that the first result is there, and has not committed
    swept = attic.sweep()
    assert "objects" not in swept
    assert swept["busy"]
    gate.open.set()
    again = submitted()
    assert {step.status for step in again.steps} == {"reused"}
    assert attic.removed() == set()


def test_a_submission_during_the_removal_waits_and_finds_nothing_to_reuse(attic: Attic) -> None:
    job = unused_results(attic)
    gate = Gate(attic.store, "delete")
    attic.sweeper.store = gate
    swept = in_thread(attic.sweeper.run_once)
    assert gate.reached.wait(10)
    submitted = in_thread(lambda: attic.bench.submit(job.checkpoint))
    waits = text("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation IS NOT NULL")
    with attic.bench.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while not connection.scalar(waits):
            time.sleep(0.01)
    gate.open.set()
    assert swept()["objects"] >= 1
    done = attic.bench.work_off(submitted())
    assert done.status == "succeeded"
    for artefact in attic.bench.jobs.artefacts("ada", done.id):
        assert attic.store.size(artefact.key) == artefact.size


def test_a_heartbeat_goes_on_during_the_removal(attic: Attic) -> None:
    claim = attic.bench.claim(attic.bench.submit(), "fetch")
    attic.put("steps/ffff/orphan.bin")
    gate = Gate(attic.store, "delete")
    attic.sweeper.store = gate
    swept = in_thread(attic.sweeper.run_once)
    assert gate.reached.wait(10)
    assert attic.bench.queue.heartbeat(claim.attempt_id, 0.0).ok
    gate.open.set()
    assert swept()["objects"] == 1


def test_jobs_that_come_and_go_under_a_sweeper_without_mercy_never_miss_an_object(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No grace for objects, nothing kept for reuse, sweeps without a pause; what somebody needs is always there."""
    # what is being written has nothing but the grace period
    monkeypatch.setattr(LocalStore, "discard_unfinished", lambda _store, _before: (0, 0))
    merciless = bench.settings.model_copy(update={"keep_results_days": 0.0, "sweep_grace_s": 0.0})
    sweeper = Sweeper(bench.engine, merciless, bench.store)
    checkpoint = bench.checkpoint()
    over, swept = threading.Event(), []

    def sweeps() -> None:
        while not over.is_set():
            swept.append(sweeper.run_once())

    def jobs(worker: str) -> int:
        done = 0
        for _ in range(6):
            job = bench.submit(checkpoint)
            deadline = time.monotonic() + 30
            while bench.now(job).finished_at is None:
                assert time.monotonic() < deadline
                for step in [step for step in bench.now(job).steps if step.status == "ready"]:
                    claim = bench.queue.claim(step.id, worker)
                    if claim is not None:
                        assert absent(bench, claim) == []
                        assert bench.queue.succeed(claim.attempt_id, bench.output(claim))
            assert bench.now(job).status == "succeeded"
            done += 1
        return done

    sweeping = in_thread(sweeps)
    working = [in_thread(lambda name=name: jobs(name)) for name in ("wrk_a", "wrk_b", "wrk_c")]  # type: ignore[misc]
    assert [result() for result in working] == [6, 6, 6]
    over.set()
    sweeping()
    assert sum(one.get("objects", 0) for one in swept) > 0
    with reading(bench.engine) as session:
        ids = list(session.scalars(select(Job.id)))
    for job_id in ids:
        for artefact in bench.jobs.artefacts("ada", job_id):
            assert bench.store.size(artefact.key) == artefact.size


def absent(bench: Bench, claim: Claim) -> list[str]:
    """The inputs of a claim that are not in the store."""
    keys = [key for given in claim.request.inputs for key in objects_of(given.output.model_dump())]
    return [key for key in keys if bench.store.size(key) is None]


def test_one_sweeper_at_a_time(attic: Attic) -> None:
    attic.put(ORPHANS[0])
    with attic.bench.engine.connect() as other:
        other.execute(text("SELECT pg_advisory_lock(:name)"), {"name": SWEEP_LOCK})
        assert attic.sweep() == {}
        other.execute(text("SELECT pg_advisory_unlock(:name)"), {"name": SWEEP_LOCK})
    assert attic.sweep()["objects"] == 1


def test_a_sweep_that_is_asked_to_stop_ends_after_a_batch(attic: Attic) -> None:
    attic.put(ORPHANS[0])
    attic.sweeper.stopping.set()
    assert "objects" not in attic.sweep()


def test_an_object_that_cannot_be_removed_keeps_no_other_from_it(attic: Attic, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        attic.put(f"steps/ffff/{number}.bin")
    real = LocalStore.delete

    def stubborn(self: LocalStore, key: str) -> None:
        if key.endswith("1.bin"):
            raise StoreUnavailable("no", where=key)
        real(self, key)

    monkeypatch.setattr(LocalStore, "delete", stubborn)
    swept = attic.sweep()
    assert (swept["objects"], swept["failed"]) == (2, 1)
    assert attic.keys() == {"steps/ffff/1.bin"}


def test_a_store_that_refuses_everything_ends_the_sweep(attic: Attic, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        attic.put(f"steps/ffff/{number}.bin")
    asked: list[str] = []

    def refuse(self: LocalStore, key: str) -> None:
        asked.append(key)
        raise StoreUnavailable("no", where=key)

    monkeypatch.setattr(LocalStore, "delete", refuse)
    with pytest.raises(StoreUnavailable):
        attic.sweeper.run_once()
    assert len(asked) < 20
    assert Sweeper(attic.bench.engine, attic.bench.settings, attic.store).stopping.is_set() is False


def test_removed_objects_and_bytes_are_counted_for_prometheus(attic: Attic) -> None:
    registry = CollectorRegistry()
    count_swept(attic.sweeper, registry)
    keys = [attic.put(key) for key in ORPHANS]
    attic.sweep()
    assert registry.get_sample_value("swept_objects_total") == len(keys)
    assert registry.get_sample_value("swept_bytes_total") == sum(map(len, keys))


def test_remembered_answers_are_forgotten(attic: Attic, engine: Engine) -> None:
    with writing(engine) as session:
        session.add(Idempotency(owner="ada", key="old", body_hash="", answer={}))
        session.add(Idempotency(owner="ada", key="new", body_hash="", answer={}))
        session.flush()
        session.execute(
            update(Idempotency).where(Idempotency.key == "old").values(created_at=func.now() - timedelta(days=8))
        )
    assert attic.sweep() == {"answers": 1}
    with reading(engine) as session:
        assert list(session.scalars(select(Idempotency.key))) == ["new"]


def test_old_logs_and_what_steps_told_are_forgotten_and_the_jobs_own_events_stay(attic: Attic) -> None:
    job = attic.bench.submit()
    claim = attic.bench.claim(job, "fetch")
    attic.bench.queue.log(claim.attempt_id, [("one", {}), ("two", {})])
    assert attic.bench.queue.succeed(claim.attempt_id, attic.bench.output(claim))
    attic.bench.work_off(job)
    kinds = attic.bench.kinds(job)
    assert attic.sweep() == {}
    attic.backdate(Attempt, "finished_at")
    attic.backdate(Job, "finished_at", "started_at", "created_at")
    swept = attic.sweep()
    assert swept["log_lines"] == 2
    assert swept["events"] == len([kind for kind in kinds if not kind.startswith("job.")])
    assert attic.bench.kinds(job) == ["job.queued", "job.started", "job.succeeded"]
    with reading(attic.bench.engine) as session:
        assert session.scalar(select(func.count()).select_from(AttemptLog)) == 0
        assert session.scalar(select(func.count()).select_from(Event)) == 3


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    with seaweed(tmp_path_factory.mktemp("weed")) as endpoint:
        yield endpoint


@pytest.fixture(params=["folder", "s3"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return open_store(Settings(store_url=f"file://{tmp_path}/objects"))
    endpoint: S3Endpoint = request.getfixturevalue("endpoint")
    bucket = new_id("upload").replace("_", "-").lower()
    settings = Settings(
        store_url=f"s3://{bucket}/here",
        s3_endpoint=endpoint.url,
        s3_access_key=endpoint.access_key,
        s3_secret_key=endpoint.secret_key,
    )
    s3_store.make_client(settings, endpoint.url).create_bucket(Bucket=bucket)
    return open_store(settings)


def test_an_inventory_knows_when_each_object_was_written(either: ObjectStore) -> None:
    began = datetime.now(UTC) - timedelta(seconds=2)
    either.put_bytes("steps/a/x", b"12345")
    (entry,) = either.inventory("steps/")
    assert (entry.key, entry.size) == ("steps/a/x", 5)
    assert began <= entry.modified <= datetime.now(UTC) + timedelta(seconds=2)


def leave_unfinished(store: ObjectStore) -> None:
    """What a writer leaves that is killed while it writes a large file."""
    if isinstance(store, LocalStore):
        store.put_bytes("steps/a/whole", b"1")
        (store.root / ".tmp" / "half").write_bytes(b"1234567")
        return
    assert isinstance(store, s3_store.S3Store)
    where = {"Bucket": store._bucket, "Key": store._name("steps/a/half")}
    upload = store._client.create_multipart_upload(**where)
    store._client.upload_part(**where, UploadId=upload["UploadId"], PartNumber=1, Body=b"1234567")
    store.put_bytes("steps/a/whole", b"1")


def test_what_killed_writers_left_is_removed_once_it_is_old(either: ObjectStore) -> None:
    leave_unfinished(either)
    assert either.discard_unfinished(datetime.now(UTC) - timedelta(hours=1)) == (0, 0)
    assert either.discard_unfinished(datetime.now(UTC) + timedelta(seconds=5)) == (1, 7)
    assert either.discard_unfinished(datetime.now(UTC) + timedelta(seconds=5)) == (0, 0)
    assert [key for key, _ in either.list("")] == ["steps/a/whole"]


def test_an_orphan_in_a_bucket_is_removed(bench: Bench, either: ObjectStore) -> None:
    either.put_bytes("steps/ffff/x", b"12345")
    sweeper = Sweeper(bench.engine, bench.settings.model_copy(update={"sweep_grace_s": -5.0}), either)
    assert sweeper.run_once()["bytes"] == 5
    assert list(either.list("")) == []


def races(act: Callable[[], Any], refusal: type[Exception], racers: int = 16) -> int:
    """How many of so many simultaneous calls were not refused."""
    ready, won = threading.Barrier(racers), []

    def race() -> None:
        ready.wait(20)
        try:
            act()
        except refusal:
            return
        won.append(1)

    threads = [threading.Thread(target=race) for _ in range(racers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return len(won)


@pytest.mark.parametrize("room", [0, 1, 3])
def test_racing_submissions_never_pass_the_limit_of_queued_jobs(bench: Bench, room: int) -> None:
    checkpoints = [bench.checkpoint() for _ in range(16)]  # not one, whose row would put them in line
    limited = bench.with_settings(max_queued_jobs=2 + room)
    for _ in range(2):
        limited.submit()
    given = iter(checkpoints)
    assert races(lambda: limited.submit(next(given)), QuotaExceeded) == room
    assert limited.submit(owner="bob").status == "queued"


def test_racing_uploads_never_pass_the_limit_of_bytes(bench: Bench) -> None:
    uploads = UploadService(bench.engine, bench.settings.model_copy(update={"max_upload_bytes": 250}), bench.store)
    files = [UploadFile(path="model.safetensors", size=100, sha256="0" * 64)]
    assert races(lambda: uploads.create("ada", files), QuotaExceeded) == 2
    assert uploads.create("bob", files).state == "open"
