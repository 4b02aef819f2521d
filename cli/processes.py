"""Child processes that never outlive this one: what the launchers of servers and the embedded stack are made of.

A `Child` writes its output to a log file, runs in a session of its own (so that Ctrl-C reaches only its parent, which
stops its children in order) and is ended by the kernel when the thread that started it ends, however that happens.
Therefore start children from the main thread. Nothing here knows what the programs do.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cli import launch
from core.errors import BitmillError

_LONGEST_SOCKET_PATH = 100
_PORTS = range(20_000, 32_000)  # below the kernel's ephemeral range, so that no outgoing connection takes one


class StartFailed(BitmillError):
    """A server or process of the embedded stack did not come up; the log is named in the hint."""

    code = "start_failed"


@dataclass
class Child:
    """One program: how to start it, how to stop it, and the process while it runs."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] | None = None
    cwd: Path | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    death_signal: signal.Signals = signal.SIGKILL
    identity: str = "same"
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        launcher = [sys.executable, "-I", launch.__file__, str(os.getpid()), str(int(self.death_signal)), self.identity]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*launcher, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environment) if self.environment is not None else None,
                cwd=self.cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal_stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(self.stop_signal)

    def stop(self, grace_s: float = 5.0) -> None:
        """Ask, wait at most `grace_s`, then kill the whole session; returns when the process is gone."""
        if self.process is None:
            return
        self.signal_stop()
        try:
            self.process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Return when `ready()`; StartFailed with the log's last lines when the process ends or time is up."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if not self.running:
                raise self.failure("ended while starting")
            if time.monotonic() > deadline:
                raise self.failure(f"was not ready after {timeout_s:.0f} s")
            time.sleep(0.03)

    def failure(self, what: str) -> StartFailed:
        return StartFailed(f"{self.name} {what}\n{tail(self.log)}", where=self.name, hint=f"see {self.log}")


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log, for an error message."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def short_folder(folder: Path, longest_name: str) -> Path:
    """`folder`, or a link to it in the temporary folder when a unix socket of that name in it would be too long.

    The kernel takes 107 bytes for a socket's path. Servers bind theirs relative to their own folder; only clients need
    this. The link has the same name every time, so a second start on the folder finds it again.
    """
    if len(os.fsencode(folder / longest_name)) <= _LONGEST_SOCKET_PATH:
        return folder
    link = _short_link(folder)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(folder)
    if link.lstat().st_uid != os.geteuid() or link.readlink() != folder:
        raise StartFailed("the folder's path is too long for a socket", where=str(folder), hint="choose a shorter one")
    return link


def remove_short_folder(folder: Path) -> None:
    """Remove the link that `short_folder` made, if it did."""
    link = _short_link(folder)
    if link.is_symlink() and link.lstat().st_uid == os.geteuid():
        link.unlink(missing_ok=True)


def _short_link(folder: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return Path("/tmp") / f"bitmill-{os.geteuid()}-{digest}"  # noqa: S108 - whoever uses it checks its owner


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """`count` different TCP ports that nothing listens on, none of which the kernel gives to outgoing connections."""
    chosen: list[int] = []
    candidates = random.SystemRandom()
    while len(chosen) < count:
        port = candidates.choice(_PORTS)
        if port not in chosen and port_is_free(port, host):
            chosen.append(port)
    return chosen


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
