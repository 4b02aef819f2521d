"""What can go wrong in the middle of a job. A fault begins in a house with nothing running, and leaves a job that ends.

A fault takes the house and the step that shall be disturbed, starts the processes that it needs, submits, does its harm
at the very moment, starts again what the house needs to go on, and returns the job.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from sqlalchemy import select

from core.jobs.dispatch import BrokerDispatcher
from core.jobs.sessions import writing
from core.jobs.tables import Checkpoint, Job, Upload
from core.jobs.views import JobView
from tests.service.fault_house import OWNER, House, kill, send, wait_for_end
from tests.service.faulty_proxy import Mode

DATA_FREE: dict[str, Any] = {
    "version": 1,
    "target": {"bits_per_param": 6.5},
    "format": "t7_6@64",
    "allocation": "uniform",
    "calibration": False,
    "evaluation": False,
}


def under_way(house: House, step: str, told: str) -> JobView:
    """A job whose step is in the hands of the only worker, before it has begun or after it has published."""
    house.tell(step, told)
    house.reconciler()
    house.worker()
    return house.submit()


def kill_engine(house: House, step: str) -> JobView:
    job = under_way(house, step, "before hold")
    send(house.held(), signal.SIGKILL)
    return job


def kill_engine_that_has_published(house: House, step: str) -> JobView:
    job = under_way(house, step, "after hold")
    send(house.held(), signal.SIGKILL)
    return job


def engine_exits(house: House, step: str) -> JobView:
    return under_way(house, step, "after exit 3")


def kill_worker(house: House, step: str) -> JobView:
    job = under_way(house, step, "after hold")
    house.held()
    kill(house.children[1])
    house.worker()
    return job


def kill_reconciler_and_worker(house: House, step: str) -> JobView:
    job = under_way(house, step, "after hold")
    house.held()
    kill(house.children[1])
    kill(house.children[0])
    house.worker()
    house.reconciler()
    return job


def kill_reconciler_in_its_pass(house: House, step: str) -> JobView:
    """It holds the lock of whoever makes a pass, and waits for a job's row, when it dies."""
    job = under_way(house, step, "after hold")
    house.held()
    with writing(house.bench.engine) as session:
        session.execute(select(Job).where(Job.id == job.id).with_for_update())
        kill(house.children[1])
        house.wait(lambda: blocked(house), "the pass that reaps")
        kill(house.children[0])
    house.reconciler()
    house.worker()
    return job


def wake_a_zombie_worker(house: House, step: str) -> JobView:
    """Supervisor and engine sleep past their lease; the engine has published, and says so when it wakes."""
    job = under_way(house, step, "after hold")
    engine = house.held()
    first = house.children[1]
    assert first.pid is not None
    for pid in (first.pid, engine):
        send(pid, signal.SIGSTOP)
    house.worker()
    done = house.finished(job)
    house.go()
    for pid in (engine, first.pid):
        send(pid, signal.SIGCONT)
    first.stop(grace_s=30)
    return done


def engine_outlives_its_supervisors_lease(house: House, step: str) -> JobView:
    """The supervisor sleeps, its engine goes on and publishes, while another worker does the same step."""
    job = under_way(house, step, "before hold")
    house.held()
    first = house.children[1]
    kill(first, signal.SIGSTOP)
    house.worker()
    house.wait(lambda: "attempt.lost" in house.bench.kinds(job), "the end of the lease")
    house.go()
    done = house.finished(job)
    kill(first, signal.SIGCONT)
    first.stop(grace_s=30)
    return done


def terminate_worker(house: House, step: str) -> JobView:
    job = under_way(house, step, "before listen")
    house.held()
    kill(house.children[1], signal.SIGTERM)
    wait_for_end(house.children[1])
    house.worker()
    return job


def terminate_deaf_worker(house: House, step: str) -> JobView:
    job = under_way(house, step, "after hold")
    house.held()
    kill(house.children[1], signal.SIGTERM)
    wait_for_end(house.children[1])
    house.worker()
    return job


def cancel(house: House, step: str) -> JobView:
    job = under_way(house, step, "after hold")
    house.held()
    house.bench.jobs.cancel(OWNER, job.id)
    return job


def cancel_before_anything(house: House, step: str) -> JobView:
    job = house.submit()
    house.bench.jobs.cancel(OWNER, job.id)
    return job


def told(*lines: str) -> Callable[[House, str], JobView]:
    """The engine itself fails, as often as there are lines."""

    def act(house: House, step: str) -> JobView:
        return under_way(house, step, "\n".join(lines))

    return act


def duplicate_messages(house: House, step: str) -> JobView:
    job = under_way(house, step, "before hold")
    house.held()
    house.worker()
    name, _, index = step.partition(".")
    dispatcher = BrokerDispatcher(house.broker.url)
    for _ in range(10):
        dispatcher.send(house.bench.step(job, name, int(index or 0)).id, "cpu")
    house.go()
    return job


def flush_broker(house: House, step: str) -> JobView:
    from tests.service.conftest import flush

    job = under_way(house, step, "after hold")
    house.held()
    flush(house.broker.url)
    house.go()
    return job


def flush_broker_before_anything(house: House, step: str) -> JobView:
    from tests.service.conftest import flush

    job = house.submit()
    flush(house.broker.url)
    house.reconciler()
    house.worker()
    return job


def broker_down_at_submit(house: House, step: str) -> JobView:
    house.broker.stop()
    try:
        job = house.submit()
    finally:
        house.broker.start()
    house.reconciler()
    house.worker()
    return job


def restart_broker(house: House, step: str) -> JobView:
    job = under_way(house, step, "after hold")
    house.held()
    house.broker.stop()
    house.go()
    house.wait(lambda: house.running_attempts() == 0, "the result that needs no broker")
    house.broker.start()
    return job


def restart_database(house: House, step: str) -> JobView:
    """The result is ready while the database is away, and waits for it as long as the lease holds."""
    house.environment["BITMILL_LEASE_S"] = "30"
    job = under_way(house, step, "after hold")
    house.held()
    house.database.stop()
    house.go()
    house.database.start()
    return job


def kill_api_in_a_submission(house: House, step: str) -> JobView:
    """Its transaction is open: it waits for the checkpoint's row. Sent again with its key, the request is one job."""
    checkpoint = house.register()
    with house.api() as client, ThreadPoolExecutor(1) as pool:
        with writing(house.bench.engine) as session:
            session.execute(select(Checkpoint).where(Checkpoint.id == checkpoint).with_for_update())
            request = pool.submit(submit_over_http, client, house)
            house.wait(lambda: blocked(house), "the submission")
            kill(house.children[-1])
        assert request.result() is None
    assert house.jobs() == []
    return submitted_again(house)


def kill_api_before_its_answer(house: House, step: str) -> JobView:
    """The job is committed; the broker, which does not answer, holds the request up. Nothing is submitted twice."""
    house.register()
    with house.api() as client, ThreadPoolExecutor(1) as pool:
        assert house.broker._child is not None
        kill(house.broker._child, signal.SIGSTOP)
        try:
            request = pool.submit(submit_over_http, client, house)
            house.wait(house.jobs, "the committed job")
            kill(house.children[-1])
            assert request.result() is None
        finally:
            kill(house.broker._child, signal.SIGCONT)
    [made] = house.jobs()
    job = submitted_again(house)
    assert job.id == made
    return job


def submit_over_http(client: httpx.Client, house: House) -> httpx.Response | None:
    """The answer, None when the connection broke."""
    body = {"checkpoint": house.register(), "recipe": DATA_FREE}
    try:
        return client.post("/v1/jobs", json=body, headers={"Idempotency-Key": "once"})
    except httpx.HTTPError:
        return None


def submitted_again(house: House) -> JobView:
    with house.api() as client:
        answer = submit_over_http(client, house)
    assert answer is not None
    assert answer.is_success, answer.text
    house.reconciler()
    house.worker()
    assert len(house.jobs()) == 1
    return JobView.model_validate(answer.json())


def store_becomes(mode: Mode, lasts_s: float) -> Callable[[House, str], JobView]:
    """From the middle of a step on, for a while, the store does that to every connection."""

    def act(house: House, step: str) -> JobView:
        job = under_way(house, step, "before hold")
        house.held()
        house.proxy.become(mode)
        house.go()
        house.wait(lambda: house.proxy.faults or house.bench.now(job).finished_at, "a fault")
        threading.Timer(lasts_s, house.proxy.become, args=("pass",)).start()
        done = house.finished(job)
        assert house.proxy.faults > 0
        return done

    return act


def store_away_for_long(house: House, step: str) -> JobView:
    """The attempt gives up, the step is tried again when the store is back."""
    job = under_way(house, step, "before hold")
    house.held()
    house.proxy.become("refuse")
    house.go()
    house.wait(lambda: "step.retrying" in house.bench.kinds(job), "the failure")
    house.proxy.become("pass")
    return job


def wrong_clock(by_s: float) -> Callable[[House, str], JobView]:
    """The worker's clock is wrong, and the step takes longer than a lease."""

    def act(house: House, step: str) -> JobView:
        house.tell(step, "before hold")
        house.reconciler()
        house.worker(str(by_s))
        job = house.submit()
        house.held()

        def outlasted() -> bool:
            [attempt] = house.bench.attempts(house.bench.step(job, step).id)
            return (attempt.heartbeat_at - attempt.started_at).total_seconds() > house.bench.settings.lease_s

        house.wait(outlasted, "a step that is longer than its lease")
        house.go()
        return job

    return act


def sweep_without_mercy(house: House, step: str) -> JobView:
    """Sweeps without a pause and without a grace period, by a process that is killed in the middle of one."""
    for number in range(60):
        house.bench.store.put_bytes(f"steps/{number:064x}/orphan.bin", b"left behind")
    house.environment |= {"BITMILL_SWEEP_S": "0.1", "BITMILL_SWEEP_GRACE_S": "-5"}
    job = under_way(house, step, "after hold")
    house.held()
    house.wait(lambda: len(list(house.bench.store.list("steps/0"))) < 60, "the first removal")
    kill(house.children[0])
    house.reconciler()
    house.wait(lambda: not list(house.bench.store.list(f"steps/{0:050x}")), "the removal of all orphans")
    house.go()
    return job


def kill_api_in_a_part(house: House, step: str) -> JobView:
    """Half a part has been received; the client goes on with what has not arrived."""
    contents = contents_of(house)
    with house.api() as client, ThreadPoolExecutor(1) as pool:
        upload = client.post("/v1/uploads", json={"files": promised(contents)}).json()
        largest = max(upload["parts"], key=lambda part: part["size"])
        halfway, never = threading.Event(), threading.Event()

        def half() -> Iterator[bytes]:
            yield bytes_of(upload, largest, contents)[: largest["size"] // 2]
            halfway.set()
            never.wait(60)

        request = pool.submit(put, client, largest["url"], half())
        house.wait(halfway.is_set, "half a part")
        kill(house.children[-1])
        never.set()
        assert request.result() is None
    return job_of_upload(house, upload["id"], contents)


def kill_api_in_a_completion(house: House, step: str) -> JobView:
    """The files are put together, and the upload's row does not say so yet."""
    contents = contents_of(house)
    with house.api() as client, ThreadPoolExecutor(1) as pool:
        upload = client.post("/v1/uploads", json={"files": promised(contents)}).json()
        for part in upload["parts"]:
            client.put(part["url"], content=bytes_of(upload, part, contents))
        with writing(house.bench.engine) as session:
            session.execute(select(Upload).where(Upload.id == upload["id"]).with_for_update())
            request = pool.submit(post, client, f"/v1/uploads/{upload['id']}/complete")
            house.wait(lambda: blocked(house), "the upload's last step")
            kill(house.children[-1])
        assert request.result() is None
    return job_of_upload(house, upload["id"], contents)


def contents_of(house: House) -> dict[str, bytes]:
    assert house.source is not None
    return {path.name: path.read_bytes() for path in sorted(house.source.iterdir())}


def promised(contents: dict[str, bytes]) -> list[dict[str, Any]]:
    return [
        {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for path, data in contents.items()
    ]


def bytes_of(upload: dict[str, Any], part: dict[str, Any], contents: dict[str, bytes]) -> bytes:
    start = (part["number"] - 1) * upload["part_size"]
    return contents[upload["files"][part["file"]]["path"]][start : start + part["size"]]


def put(client: httpx.Client, url: str, content: Iterator[bytes]) -> httpx.Response | None:
    with contextlib.suppress(httpx.HTTPError):
        return client.put(url, content=content)
    return None


def post(client: httpx.Client, url: str) -> httpx.Response | None:
    with contextlib.suppress(httpx.HTTPError):
        return client.post(url)
    return None


def job_of_upload(house: House, upload_id: str, contents: dict[str, bytes]) -> JobView:
    """Another API, the same upload: send what is missing, complete it, make the checkpoint and a job."""
    with house.api() as client:
        upload = client.get(f"/v1/uploads/{upload_id}").json()
        for part in (part for part in upload["parts"] if not part["arrived"]):
            assert client.put(part["url"], content=bytes_of(upload, part, contents)).is_success
        completed = client.post(f"/v1/uploads/{upload_id}/complete")
        assert completed.is_success, completed.text
        house.checkpoint = client.post("/v1/checkpoints", json={"source": {"upload": upload_id}}).json()["id"]
    assert not list(house.bench.store.list("uploads/"))
    assert not list((house.bench.settings.scratch / "uploads").iterdir())
    house.reconciler()
    house.worker()
    return house.submit()


def blocked(house: House) -> bool:
    """Whether somebody waits for a row that this process holds."""
    waits = "SELECT count(*) FROM pg_locks WHERE locktype IN ('transactionid', 'tuple') AND NOT granted"
    with house.bench.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        return bool(connection.exec_driver_sql(waits).scalar())
