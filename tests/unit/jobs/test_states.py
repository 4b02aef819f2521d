"""The whole table of states: every state with every trigger, and nothing that is not written here."""

from __future__ import annotations

import itertools

import pytest

from core.errors import Conflict
from core.jobs.states import ATTEMPT, JOB, MACHINES, STEP, Machine, move

POSSIBLE = {
    ("job", "queued", "start", "running"),
    ("job", "queued", "cancel", "cancelling"),
    ("job", "queued", "expire", "expired"),
    ("job", "running", "succeed", "succeeded"),
    ("job", "running", "fail", "failed"),
    ("job", "running", "cancel", "cancelling"),
    ("job", "cancelling", "cancelled", "cancelled"),
    ("step", "blocked", "unblock", "ready"),
    ("step", "blocked", "reuse", "reused"),
    ("step", "blocked", "cancel", "cancelled"),
    ("step", "ready", "reuse", "reused"),
    ("step", "ready", "claim", "running"),
    ("step", "ready", "cancel", "cancelled"),
    ("step", "running", "succeed", "succeeded"),
    ("step", "running", "fail", "failed"),
    ("step", "running", "release", "ready"),
    ("step", "running", "cancel", "cancelled"),
    ("attempt", "running", "succeed", "succeeded"),
    ("attempt", "running", "fail", "failed"),
    ("attempt", "running", "cancel", "cancelled"),
    ("attempt", "running", "lose", "lost"),
    ("attempt", "running", "interrupt", "interrupted"),
}
MATRIX = [
    (machine, state, trigger)
    for machine in MACHINES
    for state, trigger in itertools.product(machine.states, sorted(machine.triggers))
]


@pytest.mark.parametrize(("machine", "state", "trigger"), MATRIX, ids=lambda part: getattr(part, "name", part))
def test_every_state_and_trigger(machine: Machine, state: str, trigger: str) -> None:
    expected = {
        after for name, before, what, after in POSSIBLE if (name, before, what) == (machine.name, state, trigger)
    }
    if expected:
        assert {move(machine, state, trigger)} == expected
    else:
        with pytest.raises(Conflict, match=f"a {state} {machine.name} cannot {trigger}"):
            move(machine, state, trigger)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_terminal_states_are_those_without_a_way_out_and_all_are_reached(machine: Machine) -> None:
    leaving = {state for state, _ in machine.moves}
    assert machine.terminal == set(machine.states) - leaving
    reached = {machine.states[0], *machine.moves.values()}
    assert reached == set(machine.states)


def test_states_that_are_not_terminal_and_sources_of_a_trigger_are_told_in_order() -> None:
    assert JOB.live == ("queued", "running", "cancelling")
    assert STEP.sources("cancel") == ("blocked", "ready", "running")
    assert ATTEMPT.live == ("running",)
