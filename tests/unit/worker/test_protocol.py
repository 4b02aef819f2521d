"""The lines between supervisor and engine, frozen: both ends may be of different ages during an upgrade."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from core.jobs.steps import StepRequest
from worker.protocol import (
    Done,
    Execute,
    Failed,
    Log,
    Message,
    Progress,
    Pulse,
    Ready,
    Stop,
    parse_answer,
    parse_command,
)

COMMANDS: list[tuple[Message, bytes]] = [
    (
        Execute(request=StepRequest(kind="fetch", input_hash="ab"), scratch="/s"),
        (
            b'{"type":"execute","request":{"kind":"fetch","index":0,"count":1,"input_hash":"ab","params":{},"inputs":[],'
            b'"seed":0},"scratch":"/s"}\n'
        ),
    ),
    (Stop(), b'{"type":"stop"}\n'),
]
ANSWERS: list[tuple[Message, bytes]] = [
    (Ready(device="cpu"), b'{"type":"ready","device":"cpu"}\n'),
    (Pulse(), b'{"type":"pulse"}\n'),
    (Progress(fraction=0.5, message="wq"), b'{"type":"progress","fraction":0.5,"message":"wq"}\n'),
    (Log(event="step.begin", fields={"n": 1}), b'{"type":"log","event":"step.begin","fields":{"n":1}}\n'),
    (Done(output={"files": {}}), b'{"type":"done","output":{"files":{}}}\n'),
    (Failed(error={"code": "engine_died"}), b'{"type":"failed","error":{"code":"engine_died"}}\n'),
]


@pytest.mark.parametrize(("message", "line"), COMMANDS, ids=lambda part: getattr(part, "type", ""))
def test_commands_keep_their_form(message: Message, line: bytes) -> None:
    assert message.line() == line
    assert parse_command(line) == message


@pytest.mark.parametrize(("message", "line"), ANSWERS, ids=lambda part: getattr(part, "type", ""))
def test_answers_keep_their_form(message: Message, line: bytes) -> None:
    assert message.line() == line
    assert parse_answer(line) == message


@pytest.mark.parametrize("line", [b"", b"{}", b'{"type":"dance"}', b"hello", b'{"type":"done"}'])
def test_other_lines_are_refused(line: bytes) -> None:
    with pytest.raises(ValidationError):
        parse_answer(line)
