"""A whole service of processes for one row of the fault table, on servers that can be stopped and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from sqlalchemy import func, select, update

from cli.postgres import PostgresServer
from cli.processes import Child, free_ports, tail
from cli.servers import ValkeyServer
from core.jobs.access import AccessService
from core.jobs.checkpoints import CheckpointService
from core.jobs.dispatch import BrokerDispatcher
from core.jobs.requests import PathSource, SubmitJob
from core.jobs.results import objects_of
from core.jobs.service import JobService
from core.jobs.sessions import reading, writing
from core.jobs.sweeper import Sweeper
from core.jobs.tables import Artefact, Attempt, Checkpoint, CheckpointFile, Job, Step
from core.jobs.views import JobView
from tests.service.faulty_proxy import FaultyProxy

if TYPE_CHECKING:
    from tests.service.conftest import Bench

HERE = Path(__file__).parent
OWNER = "ada"
ROOM_S = 90.0  # for whatever is waited for, on a machine that has other things to do


@dataclass
class House:
    """`mode` and `recipe` say what the workers do; `source` is the checkpoint's folder, none for a pretended one."""

    bench: Bench
    folder: Path
    environment: dict[str, str]
    database: PostgresServer
    broker: ValkeyServer
    proxy: FaultyProxy
    mode: str
    recipe: dict[str, Any]
    source: Path | None
    children: list[Child] = field(default_factory=list)
    checkpoint: str = ""

    def __post_init__(self) -> None:
        bench = self.bench
        bench.jobs = JobService(bench.engine, bench.settings, BrokerDispatcher(self.broker.url), bench.store)

    # processes

    def start(self, name: str, *command: str) -> Child:
        log = self.folder / f"{name}-{len(self.children)}.log"
        child = Child(name, [sys.executable, *command], log, environment=self.environment)
        child.start()
        self.children.append(child)
        return child

    def worker(self, *clock: str) -> Child:
        return self.start("worker", str(HERE / "told_worker.py"), str(self.folder), self.mode, *clock)

    def reconciler(self) -> Child:
        return self.start("reconciler", "-m", "worker.reconciler")

    def api(self) -> httpx.Client:
        """A started API and its owner's client."""
        [port] = free_ports(1)
        url = f"http://127.0.0.1:{port}"
        child = self.start("api", "-m", "uvicorn", "api.main:create_app", "--factory", "--port", str(port))
        child.wait_until(lambda: answers(url), ROOM_S)
        secret = AccessService(self.bench.engine).create_key(OWNER, ("write",)).secret
        return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {secret}"}, timeout=ROOM_S)

    def stop(self) -> None:
        for child in self.children:
            child.stop(grace_s=0)
        self.proxy.close()

    # work

    def register(self) -> str:
        """The checkpoint of this house."""
        if not self.checkpoint:
            service = CheckpointService(self.bench.engine, self.bench.settings, self.bench.store)
            made = service.register(OWNER, PathSource(path=str(self.source))).id if self.source else None
            self.checkpoint = made or self.bench.checkpoint(OWNER)
        return self.checkpoint

    def submit(self) -> JobView:
        return self.bench.jobs.submit(OWNER, SubmitJob(checkpoint=self.register(), recipe=self.recipe)).job

    def tell(self, step: str, *lines: str) -> None:
        (self.folder / f"told.{step}").write_text("\n".join(lines))

    def go(self) -> None:
        (self.folder / "go").touch()

    def held(self) -> int:
        """The process id of the engine that waits as it was told to."""
        path = self.folder / "held"
        self.wait(lambda: path.exists() and path.read_text(), "the step that shall be disturbed")
        engine = int(path.read_text())
        path.unlink()
        return engine

    def begun(self, kind: str) -> int:
        log = self.folder / "log"
        return sum(line.split()[1] == kind for line in log.read_text().splitlines()) if log.exists() else 0

    def wait(self, happened: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + ROOM_S
        while not happened():
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {child.name}\n{tail(child.log, 25)}" for child in self.children)
                raise AssertionError(f"{what} did not happen\n{logs}")
            time.sleep(0.05)

    def finished(self, job: JobView) -> JobView:
        """The job once it has ended; waits before another try are cut short, by the database's clock."""

        def over() -> bool:
            with writing(self.bench.engine) as session:
                waiting = update(Step).where(Step.state == "ready", Step.not_before.is_not(None))
                session.execute(waiting.values(not_before=func.clock_timestamp()))
            return self.bench.now(job).finished_at is not None

        self.wait(over, "the end of the job")
        return self.bench.now(job)

    def attempts(self, job: JobView) -> dict[str, tuple[str, ...]]:
        """How the attempts of each step ended, by `kind` or, for shards, `kind.index`."""
        found: dict[str, tuple[str, ...]] = {}
        for step in self.bench.now(job).steps:
            name = f"quantise.{step.index}" if step.kind == "quantise" else step.kind
            found[name] = tuple(attempt.state for attempt in self.bench.attempts(step.id))
        return found

    def artefacts(self, job: JobView) -> list[tuple[str, str, int, bytes]]:
        """Path, digest, size and bytes of what the job published."""
        found = self.bench.jobs.artefacts(OWNER, job.id)
        return [(one.path, one.sha256, one.size, self.bench.store.read(one.key)) for one in found]

    def forget_results(self) -> None:
        """So that the next job does everything anew: nothing that was done is equal to anything that it does."""
        with writing(self.bench.engine) as session:
            session.execute(update(Step).where(Step.output.is_not(None)).values(input_hash=Step.id))
        for key, _ in list(self.bench.store.list("steps/")):
            self.bench.store.delete(key)

    # the store

    def keys(self) -> set[str]:
        return {key for key, _ in self.bench.store.list("")}

    def sweep(self) -> None:
        """As the reconciler does every hour, with everything past its grace period."""
        past = self.bench.settings.model_copy(update={"sweep_grace_s": -60.0})
        Sweeper(self.bench.engine, past, self.bench.store).run_once()

    def named(self) -> set[str]:
        """Every key that some row names."""
        with reading(self.bench.engine) as session:
            outputs = [output for output in session.scalars(select(Step.output)) if output is not None]
            found = set(session.scalars(select(Artefact.key)))
            files = select(CheckpointFile.key).join(Checkpoint).where(Checkpoint.state != "deleted")
            found |= {key for key in session.scalars(files) if key}
        return found.union(*map(objects_of, outputs))

    def published(self) -> set[str]:
        with reading(self.bench.engine) as session:
            return set(session.scalars(select(Artefact.key)))

    def jobs(self) -> list[str]:
        with reading(self.bench.engine) as session:
            return list(session.scalars(select(Job.id).order_by(Job.id)))

    def running_attempts(self) -> int:
        with reading(self.bench.engine) as session:
            return session.scalar(select(func.count()).where(Attempt.state == "running")) or 0


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/livez", timeout=5).status_code == 200
    return False


def kill(child: Child, number: signal.Signals = signal.SIGKILL) -> None:
    """Send the signal to that process alone; SIGKILL is waited for."""
    assert child.process is not None
    child.process.send_signal(number)
    if number is signal.SIGKILL:
        child.process.wait()


def wait_for_end(child: Child, timeout_s: float = ROOM_S) -> None:
    assert child.process is not None
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.process.wait(timeout_s)


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
