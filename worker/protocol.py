"""What supervisor and engine say to each other: one JSON object per line, on two pipes of their own.

Two processes, so that whatever happens to the device (out of memory, a segfault, a hang) ends the engine and not the
worker. The engine's stdout is not part of it: libraries may print what they like. Messages are frozen by a test; either
side ends the conversation by closing its pipe, which the other takes as its end too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from core.jobs.steps import StepRequest


class Message(BaseModel):
    """One line."""

    model_config = ConfigDict(frozen=True)

    def line(self) -> bytes:
        return self.model_dump_json().encode() + b"\n"


class Execute(Message):
    """Supervisor: do this step. `scratch` is an empty folder for it."""

    type: Literal["execute"] = "execute"
    request: StepRequest
    scratch: str


class Stop(Message):
    """Supervisor: end the step at the next tensor; answer with an `interrupted` failure."""

    type: Literal["stop"] = "stop"


class Ready(Message):
    """Engine: the libraries are loaded and the device is known."""

    type: Literal["ready"] = "ready"
    device: str


class Pulse(Message):
    """Engine: it lives. Sent every few seconds, also while a tensor takes long."""

    type: Literal["pulse"] = "pulse"


class Progress(Message):
    """Engine: so far is the step, 0..1."""

    type: Literal["progress"] = "progress"
    fraction: float
    message: str = ""


class Log(Message):
    """Engine: a line for the attempt's log."""

    type: Literal["log"] = "log"
    event: str
    fields: dict[str, Any] = Field(default_factory=dict)


class Done(Message):
    """Engine: the step's output."""

    type: Literal["done"] = "done"
    output: dict[str, Any]


class Failed(Message):
    """Engine: `BitmillError.to_dict()` of why it cannot be done."""

    type: Literal["failed"] = "failed"
    error: dict[str, Any]


Command = Annotated[Execute | Stop, Field(discriminator="type")]
Answer = Annotated[Ready | Pulse | Progress | Log | Done | Failed, Field(discriminator="type")]
_COMMANDS: TypeAdapter[Execute | Stop] = TypeAdapter(Command)
_ANSWERS: TypeAdapter[Ready | Pulse | Progress | Log | Done | Failed] = TypeAdapter(Answer)


def parse_command(line: bytes) -> Execute | Stop:
    """pydantic's ValidationError when it is not one."""
    return _COMMANDS.validate_json(line)


def parse_answer(line: bytes) -> Ready | Pulse | Progress | Log | Done | Failed:
    """pydantic's ValidationError when it is not one."""
    return _ANSWERS.validate_json(line)
