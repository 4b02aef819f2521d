"""`python -m worker.engine`: the process that owns the device. The only one that imports torch.

It reads commands from one pipe and writes answers to another (`worker.protocol`; the descriptors are its arguments),
does one step at a time and stays for the next. It dies with its supervisor: the kernel sends SIGKILL when the thread
that started it ends, and the end of the command pipe ends it too. It knows no database and no broker.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from core.clock import monotonic
from core.config import Settings
from core.errors import BitmillError, Interrupted
from core.storage.object_store import open_store
from worker.protocol import Done, Execute, Failed, Log, Message, Progress, Pulse, Ready, parse_command

_PR_SET_PDEATHSIG = 1
_PULSE_S = 5.0
_PROGRESS_EVERY_S = 0.2
_ORPHANED = 70

RunStep = Callable[[Execute, "Conversation"], dict[str, Any]]


class Conversation:
    """The engine's end of the pipes. `commands` are steps to do; `stop` is set when the step in hand shall end."""

    def __init__(self, commands: BinaryIO, answers: BinaryIO) -> None:
        self._in, self._out = commands, answers
        self._lock = threading.Lock()
        self._told_at = 0.0
        self.commands: queue.SimpleQueue[Execute] = queue.SimpleQueue()
        self.stop = threading.Event()

    def start(self) -> None:
        """Listen and pulse in the background."""
        threading.Thread(target=self._listen, name="commands", daemon=True).start()
        threading.Thread(target=self._pulse, name="pulse", daemon=True).start()

    def say(self, message: Message) -> None:
        with self._lock:
            try:
                self._out.write(message.line())
                self._out.flush()
            except OSError:
                os._exit(_ORPHANED)

    def progress(self, fraction: float, what: str) -> None:
        """Tell how far the step is, a few times a second at most."""
        if monotonic() - self._told_at >= _PROGRESS_EVERY_S:
            self._told_at = monotonic()
            self.say(Progress(fraction=min(max(fraction, 0.0), 1.0), message=what))

    def check(self) -> None:
        """Interrupted once the supervisor has asked to stop."""
        if self.stop.is_set():
            raise Interrupted("the worker was asked to stop")

    def _listen(self) -> None:
        for line in self._in:
            command = parse_command(line)
            if isinstance(command, Execute):
                self.commands.put(command)
            else:
                self.stop.set()
        os._exit(_ORPHANED)  # nobody is there to hear the result

    def _pulse(self) -> None:
        while True:
            self.say(Pulse())
            threading.Event().wait(_PULSE_S)


def serve(conversation: Conversation, device: str, run: RunStep) -> None:
    """Do steps for ever."""
    conversation.say(Ready(device=device))
    while True:
        command = conversation.commands.get()
        conversation.say(answer(command, conversation, run))


def answer(command: Execute, conversation: Conversation, run: RunStep) -> Message:
    """The step's result; whatever is raised becomes a named failure."""
    try:
        conversation.check()
        return Done(output=run(command, conversation))
    except BitmillError as error:
        return Failed(error=error.to_dict())
    except MemoryError as error:
        return Failed(error=_out_of_memory(error))
    except Exception as error:  # noqa: BLE001 - a defect of ours, told to whoever has to decide what follows
        conversation.say(Log(event="step.traceback", fields={"traceback": traceback.format_exc()[-8000:]}))
        return Failed(error=BitmillError(f"{type(error).__name__}: {error}"[:1000]).to_dict())


def _out_of_memory(error: MemoryError) -> dict[str, Any]:
    from core.errors import OutOfMemory

    return OutOfMemory(f"the host has too little memory: {error}"[:500]).to_dict()


def pipeline(settings: Settings, device: str) -> RunStep:
    """The product's own steps."""
    from core.pipeline.context import StepContext
    from core.pipeline.steps import run_step

    store = open_store(settings)

    def run(command: Execute, conversation: Conversation) -> dict[str, Any]:
        context = StepContext(
            store=store,
            scratch=Path(command.scratch),
            device=device,
            threads=settings.threads,
            progress=conversation.progress,
            log=lambda event, fields: conversation.say(Log(event=event, fields=fields)),
            check=conversation.check,
            allowed_roots=settings.allowed_roots,
            settings=settings,
        )
        return run_step(command.request.kind, command.request, context)

    return run


def open_conversation(arguments: list[str]) -> Conversation:
    """Take the pipes over and give stdout away, so that a library that prints does no harm.

    `arguments`: the supervisor's process id, then the descriptors of commands and answers.
    """
    parent, commands, answers = (int(argument) for argument in arguments)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(_ORPHANED)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)
    conversation = Conversation(os.fdopen(commands, "rb"), os.fdopen(answers, "wb"))
    conversation.start()  # before anything slow is imported
    return conversation


def main(arguments: list[str]) -> None:
    conversation = open_conversation(arguments)
    settings = Settings()
    from core.pipeline.forward import resolve_device

    device = resolve_device(settings.device)
    serve(conversation, device, pipeline(settings, device))


if __name__ == "__main__":
    main(sys.argv[1:])
