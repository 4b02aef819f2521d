"""Workers and a reconciler as processes, on a real broker and a real database, killed and stopped in the middle."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cli.processes import Child, tail
from core.jobs.dispatch import BrokerDispatcher
from core.jobs.service import JobService
from core.jobs.views import JobView
from core.jobs.workers import WorkerRegistry

if TYPE_CHECKING:
    from tests.service.conftest import Bench

HERE = Path(__file__).parent
pytestmark = pytest.mark.xdist_group("worker_processes")


@dataclass
class Shop:
    """Processes around a bench whose hints go through the broker."""

    bench: Bench
    folder: Path
    environment: dict[str, str]
    broker_url: str
    children: list[Child] = field(default_factory=list)

    def start(self, name: str, *command: str) -> Child:
        child = Child(name, [sys.executable, *command], self.folder / f"{name}.log", environment=self.environment)
        child.start()
        self.children.append(child)
        return child

    def worker(self, name: str = "worker") -> Child:
        """A worker that has begun to consume."""
        child = self.start(name, str(HERE / "pretended_worker.py"), str(self.folder))
        child.wait_until(lambda: '"worker_started"' in tail(child.log, 1000), 30)
        return child

    def reconciler(self) -> Child:
        return self.start("reconciler", "-m", "worker.reconciler")

    def tell(self, step: str, what: str) -> None:
        (self.folder / step).write_text(what)

    def begun(self, kind: str) -> int:
        log = self.folder / "log"
        return sum(line.split()[1] == kind for line in log.read_text().splitlines()) if log.exists() else 0

    def wait(self, happened: Callable[[], object], what: str, timeout_s: float = 40) -> None:
        deadline = time.monotonic() + timeout_s
        while not happened():
            logs = "\n".join(f"--- {child.name}\n{tail(child.log, 30)}" for child in self.children)
            assert time.monotonic() < deadline, f"{what} did not happen\n{logs}"
            time.sleep(0.05)

    def finished(self, job: JobView, status: str = "succeeded") -> JobView:
        self.wait(lambda: self.bench.now(job).finished_at, "the end of the job")
        done = self.bench.now(job)
        assert done.status == status, done.failure
        return done

    def artefacts(self, job: JobView) -> list[tuple[str, str]]:
        return [(found.path, found.sha256) for found in self.bench.jobs.artefacts("ada", job.id)]


@pytest.fixture
def shop(bench: Bench, broker: str, environment: dict[str, str], tmp_path: Path) -> Iterator[Shop]:
    folder = tmp_path / "shop"
    folder.mkdir()
    bench.jobs = JobService(bench.engine, bench.settings, BrokerDispatcher(broker), bench.store)
    shop = Shop(bench, folder, environment, broker)
    yield shop
    for child in shop.children:
        child.stop(grace_s=0)


def test_a_job_goes_through_the_broker_to_a_worker_and_ends(shop: Shop) -> None:
    worker = shop.worker()
    job = shop.bench.submit()
    done = shop.finished(job)
    assert [step.attempts for step in done.steps] == [1] * len(done.steps)
    (registered,) = WorkerRegistry(shop.bench.engine).list()
    assert (registered.state, registered.device, registered.queues) == ("alive", "cpu", ("cpu", "gpu"))
    maps = Path(f"/proc/{worker.pid}/maps").read_text()
    assert "torch" not in maps
    worker.stop(grace_s=20)
    assert worker.process is not None
    assert worker.process.returncode == 0
    assert WorkerRegistry(shop.bench.engine).list()[0].state == "gone"


def test_a_worker_killed_in_the_middle_loses_nothing_and_changes_no_byte(shop: Shop) -> None:
    first = shop.worker("first")
    shop.tell("quantise.1", "sleep 60")
    job = shop.bench.submit()
    shop.wait(lambda: shop.begun("quantise") >= 2, "the shard that takes long")
    assert first.process is not None
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    shop.reconciler()
    shop.worker("second")
    done = shop.finished(job)
    assert sum(step.attempts for step in done.steps) == len(done.steps) + 1
    assert "attempt.lost" in shop.bench.kinds(job)
    assert len(list(shop.bench.settings.scratch.glob("wrk_*"))) == 1  # what the first left behind was removed
    for key, _ in list(shop.bench.store.list("steps/")):
        shop.bench.store.delete(key)  # nothing can be reused
    again = shop.finished(shop.bench.submit(job.checkpoint, recipe=job.recipe))
    assert {step.status for step in again.steps} == {"succeeded"}
    assert shop.artefacts(again) == shop.artefacts(job)


def test_an_engine_killed_in_the_middle_is_replaced(shop: Shop) -> None:
    shop.worker()
    shop.reconciler()
    shop.tell("evaluate", "exit 137")
    done = shop.finished(shop.bench.submit())
    attempts = {step.kind: step.attempts for step in done.steps}
    assert attempts["evaluate"] == 2
    assert attempts["export"] == 1


def test_a_broker_that_forgets_everything_loses_no_job(shop: Shop) -> None:
    import redis

    jobs = [shop.bench.submit() for _ in range(3)]
    client = redis.Redis(unix_socket_path=shop.broker_url.removeprefix("redis+socket://"))
    assert client.llen("cpu") == 3
    client.flushall()
    shop.reconciler()
    shop.worker()
    for job in jobs:
        shop.finished(job)


def test_messages_that_come_many_times_are_one_step(shop: Shop) -> None:
    job = shop.bench.submit()
    dispatcher = BrokerDispatcher(shop.broker_url)
    for _ in range(10):
        dispatcher.send(shop.bench.step(job, "fetch").id, "cpu")
    shop.worker("first")
    shop.worker("second")
    shop.finished(job)
    assert shop.begun("fetch") == 1


def test_a_worker_that_is_asked_to_stop_gives_its_step_back(shop: Shop) -> None:
    first = shop.worker("first")
    shop.tell("fetch", "sleep 60")
    job = shop.bench.submit()
    shop.wait(lambda: shop.begun("fetch"), "the fetch step")
    began = time.monotonic()
    first.stop(grace_s=20)
    assert time.monotonic() - began < 10
    assert first.process is not None
    assert first.process.returncode == 0
    assert shop.bench.step(job, "fetch").status == "ready"
    shop.reconciler()
    shop.worker("second")
    done = shop.finished(job)
    assert [step.attempts for step in done.steps] == [1] * len(done.steps)


def test_a_cancel_ends_a_running_step_within_a_heartbeat(shop: Shop) -> None:
    shop.worker()
    shop.tell("calibrate", "deaf 60")
    job = shop.bench.submit()
    shop.wait(lambda: shop.begun("calibrate"), "the calibrate step")
    began = time.monotonic()
    shop.bench.jobs.cancel("ada", job.id)
    shop.finished(job, "cancelled")
    assert time.monotonic() - began < 5
    shop.finished(shop.bench.submit())  # the worker goes on


def test_two_workers_share_the_shards_of_a_job(shop: Shop) -> None:
    for index in range(3):
        shop.tell(f"quantise.{index}", "sleep 1.5")
    shop.worker("first")
    shop.worker("second")
    job = shop.bench.submit()
    shop.finished(job)
    workers = {
        event.data["worker"]
        for event in shop.bench.jobs.events("ada", job.id)
        if event.kind == "step.started" and event.step_kind == "quantise"
    }
    assert len(workers) == 2


def test_a_broker_that_is_away_does_not_hold_up_a_submission(bench: Bench, tmp_path: Path) -> None:
    away = BrokerDispatcher(f"redis+socket://{tmp_path}/nobody.sock")
    jobs = JobService(bench.engine, bench.settings, away, bench.store)
    began = time.monotonic()
    for _ in range(3):
        bench.jobs = jobs
        assert bench.submit().status == "queued"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("module", ["worker.__main__", "worker.supervisor", "worker.reconciler", "worker.engine"])
def test_importing_a_worker_loads_no_torch(module: str, environment: dict[str, str]) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules or 'numpy' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=HERE.parents[1]
    )
    assert shown.stdout.strip() == "False"
