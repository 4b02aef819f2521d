"""The embedded stack: the whole service on one machine, from real servers, under one folder.

`Stack.start` starts PostgreSQL and Valkey (unless the settings name servers of the user's), migrates, and starts the
API, the workers and the reconciler as child processes with `BITMILL_*` settings; `supervise` starts again, with a
growing delay, whatever ends; `stop` ends all. Children die with this process even after kill -9, and what they were
doing is taken up by the next start on the same folder. One process holds a folder at a time.

    D/key      the admin key, readable by its owner only      D/url       where the API listens
    D/logs/    one log per process                            D/objects/  the object store
    D/postgres/, D/valkey/, D/scratch/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol, TypeVar

from cli.processes import Child, StartFailed, free_ports, port_is_free, tail
from cli.servers import PostgresServer, ValkeyServer
from core.clock import monotonic
from core.config import Settings
from core.errors import Conflict

_READY_S = 90.0
_STOP_S = 8.0
_FIRST_DELAY_S, _LONGEST_DELAY_S, _SETTLED_S = 0.5, 15.0, 30.0
_MAX_LOG_BYTES = 16 << 20

T = TypeVar("T")


class Service(Protocol):
    """What the stack keeps running: a server of `cli.servers` or a child process."""

    @property
    def running(self) -> bool: ...
    def start(self) -> None: ...
    def signal_stop(self) -> None: ...
    def stop(self) -> None: ...


@dataclass(frozen=True)
class StackOptions:
    """What `bitmill up` was asked for. `port` 0: any free one; None: the usual one, or any when it is taken."""

    data_dir: Path
    host: str = "127.0.0.1"
    port: int | None = None
    workers: int = 1
    allowed_roots: tuple[Path, ...] = ()
    durable: bool = True


@dataclass
class _Kept:
    """A service with its history of restarts."""

    name: str
    service: Service
    started_at: float = field(default_factory=monotonic)
    delay_s: float = _FIRST_DELAY_S
    due_at: float | None = None


class Stack:
    """The processes of one `bitmill up`. For the main thread: the children end with the thread that starts them."""

    def __init__(self, options: StackOptions, settings: Settings) -> None:
        self.options, self.settings = options, settings
        self.data_dir = options.data_dir.expanduser().absolute()
        self.logs = self.data_dir / "logs"
        self.url = ""
        self.key = ""
        self._kept: list[_Kept] = []
        self._lock: int | None = None

    def start(self) -> str:
        """Start everything; the URL once `/readyz` answers 200. StartFailed or Conflict when it does not come up."""
        self._prepare()
        port = self._choose_port()
        environment = self._environment()
        self._start_servers(environment)
        self._migrate(environment)
        self.url = f"http://{_address(self.options.host)}:{port}"
        environment |= {"BITMILL_HOST": self.options.host, "BITMILL_PORT": str(port)}
        api = self._add_child("api", _api_command(self.options.host, port), environment)
        self._add_child("reconciler", _python("worker.reconciler"), environment)
        for number in range(self.options.workers):
            self._add_child(f"worker-{number}", _python("worker"), environment)
        api.wait_until(self._ready, _READY_S)
        (self.data_dir / "url").write_text(self.url + "\n")
        return self.url

    def supervise_once(self) -> None:
        """Start again what has ended, each with its own growing delay."""
        for kept in self._kept:
            if kept.service.running:
                if kept.delay_s > _FIRST_DELAY_S and monotonic() - kept.started_at > _SETTLED_S:
                    kept.delay_s = _FIRST_DELAY_S
            elif kept.due_at is None:
                kept.due_at = monotonic() + kept.delay_s
            elif monotonic() >= kept.due_at:
                self._restart(kept)

    def run_until(self, finished: Callable[[], bool]) -> None:
        """Supervise until `finished()`, or for good until a signal interrupts."""
        while not finished():
            self.supervise_once()
            time.sleep(0.1)

    def run_beside(self, work: Callable[[], T]) -> T:
        """The result of `work`, done in another thread while this one supervises."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            try:
                self.run_until(future.done)
            except BaseException:
                self.stop()  # lets a request that waits for the API end
                raise
            return future.result()

    def stop(self) -> None:
        """Ask the children, then end them; the servers come last."""
        children = [kept.service for kept in self._kept if isinstance(kept.service, Child)]
        for child in children:
            child.signal_stop()
        deadline = monotonic() + _STOP_S
        for child in children:
            child.stop(grace_s=max(0.0, deadline - monotonic()))
        for kept in reversed(self._kept):
            if not isinstance(kept.service, Child):
                kept.service.stop()
        self._kept.clear()
        self._release()

    def _prepare(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._take_lock()
        self.logs.mkdir(exist_ok=True)
        for log in self.logs.glob("*.log"):
            if log.stat().st_size > _MAX_LOG_BYTES:
                log.replace(log.with_suffix(".log.1"))
        self.key = self.settings.bootstrap_key or _stored_key(self.data_dir / "key")

    def _take_lock(self) -> None:
        handle = os.open(self.data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise Conflict(
                "another `bitmill up` runs on this folder",
                where=str(self.data_dir),
                hint="stop it first, or choose another --data-dir",
            ) from None
        self._lock = handle

    def _release(self) -> None:
        if self._lock is None:
            return  # the folder is another one's, and so is what lies in it
        (self.data_dir / "url").unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None

    def _environment(self) -> dict[str, str]:
        roots = self.settings.allowed_roots or default_roots()
        roots = (*roots, *(root.expanduser().absolute() for root in self.options.allowed_roots))
        return {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "BITMILL_DATABASE_URL": self.settings.database_url,
            "BITMILL_BROKER_URL": self.settings.broker_url,
            "BITMILL_STORE_URL": self.settings.store_url or (self.data_dir / "objects").as_uri(),
            "BITMILL_DATA_DIR": str(self.data_dir),
            "BITMILL_SCRATCH_DIR": str(self.settings.scratch_dir or self.data_dir / "scratch"),
            "BITMILL_ALLOWED_ROOTS": json.dumps([str(root) for root in roots]),
            "BITMILL_BOOTSTRAP_KEY": self.key,
        }

    def _start_servers(self, environment: dict[str, str]) -> None:
        if not self.settings.database_url:
            database = PostgresServer(self.data_dir / "postgres", durable=self.options.durable, log_dir=self.logs)
            self._add("postgres", database)
            environment["BITMILL_DATABASE_URL"] = database.url
        if not self.settings.broker_url:
            broker = ValkeyServer(self.data_dir / "valkey", log_dir=self.logs)
            self._add("valkey", broker)
            environment["BITMILL_BROKER_URL"] = broker.url

    def _migrate(self, environment: dict[str, str]) -> None:
        log = self.logs / "migrate.log"
        with log.open("ab") as output:
            done = subprocess.run(
                _python("migrations", "upgrade"),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0:
            raise StartFailed(f"the database could not be migrated\n{tail(log)}", where="migrate", hint=f"see {log}")

    def _choose_port(self) -> int:
        wanted = self.settings.port if self.options.port is None else self.options.port
        if wanted and _freed(wanted, self.options.host):
            return wanted
        if self.options.port:
            raise Conflict(
                f"port {wanted} is taken", where=self.options.host, hint="--port 0 takes any port that is free"
            )
        return free_ports(1, self.options.host)[0]

    def _add_child(self, name: str, command: list[str], environment: dict[str, str]) -> Child:
        child = Child(name, command, self.logs / f"{name}.log", environment=environment)
        self._add(name, child)
        return child

    def _add(self, name: str, service: Service) -> None:
        self._kept.append(_Kept(name, service))
        service.start()

    def _restart(self, kept: _Kept) -> None:
        print(f"bitmill: {kept.name} ended and is started again", file=sys.stderr)
        kept.started_at, kept.due_at = monotonic(), None
        kept.delay_s = min(2 * kept.delay_s, _LONGEST_DELAY_S)
        with contextlib.suppress(StartFailed):
            kept.service.start()

    def _ready(self) -> bool:
        import httpx

        try:
            return httpx.get(f"{self.url}/readyz", timeout=5.0, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False


@contextlib.contextmanager
def running_stack(options: StackOptions, settings: Settings) -> Iterator[Stack]:
    """A started stack that is stopped at the end. SIGTERM ends the block like Ctrl-C."""
    stack = Stack(options, settings)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        stack.start()
        yield stack
    finally:
        kept = [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)]
        stack.stop()
        signal.signal(signal.SIGINT, kept[0])
        signal.signal(signal.SIGTERM, previous)


def default_roots() -> tuple[Path, ...]:
    """Folders that `{path: ...}` sources may lie under when the user names none: home, here, temporary."""
    return (Path.home(), Path.cwd(), Path(tempfile.gettempdir()))


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stored_key(path: Path) -> str:
    """The key in the file, made on the first start; nobody else can read it at any moment."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().strip()
    key = "bm_" + secrets.token_urlsafe(32)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(key + "\n")
    return key


def _api_command(host: str, port: int) -> list[str]:
    options = ["--factory", "--host", host, "--port", str(port), "--log-level", "warning"]
    return _python("uvicorn", "api.main:create_app", *options, "--timeout-graceful-shutdown", "2")


def _python(module: str, *arguments: str) -> list[str]:
    """Run a module as installed: `-P` keeps the user's working folder from hiding it with one of the same name."""
    return [sys.executable, "-P", "-m", module, *arguments]


def _address(host: str) -> str:
    """How a client on this machine reaches what listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - read, not bound
    return f"[{host}]" if ":" in host else host


def _freed(port: int, host: str) -> bool:
    """Whether the port is free, given a moment: a predecessor that was killed may still be letting go of it."""
    for _ in range(10):
        if port_is_free(port, host):
            return True
        time.sleep(0.1)
    return False
