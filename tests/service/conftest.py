"""Real servers for the tests of the service: one PostgreSQL and one Valkey per test process, a fresh database per test.

`database` is the URL of a migrated, empty database; `broker` that of a flushed Valkey. Both servers lie in a temporary
folder, without fsync, and end with this process.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, make_url, select, text, update

from cli.servers import postgres, valkey
from core.config import Settings
from core.ids import new_id
from core.jobs.queue import Claim, StepQueue
from core.jobs.reconcile import Reconciler
from core.jobs.requests import SubmitJob
from core.jobs.service import JobService
from core.jobs.sessions import connect, reading, writing
from core.jobs.steps import StepRequest
from core.jobs.tables import Attempt, Checkpoint, Job
from core.jobs.views import JobView, StepView
from core.storage.local_store import LocalStore
from migrations import runner

_TEMPLATE = "bitmill_template"
_numbers = itertools.count()


def _execute(url: str, *statements: str) -> None:
    engine = connect(url)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose database `bitmill_template` is migrated."""
    with postgres(tmp_path_factory.mktemp("pg") / "data", durable=False) as url:
        _execute(url, f"CREATE DATABASE {_TEMPLATE}")
        engine = connect(_named(url, _TEMPLATE))
        runner.upgrade(engine)
        engine.dispose()
        yield url


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with valkey(tmp_path_factory.mktemp("valkey") / "data") as url:
        yield url


@pytest.fixture
def database(postgres_url: str) -> Iterator[str]:
    """The URL of a fresh, migrated database, dropped at the end."""
    name = f"test_{next(_numbers)}"
    _execute(postgres_url, f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE} STRATEGY FILE_COPY")
    yield _named(postgres_url, name)
    _execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def broker(valkey_url: str) -> str:
    """The URL of an empty broker."""
    flush(valkey_url)
    return valkey_url


def flush(broker_url: str) -> None:
    """Lose every message."""
    import redis

    client = redis.Redis(unix_socket_path=broker_url.removeprefix("redis+socket://"))
    client.flushall()
    client.close()


@pytest.fixture
def settings(database: str, valkey_url: str, tmp_path: Path) -> Settings:
    """Settings with short leases, whose store, scratch and allowed root are in the test's own folder."""
    return Settings(
        database_url=database,
        broker_url=valkey_url,
        store_url=(tmp_path / "objects").as_uri(),
        data_dir=tmp_path / "data",
        allowed_roots=(tmp_path / "sources",),
        lease_s=2.0,
        heartbeat_s=0.3,
        reconcile_s=0.3,
        redispatch_s=0.5,
        engine_grace_s=2.0,
        device="cpu",
        min_free_disk_bytes=0,
    )


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    """Connections to this test's database."""
    engine = connect(settings.database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "objects")


def environment_of(settings: Settings) -> dict[str, str]:
    """The settings as `BITMILL_*` variables, for processes."""
    values = settings.model_dump(mode="json", exclude_none=True)
    return {
        f"BITMILL_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
        for name, value in values.items()
    }


@pytest.fixture
def environment(settings: Settings) -> dict[str, str]:
    """This process's environment with the test's settings, for child processes that import the project."""
    return {**os.environ, **environment_of(settings), "PYTHONPATH": _with_root(os.environ.get("PYTHONPATH"))}


def _with_root(path: str | None) -> str:
    return os.pathsep.join(part for part in (str(Path(__file__).parents[2]), path) if part)


def _named(url: str, database: str) -> str:
    return make_url(url).set(database=database).render_as_string(hide_password=False)


RECIPE: dict[str, Any] = {
    "version": 1,
    "target": {"bits_per_param": 4.0},
    "format": "int4-asym@128:absmax:bf16",
    "rounding": {"name": "nearest"},
    "allocation": {"name": "fisher"},
    "calibration": {"text": "builtin", "sequences": 4, "sequence_length": 32, "seed": 0},
    "evaluation": {"text": "builtin", "sequences": 4, "sequence_length": 32},
    "overrides": [],
    "groups": "auto",
    "exports": ["bitmill"],
    "gate": None,
    "seed": 0,
}
SHARDS = 3


class Outbox:
    """A dispatcher that keeps what it is given; `down` makes it a broker that does not answer."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.down = False

    def send(self, step_id: str, queue: str) -> None:
        if self.down:
            raise ConnectionError("no broker")
        self.sent.append((step_id, queue))

    def ids(self) -> list[str]:
        return [step_id for step_id, _ in self.sent]


class Bench:
    """The services on a real database, and a pretended worker that can do every kind of step."""

    def __init__(self, engine: Engine, settings: Settings, store: LocalStore) -> None:
        self.engine, self.settings, self.store = engine, settings, store
        self.outbox = Outbox()
        self.jobs = JobService(engine, settings, self.outbox, store)
        self.queue = StepQueue(engine, settings, self.outbox, store)
        self.reconciler = Reconciler(engine, settings, self.outbox, store)

    def with_settings(self, **changes: Any) -> Bench:
        """The same database under other settings."""
        return Bench(self.engine, self.settings.model_copy(update=changes), self.store)

    def checkpoint(self, owner: str = "ada") -> str:
        """A registered checkpoint of such a size that it has `SHARDS` shards."""
        found = new_id("checkpoint")
        with writing(self.engine) as session:
            session.add(
                Checkpoint(
                    id=found,
                    owner=owner,
                    name="model",
                    state="ready",
                    source={"kind": "path", "path": "/models/one"},
                    size_bytes=SHARDS * self.settings.shard_bytes,
                    inspection={"parameters": 1},
                )
            )
        return found

    def submit(self, checkpoint: str | None = None, owner: str = "ada", **changes: Any) -> JobView:
        """A job; `changes` of `SubmitJob`."""
        request = SubmitJob(**{"checkpoint": checkpoint or self.checkpoint(owner), "recipe": RECIPE, **changes})
        return self.jobs.submit(owner, request).job

    def step(self, job: JobView, kind: str, index: int = 0) -> StepView:
        """The step as it is now."""
        steps = self.jobs.get(self.owner_of(job), job.id).steps
        return next(step for step in steps if (step.kind, step.index) == (kind, index))

    def now(self, job: JobView) -> JobView:
        return self.jobs.get(self.owner_of(job), job.id)

    def owner_of(self, job: JobView) -> str:
        with reading(self.engine) as session:
            return session.scalars(select(Job.owner).where(Job.id == job.id)).one()

    def claim(self, job: JobView, kind: str, index: int = 0, worker: str = "wrk_a") -> Claim:
        """Claim that step; it must be possible."""
        claim = self.queue.claim(self.step(job, kind, index).id, worker)
        assert claim is not None
        return claim

    def output(self, claim: Claim) -> dict[str, Any]:
        """What a step of that kind answers, with its object in the store."""
        request = claim.request
        key = f"steps/{request.input_hash}/{request.kind}.bin"
        self.store.put_bytes(key, request.input_hash.encode())
        file = {"key": key, "sha256": "0" * 64, "size": 64}
        return {"files": {f"{request.kind}.bin": file}, "values": self._values(request, file)}

    def _values(self, request: StepRequest, file: dict[str, Any]) -> dict[str, Any]:
        entry = {"path": "model.safetensors", **file}
        row = {"name": f"w{request.index}", "shape": [2, 3], "format": "int4@128", "bits": 4.25, "fisher_mean": 0.5}
        values: dict[str, dict[str, Any]] = {
            "fetch": {"checkpoint_sha": "c" * 64, "files": [entry]},
            "calibrate": {"positions": 128},
            "allocate": {"predicted_kl": 0.125},
            "quantise": {"tensors": [row]},
            "assemble": {"bits_per_param": 3.99, "size_bytes": 1000},
            "evaluate": {"metrics": {"kl_mean": 0.1, "perplexity": 11.0, "reference_perplexity": 10.0}},
            "export": {
                "export": "bitmill",
                "artefacts": [entry],
                "summary": {"bits_per_param": 3.99},
                "gate": {"ok": True},
            },
        }
        return values[request.kind]

    def finish(self, job: JobView, kind: str, index: int = 0) -> None:
        """Claim that step and succeed."""
        claim = self.claim(job, kind, index)
        assert self.queue.succeed(claim.attempt_id, self.output(claim))

    def work_off(self, job: JobView, *, before: str = "") -> JobView:
        """Do every ready step of the job, in order, until there is none, or until one of the kind `before` is next."""
        while True:
            ready = [step for step in self.now(job).steps if step.status == "ready"]
            if not ready or ready[0].kind == before:
                return self.now(job)
            claim = self.queue.claim(ready[0].id, "wrk_a")
            if claim is not None:
                assert self.queue.succeed(claim.attempt_id, self.output(claim))

    def kinds(self, job: JobView) -> list[str]:
        """The kinds of the job's events, in order."""
        return [event.kind for event in self.jobs.events(self.owner_of(job), job.id)]

    def states(self, job: JobView) -> dict[str, str]:
        """State by `kind` or, for shards, `kind.index`."""
        return {
            step.kind if step.kind != "quantise" else f"quantise.{step.index}": step.status
            for step in self.now(job).steps
        }

    def attempts(self, step_id: str) -> list[Attempt]:
        with reading(self.engine) as session:
            return list(session.scalars(select(Attempt).where(Attempt.step_id == step_id).order_by(Attempt.number)))

    def let_leases_lapse(self) -> None:
        """As if every running attempt had been silent for longer than its lease."""
        with writing(self.engine) as session:
            session.execute(
                update(Attempt).where(Attempt.state == "running").values(lease_expires_at=func.clock_timestamp())
            )


@pytest.fixture
def bench(engine: Engine, settings: Settings, store: LocalStore) -> Bench:
    return Bench(engine, settings, store)


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Path:
    """The folder of a random Llama of 100 000 parameters."""
    from tests.unit.pipeline.conftest import write_llama

    return write_llama(tmp_path / "sources" / "tiny")
