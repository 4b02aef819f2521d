"""An engine without torch, for tests of the queue: real pipes, a real process, pretended steps.

`pretended_engine.py FOLDER PARENT COMMANDS ANSWERS`. A file `FOLDER/KIND` (or `KIND.INDEX`) says what a step does
first, and is removed when the step begins, so it happens once: `sleep S` (checking whether to stop), `deaf S` (never
checking), `exit N`, `fail CODE`, `print`, `nonsense`. Otherwise a step tells its progress and answers at once. With
`FOLDER/log` every step that begins is noted there.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from core.config import Settings
from core.errors import BitmillError
from core.jobs.steps import StepRequest
from core.storage.object_store import ObjectStore, open_store
from worker.engine import Conversation, open_conversation, serve
from worker.protocol import Execute, Log


def main(folder: Path, arguments: list[str]) -> None:
    conversation = open_conversation(arguments)
    store = open_store(Settings())

    def run(command: Execute, conversation: Conversation) -> dict[str, Any]:
        return step(command.request, conversation, store, folder)

    serve(conversation, "cpu", run)


def step(request: StepRequest, conversation: Conversation, store: ObjectStore, folder: Path) -> dict[str, Any]:
    with (folder / "log").open("a") as log:
        log.write(f"{os.getpid()} {request.kind} {request.index}\n")
    conversation.say(Log(event="step.begin", fields={"kind": request.kind}))
    conversation.progress(0.5, f"half of {request.kind}")
    for name in (f"{request.kind}.{request.index}", request.kind):
        told = folder / name
        if told.exists():
            words = told.read_text().split()
            told.unlink()
            misbehave(words, conversation)
    return answer(request, store)


def misbehave(words: list[str], conversation: Conversation) -> None:
    match words:
        case ["sleep", seconds]:
            ends = time.monotonic() + float(seconds)
            while time.monotonic() < ends:
                conversation.check()
                time.sleep(0.02)
        case ["deaf", seconds]:
            time.sleep(float(seconds))
        case ["exit", status]:
            os._exit(int(status))
        case ["fail", code]:
            raise BitmillError.from_dict({"code": code, "detail": "as told", "where": "here"})
        case ["print"]:
            sys.stdout.write("a library says hello\n")
            sys.stdout.flush()
        case ["nonsense"]:
            conversation._out.write(b"not a message\n")
            conversation._out.flush()
            time.sleep(30)


def answer(request: StepRequest, store: ObjectStore) -> dict[str, Any]:
    """The same bytes for the same request, whoever does it and how often."""
    data = f"{request.kind} {request.input_hash}".encode()
    digest = hashlib.sha256(data).hexdigest()
    key = f"steps/{request.input_hash}/{digest[:16]}-{request.kind}.bin"
    store.put_bytes(key, data)
    file = {"key": key, "sha256": digest, "size": len(data)}
    entry = {"path": "model.safetensors", **file}
    row = {"name": f"w{request.index}", "shape": [2, 3], "format": "int4@128", "bits": 4.25}
    values = {
        "fetch": {"checkpoint_sha": "c" * 64, "files": [entry]},
        "calibrate": {"positions": 128},
        "allocate": {"predicted_kl": 0.125},
        "quantise": {"tensors": [row]},
        "assemble": {"bits_per_param": 3.99, "size_bytes": 1000},
        "evaluate": {"metrics": {"kl_mean": 0.1}},
        "export": {"export": "bitmill", "artefacts": [entry], "summary": {}, "gate": {"ok": True}},
    }[request.kind]
    return {"files": {f"{request.kind}.bin": file}, "values": values}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
