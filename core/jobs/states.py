"""Which states jobs, steps and attempts have, and the only ways from one to another.

A pure table: `move(JOB, "queued", "start")` is "running" or raises. The same states stand in SQL as CHECK constraints
(`core.jobs.tables`), and every UPDATE of a state names the states that it may leave. Nothing here knows of a database.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core.errors import Conflict


@dataclass(frozen=True)
class Machine:
    """States of one kind of row. `moves` maps (state, trigger) to the next state; what is absent is impossible."""

    name: str
    states: tuple[str, ...]
    terminal: frozenset[str]
    moves: Mapping[tuple[str, str], str]

    @property
    def triggers(self) -> frozenset[str]:
        return frozenset(trigger for _, trigger in self.moves)

    @property
    def live(self) -> tuple[str, ...]:
        """The states that are not terminal, in order."""
        return tuple(state for state in self.states if state not in self.terminal)

    def sources(self, trigger: str) -> tuple[str, ...]:
        """The states that `trigger` may leave, in order of `states`."""
        return tuple(state for state in self.states if (state, trigger) in self.moves)


JOB = Machine(
    "job",
    ("queued", "running", "cancelling", "succeeded", "failed", "cancelled", "expired"),
    frozenset({"succeeded", "failed", "cancelled", "expired"}),
    {
        ("queued", "start"): "running",
        ("running", "succeed"): "succeeded",
        ("running", "fail"): "failed",
        ("queued", "cancel"): "cancelling",
        ("running", "cancel"): "cancelling",
        ("cancelling", "cancelled"): "cancelled",
        ("queued", "expire"): "expired",
    },
)

STEP = Machine(
    "step",
    ("blocked", "ready", "running", "succeeded", "reused", "failed", "cancelled"),
    frozenset({"succeeded", "reused", "failed", "cancelled"}),
    {
        ("blocked", "unblock"): "ready",
        ("blocked", "reuse"): "reused",
        ("ready", "reuse"): "reused",
        ("ready", "claim"): "running",
        ("running", "succeed"): "succeeded",
        ("running", "fail"): "failed",
        ("running", "release"): "ready",
        ("blocked", "cancel"): "cancelled",
        ("ready", "cancel"): "cancelled",
        ("running", "cancel"): "cancelled",
    },
)

ATTEMPT = Machine(
    "attempt",
    ("running", "succeeded", "failed", "cancelled", "lost", "interrupted"),
    frozenset({"succeeded", "failed", "cancelled", "lost", "interrupted"}),
    {
        ("running", "succeed"): "succeeded",
        ("running", "fail"): "failed",
        ("running", "cancel"): "cancelled",
        ("running", "lose"): "lost",
        ("running", "interrupt"): "interrupted",
    },
)

DONE_STEPS = ("succeeded", "reused")
MACHINES = (JOB, STEP, ATTEMPT)


def move(machine: Machine, state: str, trigger: str) -> str:
    """The state that follows; Conflict when `trigger` is not possible in `state`."""
    try:
        return machine.moves[state, trigger]
    except KeyError:
        raise Conflict(f"a {state} {machine.name} cannot {trigger}") from None
