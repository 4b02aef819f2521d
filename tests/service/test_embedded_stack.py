"""`bitmill up` as a user meets it: real servers and processes, killed in every way, with nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from cli.client import find_connection

pytestmark = pytest.mark.xdist_group("stack")


class Up:
    """One `bitmill up` process on a folder."""

    def __init__(self, data_dir: Path, *arguments: str) -> None:
        self.data_dir = data_dir
        command = [sys.executable, "-m", "cli.main", "up", "--data-dir", str(data_dir), "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def url(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line.startswith("http://"), f"{line!r}: {self._errors()}"
        return line

    def _errors(self) -> str:
        self.process.wait(timeout=30)
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def end(self, number: signal.Signals, within_s: float) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout=within_s)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        return code


def processes_of(data_dir: Path) -> dict[int, str]:
    """Living processes that were started for that folder: their environment or their working folder says so."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (entry / "environ").read_bytes()
            inside = f"BITMILL_DATA_DIR={data_dir}\0".encode() in environment
            if inside or (entry / "cwd").resolve().is_relative_to(data_dir):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return {pid: command for pid, command in found.items() if command}


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def pid_of(data_dir: Path, what: str) -> int | None:
    """The oldest process of the folder whose command line holds `what`."""
    return min((pid for pid, command in processes_of(data_dir).items() if what in command), default=None)


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "data"
    for pid in processes_of(tmp_path / "data"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_stack_heals_stops_and_goes_on(data_dir: Path) -> None:
    up = Up(data_dir)
    url = up.url()
    assert httpx.get(f"{url}/readyz").status_code == 200
    assert find_connection(None, None, data_dir).url == url
    assert (data_dir / "key").stat().st_mode & 0o777 == 0o600
    key = (data_dir / "key").read_text()

    second = Up(data_dir)
    assert second.process.wait(timeout=30) == 2
    assert second.process.stderr is not None
    assert "another `bitmill up`" in second.process.stderr.read()

    for victim in ("-m worker ", "worker.reconciler", "api.main", "valkey-server"):
        pid = pid_of(data_dir, victim)
        assert pid is not None, f"{victim} runs: {processes_of(data_dir)}"
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid, victim=victim: pid_of(data_dir, victim) not in (None, pid))  # type: ignore[misc]
    wait_for(lambda: _ready(url))

    assert up.end(signal.SIGTERM, within_s=15) == 0
    assert processes_of(data_dir) == {}

    again = Up(data_dir)
    url = again.url()
    assert (data_dir / "key").read_text() == key
    authorised = httpx.get(f"{url}/v1/jobs", headers={"Authorization": f"Bearer {key.strip()}"})
    assert authorised.status_code == 200
    assert httpx.get(f"{url}/v1/jobs").status_code == 401
    assert again.end(signal.SIGINT, within_s=15) == 0
    assert processes_of(data_dir) == {}


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_nothing_survives_the_death_of_up_and_the_next_one_starts(data_dir: Path) -> None:
    up = Up(data_dir, "--workers", "2")
    up.url()
    assert len(processes_of(data_dir)) >= 6
    up.end(signal.SIGKILL, within_s=5)
    wait_for(lambda: processes_of(data_dir) == {}, 15)
    again = Up(data_dir)
    assert _ready(again.url())
    again.end(signal.SIGTERM, within_s=15)


def test_a_taken_port_is_refused_when_it_was_asked_for(data_dir: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        up = Up(data_dir, "--port", str(taken.getsockname()[1]))
        assert up.process.wait(timeout=60) == 2
    assert up.process.stderr is not None
    assert "is taken" in up.process.stderr.read()
    assert processes_of(data_dir) == {}
