"""An engine that does its steps and, once, what it is told before or after one: `told_engine.py FOLDER MODE ...`.

MODE `real`: the product's pipeline; `pretended`: steps without torch. The first line of `FOLDER/told.KIND` (or
`told.KIND.INDEX`) is taken by the next attempt of that step: `before` or `after` (what it publishes is then in the
store, and nobody knows yet), then `hold` (until `FOLDER/go` exists, deaf to everything), `listen` (until asked to
stop), `fail CODE`, `memory` (out of memory) or `exit STATUS`. Who waits notes its process id in `FOLDER/held`; every
step that begins is noted in `FOLDER/log`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from core.config import Settings
from core.errors import BitmillError
from core.jobs.steps import StepRequest
from core.storage.object_store import open_store
from tests.service.pretended_engine import answer
from worker.engine import Conversation, RunStep, open_conversation, pipeline, serve
from worker.protocol import Execute

_LONGEST_S = 120.0


def main(folder: Path, mode: str, arguments: list[str]) -> None:
    conversation = open_conversation(arguments)
    settings = Settings()
    do = pipeline(settings, "cpu") if mode == "real" else pretended(settings)

    def run(command: Execute, conversation: Conversation) -> dict[str, Any]:
        request = command.request
        with (folder / "log").open("a") as log:
            log.write(f"{os.getpid()} {request.kind} {request.index}\n")
        when, words = told(folder, request)
        if when == "before":
            obey(words, folder, conversation)
        output = do(command, conversation)
        if when == "after":
            obey(words, folder, conversation)
        return output

    serve(conversation, "cpu", run)


def pretended(settings: Settings) -> RunStep:
    store = open_store(settings)
    return lambda command, _conversation: answer(command.request, store)


def told(folder: Path, request: StepRequest) -> tuple[str, list[str]]:
    """The next thing that this step is told."""
    for name in (f"told.{request.kind}.{request.index}", f"told.{request.kind}"):
        path = folder / name
        lines = path.read_text().splitlines() if path.exists() else []
        if lines:
            path.write_text("\n".join(lines[1:]))
            when, *words = lines[0].split()
            return when, words
    return "", []


def obey(words: list[str], folder: Path, conversation: Conversation) -> None:
    match words:
        case ["hold"]:
            wait(folder, lambda: None)
        case ["listen"]:
            wait(folder, conversation.check)
        case ["fail", code]:
            raise BitmillError.from_dict({"code": code, "detail": "as told", "where": "here"})
        case ["memory"]:
            raise MemoryError("as told")
        case ["exit", status]:
            os._exit(int(status))


def wait(folder: Path, check: Any) -> None:
    (folder / "held").write_text(str(os.getpid()))
    ends = time.monotonic() + _LONGEST_S
    while time.monotonic() < ends and not (folder / "go").exists():
        check()
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
