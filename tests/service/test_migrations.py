"""Migrations: they lead to the tables that the code maps and back to nothing, and what cannot be is refused by SQL."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine, inspect, make_url, text
from sqlalchemy.exc import IntegrityError, OperationalError

from core.errors import StoreUnavailable
from core.jobs import health
from core.jobs.sessions import connect
from core.jobs.tables import Base
from migrations import runner

if TYPE_CHECKING:
    from tests.service.conftest import Bench

_CATALOGUE = {
    "columns": """SELECT table_name, column_name, data_type, udt_name, is_nullable, column_default, is_identity
        FROM information_schema.columns WHERE table_schema = 'public'""",
    "constraints": """SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace""",
    "indexes": "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
}


@pytest.fixture
def bare(postgres_url: str) -> Iterator[Callable[[str], Engine]]:
    """Makes databases without any table."""
    server = connect(postgres_url).execution_options(isolation_level="AUTOCOMMIT")
    made: dict[str, Engine] = {}

    def make(name: str) -> Engine:
        with server.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        made[name] = connect(make_url(postgres_url).set(database=name).render_as_string(hide_password=False))
        return made[name]

    yield make
    for name, engine in made.items():
        engine.dispose()
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


def tables(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names())


def catalogue(engine: Engine) -> dict[str, set[tuple[object, ...]]]:
    """What PostgreSQL itself says of columns, constraints and indexes, Alembic's own table left out."""
    with engine.connect() as connection:
        return {
            what: {tuple(row) for row in connection.execute(text(query)) if row[0] != "alembic_version"}
            for what, query in _CATALOGUE.items()
        }


def test_they_lead_from_nothing_to_the_mapped_tables_and_back(bare: Callable[[str], Engine]) -> None:
    engine = bare("up_and_down")
    assert runner.differences(engine) != []
    runner.upgrade(engine)
    assert runner.differences(engine) == []
    runner.upgrade(engine)  # nothing happens when it is there
    assert tables(engine) - {"alembic_version"} == set(Base.metadata.tables)
    runner.downgrade(engine)
    assert tables(engine) <= {"alembic_version"}
    runner.upgrade(engine)
    assert runner.differences(engine) == []


def test_they_make_every_check_default_and_partial_index_that_the_mapping_says(
    engine: Engine, bare: Callable[[str], Engine]
) -> None:
    """Alembic's own comparison knows nothing of these; the database's catalogue does."""
    mapped = bare("mapped")
    Base.metadata.create_all(mapped)
    expected, found = catalogue(mapped), catalogue(engine)
    for what in _CATALOGUE:
        assert found[what] == expected[what], what
    assert len(found["constraints"]) > 2 * len(Base.metadata.tables)


def test_a_difference_is_seen(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE job ADD COLUMN colour text"))
    (difference,) = runner.differences(engine)
    assert "colour" in difference


def test_several_processes_may_migrate_at_the_same_time(bare: Callable[[str], Engine]) -> None:
    engine = bare("together")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(runner.upgrade, [engine] * 3))
    assert runner.differences(engine) == []


def test_a_table_in_use_is_left_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LOCK_TIMEOUT_S", 0.1)
    before = catalogue(engine)
    with engine.connect() as reader:
        reader.execute(text("SELECT * FROM event"))  # its transaction is open
        with pytest.raises(OperationalError, match="lock timeout"):
            runner.downgrade(engine)
    assert catalogue(engine) == before


class TestTheVersion:
    def test_that_the_code_needs_is_the_newest(self, engine: Engine) -> None:
        assert runner.head() == health.SCHEMA_VERSION
        health.database_ready(engine)

    def test_that_is_another_is_said_with_what_to_do(self, engine: Engine, bare: Callable[[str], Engine]) -> None:
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '0000'"))
        for wrong, reason in ((engine, "schema is 0000"), (bare("without_tables"), "no tables")):
            with pytest.raises(StoreUnavailable, match=reason) as refused:
                health.database_ready(wrong)
            assert (refused.value.where, refused.value.hint) == ("database", "python -m migrations upgrade")


def test_the_command_migrates_the_database_of_its_environment(
    bare: Callable[[str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from migrations.__main__ import main

    engine = bare("by_command")
    monkeypatch.setenv("BITMILL_DATABASE_URL", engine.url.render_as_string(hide_password=False))
    assert main(["check"]) == 1
    assert main(["upgrade"]) == 0
    assert main(["check"]) == 0
    assert main(["downgrade"]) == 0
    monkeypatch.delenv("BITMILL_DATABASE_URL")
    assert main(["upgrade"]) == 2


def test_the_command_loads_nothing_heavy() -> None:
    code = "import sys, migrations.__main__; print({'torch', 'scipy', 'numpy'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert shown.stdout.strip() == "set()", os.linesep + shown.stderr


IMPOSSIBLE = {
    "UPDATE job SET status = 'paused'": "ck_job_status_known",
    "UPDATE job SET status = 'queued', started_at = now()": "ck_job_queued_has_not_started",
    "UPDATE job SET status = 'running', started_at = NULL": "ck_job_running_has_started",
    "UPDATE job SET status = 'succeeded'": "ck_job_terminal_has_finished",
    "UPDATE job SET finished_at = now()": "ck_job_terminal_has_finished",
    "UPDATE job SET status = 'failed', finished_at = now()": "ck_job_failed_has_code",
    "UPDATE job SET status = 'failed', finished_at = now(), error_code = 'x'": "ck_job_code_has_failure",
    "UPDATE job SET purpose = 'fun'": "ck_job_purpose_known",
    "UPDATE job SET checkpoint_id = 'ckpt_0'": "fk_job_checkpoint_id",
    "UPDATE job SET idempotency_key = 'k'": "uq_job_owner_idempotency_key",
    "UPDATE step SET kind = 'bake' WHERE kind = 'fetch'": "ck_step_kind_known",
    "UPDATE step SET attempt_id = 'att_0' WHERE state = 'ready'": "ck_step_running_has_attempt",
    "UPDATE step SET attempt_id = NULL WHERE state = 'running'": "ck_step_running_has_attempt",
    "UPDATE step SET started_at = NULL WHERE state = 'running'": "ck_step_running_has_started",
    "UPDATE step SET input_hash = NULL WHERE state = 'ready'": "ck_step_ready_has_input_hash",
    "UPDATE step SET state = 'succeeded', finished_at = now() WHERE state = 'ready'": "ck_step_done_has_output",
    "UPDATE step SET output = '{}' WHERE state = 'ready'": "ck_step_output_has_hash",
    "UPDATE step SET reused_from = 'step_0' WHERE state = 'ready'": "ck_step_reused_has_origin",
    "UPDATE step SET state = 'failed', finished_at = now() WHERE state = 'ready'": "ck_step_failed_has_error",
    "UPDATE step SET state = 'cancelled' WHERE state = 'ready'": "ck_step_terminal_has_finished",
    "UPDATE step SET index = count": "ck_step_shard_in_range",
    "UPDATE step SET charged = -1": "ck_step_charged_not_negative",
    "UPDATE step SET index = 0 WHERE kind = 'quantise'": "uq_step_job_id_kind_index",
    "UPDATE attempt SET state = 'lost', finished_at = now()": "ck_attempt_failed_has_code",
    "UPDATE attempt SET state = 'succeeded'": "ck_attempt_terminal_has_finished",
    "UPDATE attempt SET progress = 1.01": "ck_attempt_progress_in_range",
    "INSERT INTO attempt (id, step_id, job_id, number, worker_id, state, lease_expires_at) "
    "SELECT 'att_1', step_id, job_id, number + 1, worker_id, state, now() FROM attempt": "uq_attempt_running",
    "UPDATE checkpoint SET size_bytes = NULL": "ck_checkpoint_ready_has_size",
    "UPDATE checkpoint SET state = 'lost'": "ck_checkpoint_state_known",
    "DELETE FROM checkpoint": "fk_job_checkpoint_id",
    "INSERT INTO checkpoint_file (checkpoint_id, path, size) SELECT id, 'x', -1 FROM checkpoint": (
        "ck_checkpoint_file_size_not_negative"
    ),
    "INSERT INTO upload (id, owner, state, files, part_size, expires_at) "
    "VALUES ('upl_1', 'ada', 'complete', '[]', 1, now())": "ck_upload_complete_has_digest",
}


def test_what_cannot_be_is_refused_by_the_database_itself(bench: Bench) -> None:
    """Two jobs, one of which has a running step; each statement alone would tell a lie about them."""
    bench.submit()
    bench.claim(bench.submit(), "fetch")
    for statement, constraint in IMPOSSIBLE.items():
        with pytest.raises(IntegrityError) as refused, bench.engine.begin() as connection:
            connection.execute(text(statement))
        assert refused.value.orig.diag.constraint_name == constraint, statement  # type: ignore[union-attr]


def test_what_a_job_has_goes_with_it(bench: Bench) -> None:
    job = bench.submit()
    bench.work_off(job)
    with bench.engine.begin() as connection:
        connection.execute(text("DELETE FROM job"))
        for table in ("step", "step_dependency", "attempt", "event", "artefact", "metric", "tensor_result"):
            assert connection.scalar(text(f"SELECT count(*) FROM {table}")) == 0, table
