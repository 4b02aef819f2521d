"""The supervisor's handle on its engine: start, talk, ask to stop, kill, and say how it ended. Never imports torch."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from core.clock import monotonic
from core.errors import EngineDied
from worker.protocol import Done, Execute, Failed, Log, Message, Progress, Pulse, Ready, Stop, parse_answer

ENGINE_COMMAND = (sys.executable, "-m", "worker.engine")
_CGROUP_EVENTS = Path("/sys/fs/cgroup/memory.events")
_READ = 1 << 16


class EngineProcess:
    """One engine from its start to its end. Not thread-safe but for `kill`.

    The kernel ends the engine when the *thread* that called the constructor ends: call it from a lasting one.
    """

    def __init__(self, command: Sequence[str] = ENGINE_COMMAND, environment: Mapping[str, str] | None = None) -> None:
        engine_reads, self._commands = os.pipe()
        self._answers, engine_writes = os.pipe()
        self._oom_kills = _oom_kills()
        try:
            self.process = subprocess.Popen(
                [*command, str(os.getpid()), str(engine_reads), str(engine_writes)],
                stdin=subprocess.DEVNULL,
                env=None if environment is None else dict(environment),
                pass_fds=(engine_reads, engine_writes),
                start_new_session=True,
            )
        finally:
            os.close(engine_reads)
            os.close(engine_writes)
        self._buffer = bytearray()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._answers, selectors.EVENT_READ)
        self.heard_at = monotonic()
        self.device: str | None = None
        self.checkpoint: str | None = None  # whose step it did last
        self.steps = 0
        self._killed = False

    @property
    def alive(self) -> bool:
        return not self._killed and self.process.poll() is None

    def execute(self, message: Execute) -> None:
        """Give it a step; EngineDied when it is gone."""
        self.heard_at = monotonic()
        self.steps += 1
        self._say(message)

    def ask_to_stop(self) -> None:
        with contextlib.suppress(EngineDied):
            self._say(Stop())

    def answers(self, timeout_s: float) -> list[Ready | Pulse | Progress | Log | Done | Failed]:
        """What it has said, waiting at most that long. EngineDied when its pipe is closed or it talks nonsense."""
        if not self._selector.select(timeout_s):
            return []
        data = os.read(self._answers, _READ)
        if not data:
            raise self._death()
        self.heard_at = monotonic()
        self._buffer += data
        *lines, rest = bytes(self._buffer).split(b"\n") if b"\n" in data else [bytes(self._buffer)]
        self._buffer = bytearray(rest)
        try:
            found = [parse_answer(line) for line in lines]
        except ValidationError as error:
            self.kill()
            raise EngineDied(f"the engine said what is not in the protocol: {error}"[:300]) from error
        for ready in found:
            if isinstance(ready, Ready):
                self.device = ready.device
        return found

    def kill(self) -> None:
        """End it and whatever it started. Any thread may call this, more than once."""
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End it and let go of everything."""
        self.kill()
        self.process.wait()
        self._selector.close()
        for descriptor in (self._commands, self._answers):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _say(self, message: Message) -> None:
        data = memoryview(message.line())
        try:
            while data:
                data = data[os.write(self._commands, data) :]
        except OSError as error:
            raise self._death() from error

    def _death(self) -> EngineDied:
        """How it ended, in words."""
        self.kill()
        status = self.process.wait()
        if status >= 0:
            return EngineDied(f"the engine ended with status {status}", hint="the worker's log has its last words")
        name = signal.Signals(-status).name
        if _oom_kills() > self._oom_kills:
            return EngineDied(
                f"the engine was killed ({name}): the host ran out of memory", hint="use a larger machine"
            )
        return EngineDied(f"the engine was killed ({name})")


def _oom_kills() -> int:
    """How often the kernel has killed in this container for want of memory; 0 where that is not told."""
    try:
        lines = _CGROUP_EVENTS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
