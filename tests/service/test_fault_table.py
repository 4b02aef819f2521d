"""The fault table: whatever is killed, stopped, cut off or filled up, at whatever step, nothing is lost or done wrong.

A row is a fault in the middle of a step. Servers are real (PostgreSQL, Valkey, an S3 server behind a proxy that can
misbehave), processes are real and die by SIGKILL. Each row proves: the job ends as expected; the disturbed step has
exactly the attempts expected, every other step one; the events tell of it; no attempt is left running; after a sweep
the store holds what rows name and nothing else, and everything that was published; and the artefact's bytes are those
of a job that nobody disturbed. Rows with a `real` pipeline quantise a model; the others only pretend to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from safetensors.numpy import save_file

from cli.postgres import PostgresServer
from cli.servers import S3Endpoint, ValkeyServer, seaweed
from core.config import Settings
from core.ids import new_id
from core.jobs.sessions import connect
from core.jobs.views import JobView
from core.recipe.recipe import load_recipe
from core.storage import s3_store
from core.storage.object_store import ObjectStore, open_store
from migrations import runner
from tests.service.fault_house import House
from tests.service.faults import (
    DATA_FREE,
    broker_down_at_submit,
    cancel,
    cancel_before_anything,
    duplicate_messages,
    engine_exits,
    engine_outlives_its_supervisors_lease,
    flush_broker,
    flush_broker_before_anything,
    kill_api_before_its_answer,
    kill_api_in_a_completion,
    kill_api_in_a_part,
    kill_api_in_a_submission,
    kill_engine,
    kill_engine_that_has_published,
    kill_reconciler_and_worker,
    kill_reconciler_in_its_pass,
    kill_worker,
    restart_broker,
    restart_database,
    store_away_for_long,
    store_becomes,
    sweep_without_mercy,
    terminate_deaf_worker,
    terminate_worker,
    told,
    wake_a_zombie_worker,
    wrong_clock,
)
from tests.service.faulty_proxy import FaultyProxy

if TYPE_CHECKING:
    from tests.service.conftest import Bench

pytestmark = [pytest.mark.xdist_group("fault_table"), pytest.mark.timeout(600)]

KINDS = ("fetch", "calibrate", "allocate", "quantise.1", "assemble", "evaluate", "export")
SOME = ("fetch", "quantise.1", "export")
MEASURED = DATA_FREE | {
    "format": "int4@32",
    "allocation": "fisher",
    "calibration": {"text": "builtin", "sequences": 2, "sequence_length": 32},
    "evaluation": {"text": "builtin", "sequences": 2, "sequence_length": 32},
}
_TEMPLATE = "bitmill_template"


# servers: this table's own, because rows stop them


@pytest.fixture(scope="module")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    server = PostgresServer(tmp_path_factory.mktemp("pg") / "data", durable=False)
    server.start()
    admin = connect(server.url)
    with admin.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {_TEMPLATE}")
    admin.dispose()
    template = connect(server.url.replace("/bitmill?", f"/{_TEMPLATE}?"))
    runner.upgrade(template)
    template.dispose()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def postgres_url(postgres_server: PostgresServer) -> str:
    return postgres_server.url


@pytest.fixture(scope="module")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path_factory.mktemp("valkey") / "data")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def valkey_url(valkey_server: ValkeyServer) -> str:
    return valkey_server.url


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Endpoint]:
    with seaweed(tmp_path_factory.mktemp("s3")) as endpoint:
        client = s3_store.make_client(settings_of(endpoint), endpoint.url)
        client.create_bucket(Bucket="faults")
        yield endpoint


def settings_of(endpoint: S3Endpoint) -> Settings:
    return Settings(s3_endpoint=endpoint.url, s3_access_key=endpoint.access_key, s3_secret_key=endpoint.secret_key)


@pytest.fixture
def proxy(s3: S3Endpoint) -> FaultyProxy:
    parts = urlsplit(s3.url)
    assert parts.hostname is not None
    assert parts.port is not None
    return FaultyProxy(parts.hostname, parts.port)


@pytest.fixture
def settings(settings: Settings, s3: S3Endpoint, proxy: FaultyProxy) -> Settings:
    """Processes reach the store through the proxy."""
    return settings.model_copy(
        update={
            "store_url": f"s3://faults/{new_id('upload')}",
            "s3_endpoint": f"http://127.0.0.1:{proxy.port}",
            "s3_access_key": s3.access_key,
            "s3_secret_key": s3.secret_key,
            "lease_s": 3.0,
            "heartbeat_s": 0.5,
            "shard_bytes": 40_000,
            "threads": 1,
        }
    )


@pytest.fixture
def store(settings: Settings, s3: S3Endpoint) -> ObjectStore:
    """The test looks at the store directly."""
    return open_store(settings.model_copy(update={"s3_endpoint": s3.url}))


@dataclass(frozen=True)
class Row:
    """A fault in a step. `attempts`: how those of that step end; None: any, but within the limit."""

    fault: Callable[[House, str], JobView]
    step: str
    attempts: tuple[str, ...] | None
    events: tuple[str, ...] = ()
    state: str = "succeeded"
    code: str = ""
    pipeline: str = "pretended"
    name: str = ""
    fast: bool = False

    def parameter(self) -> Any:
        name = self.name or self.fault.__name__
        marks = [] if self.fast else [pytest.mark.slow]
        return pytest.param(self, id=f"{name}-{self.step}-{self.pipeline}", marks=marks)


LOST = ("lost", "succeeded")
RETRIED = ("attempt.lost", "step.retrying")
ROWS = [
    *(Row(kill_engine, kind, LOST, RETRIED, fast=kind == "quantise.1") for kind in KINDS),
    *(Row(kill_engine_that_has_published, kind, LOST, RETRIED) for kind in SOME),
    Row(engine_exits, "calibrate", LOST, RETRIED),
    *(Row(kill_worker, kind, LOST, RETRIED, fast=kind == "assemble") for kind in KINDS),
    *(Row(kill_reconciler_and_worker, kind, LOST, RETRIED) for kind in ("calibrate", "export")),
    Row(kill_reconciler_in_its_pass, "evaluate", LOST, RETRIED),
    *(
        Row(wake_a_zombie_worker, kind, LOST, RETRIED, fast=kind == "export")
        for kind in ("fetch", "quantise.1", "export")
    ),
    *(Row(engine_outlives_its_supervisors_lease, kind, LOST, RETRIED) for kind in ("quantise.1", "export")),
    *(Row(terminate_worker, kind, ("interrupted", "succeeded"), ("attempt.interrupted",)) for kind in KINDS),
    Row(terminate_deaf_worker, "assemble", ("interrupted", "succeeded"), ("attempt.interrupted",)),
    *(
        Row(cancel, kind, ("cancelled",), ("job.cancelling", "attempt.cancelled"), "cancelled", fast=kind == "evaluate")
        for kind in KINDS
    ),
    Row(cancel_before_anything, "fetch", (), ("job.cancelling", "job.cancelled"), "cancelled", fast=True),
    Row(told("before memory"), "calibrate", ("failed", "succeeded"), ("step.retrying",), name="out_of_memory"),
    Row(told("after memory"), "evaluate", ("failed", "succeeded"), ("step.retrying",), name="out_of_memory"),
    Row(
        told("before memory", "before memory"),
        "calibrate",
        ("failed", "failed"),
        ("step.failed", "job.failed"),
        "failed",
        "out_of_memory",
        name="out_of_memory_twice",
    ),
    Row(told("after fail out_of_disk"), "quantise.1", ("failed", "succeeded"), ("step.retrying",), name="full_disk"),
    Row(
        told("after fail out_of_disk", "before fail out_of_disk"),
        "assemble",
        ("failed", "failed"),
        ("step.failed", "job.failed"),
        "failed",
        "out_of_disk",
        name="full_disk_twice",
    ),
    Row(
        told("after fail non_finite_weights"),
        "quantise.1",
        ("failed",),
        ("step.failed", "job.failed"),
        "failed",
        "non_finite_weights",
        name="broken_numbers",
        fast=True,
    ),
    *(
        Row(duplicate_messages, kind, ("succeeded",), fast=kind == "fetch")
        for kind in ("fetch", "quantise.1", "export")
    ),
    *(Row(flush_broker, kind, ("succeeded",), fast=kind == "fetch") for kind in ("fetch", "quantise.1", "evaluate")),
    Row(flush_broker_before_anything, "fetch", ("succeeded",)),
    Row(broker_down_at_submit, "fetch", ("succeeded",)),
    Row(restart_broker, "calibrate", ("succeeded",)),
    *(Row(restart_database, kind, ("succeeded",)) for kind in SOME),
    *(Row(store_becomes("slow", 2.0), kind, ("succeeded",), name="slow_store") for kind in ("fetch", "export")),
    *(Row(store_becomes("refuse", 0.2), kind, None, name="store_refuses") for kind in ("quantise.1", "assemble")),
    Row(store_away_for_long, "export", ("failed", "succeeded"), ("step.retrying",)),
    Row(wrong_clock(-600), "fetch", ("succeeded",), name="clock_ten_minutes_late"),
    Row(wrong_clock(600), "export", ("succeeded",), name="clock_ten_minutes_early"),
    *(Row(sweep_without_mercy, kind, ("succeeded",)) for kind in ("allocate", "export")),
    # the product's own pipeline on a model
    Row(kill_api_in_a_part, "fetch", ("succeeded",), pipeline="real"),
    Row(kill_api_in_a_completion, "fetch", ("succeeded",), pipeline="real"),
    Row(sweep_without_mercy, "quantise.0", ("succeeded",), pipeline="real"),
    Row(kill_api_in_a_submission, "fetch", ("succeeded",), pipeline="real"),
    Row(kill_api_before_its_answer, "fetch", ("succeeded",), pipeline="real"),
    *(Row(kill_engine_that_has_published, kind, LOST, RETRIED, pipeline="real") for kind in ("fetch", "quantise.0")),
    *(Row(kill_worker, kind, LOST, RETRIED, pipeline="real") for kind in ("allocate", "quantise.0", "export")),
    Row(wake_a_zombie_worker, "quantise.0", LOST, RETRIED, pipeline="real"),
    Row(cancel, "quantise.0", ("cancelled",), ("attempt.cancelled",), "cancelled", pipeline="real"),
    *(
        Row(store_becomes("truncate", 1.0), kind, None, pipeline="real", name="truncating_store")
        for kind in ("quantise.0", "assemble")
    ),
    Row(store_becomes("refuse", 0.2), "fetch", None, pipeline="real", name="store_refuses"),
    *(
        Row(kill_engine_that_has_published, kind, LOST, RETRIED, pipeline="measured")
        for kind in ("calibrate", "evaluate")
    ),
    Row(kill_worker, "calibrate", LOST, RETRIED, pipeline="measured"),
    Row(terminate_worker, "evaluate", ("interrupted", "succeeded"), ("attempt.interrupted",), pipeline="measured"),
]


def test_the_table_has_as_many_rows_as_it_shall_have() -> None:
    assert len({(row.name or row.fault.__name__, row.step, row.pipeline) for row in ROWS}) == len(ROWS) >= 40


def two_matrices(folder: Path) -> Path:
    """A checkpoint of two small matrices of no known architecture."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    tensors = {f"layers.{at}.weight": chance.normal(size=(64, 64)).astype(np.float32) for at in range(2)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "layers"}')
    return folder


def source_of(row: Row, folder: Path) -> Path | None:
    if row.pipeline == "pretended":
        return None
    if row.pipeline == "real":
        return two_matrices(folder / "matrices")
    from tests.unit.pipeline.conftest import write_llama

    return write_llama(folder / "llama")


@pytest.fixture
def house(
    row: Row,
    bench: Bench,
    environment: dict[str, str],
    postgres_server: PostgresServer,
    valkey_server: ValkeyServer,
    proxy: FaultyProxy,
    broker: str,
    tmp_path: Path,
) -> Iterator[House]:
    from tests.service.conftest import RECIPE

    folder = tmp_path / "house"
    folder.mkdir()
    house = House(
        bench=bench,
        folder=folder,
        environment=environment | {"OMP_NUM_THREADS": "1"},
        database=postgres_server,
        broker=valkey_server,
        proxy=proxy,
        mode="pretended" if row.pipeline == "pretended" else "real",
        recipe=RECIPE if row.pipeline == "pretended" else canonical(row),
        source=source_of(row, tmp_path / "sources"),
    )
    yield house
    house.stop()


def canonical(row: Row) -> dict[str, Any]:
    return load_recipe(DATA_FREE if row.pipeline == "real" else MEASURED).canonical()


@pytest.mark.parametrize("row", [row.parameter() for row in ROWS])
def test_a_fault_loses_nothing_and_changes_no_byte(house: House, row: Row) -> None:
    job = house.finished(row.fault(house, row.step))
    assert job.status == row.state, job.failure
    assert (job.failure.code if job.failure else "") == row.code
    check_attempts(house, job, row)
    assert [kind for kind in row.events if kind not in house.bench.kinds(job)] == []
    assert house.running_attempts() == 0
    check_store(house)
    if row.state == "succeeded":
        disturbed = house.artefacts(job)
        assert disturbed
        assert disturbed == undisturbed(house)
        check_store(house)


def check_attempts(house: House, job: JobView, row: Row) -> None:
    """Those of the disturbed step as the row says, and one of every other step that was reached."""
    found = house.attempts(job)
    disturbed = found.pop(row.step)
    if row.attempts is None:  # the fault lasts, and may meet the steps that follow as well
        assert {attempts[-1] for attempts in (disturbed, *found.values())} == {"succeeded"}
        assert max(map(len, (disturbed, *found.values()))) <= house.bench.settings.max_attempts
        return
    assert disturbed == row.attempts
    allowed = {("succeeded",)} if row.state == "succeeded" else {(), ("succeeded",)}
    assert {name: attempts for name, attempts in found.items() if attempts not in allowed} == {}


def check_store(house: House) -> None:
    house.sweep()
    keys = house.keys()
    assert keys - house.named() == set(), "orphans"
    assert house.published() - keys == set(), "lost"


def undisturbed(house: House) -> list[tuple[str, str, int, bytes]]:
    """What a job of the same checkpoint and recipe publishes that does everything anew, and that nobody disturbs."""
    house.forget_results()
    job = house.finished(house.submit())
    assert job.status == "succeeded", job.failure
    assert {step.status for step in job.steps} == {"succeeded"}
    return house.artefacts(job)
