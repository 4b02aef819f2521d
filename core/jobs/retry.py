"""What follows a failed attempt: a pure table from failure class and history to a decision.

Promise: a step is never tried more than `max_attempts` times at its own expense, so no failure can loop for ever; what
the user or the numbers caused is never tried again; being asked to stop costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import ErrorClass

_BACKOFF_S = 5.0
_LONGEST_BACKOFF_S = 300.0


@dataclass(frozen=True)
class Decision:
    """`retry`: the step becomes ready again, not before `delay_s`. `charged`: the attempt counts against the limit."""

    retry: bool
    charged: bool
    delay_s: float = 0.0


@dataclass(frozen=True)
class History:
    """Charged attempts of a step that have ended, this one not counted: of every class, and of this failure's class."""

    charged: int
    same_class: int


def decide(kind: ErrorClass, history: History, max_attempts: int) -> Decision:
    """What to do after a failure of that class.

    | class       | tried again                               | charged |
    |-------------|-------------------------------------------|---------|
    | user        | never                                     | yes     |
    | numerical   | never                                     | yes     |
    | capacity    | once                                      | yes     |
    | internal    | once                                      | yes     |
    | transient   | up to max_attempts, after a doubling wait | yes     |
    | lost        | up to max_attempts, at once               | yes     |
    | interrupted | always, at once                           | no      |
    """
    if kind is ErrorClass.INTERRUPTED:
        return Decision(retry=True, charged=False)
    allowed = {
        ErrorClass.USER: False,
        ErrorClass.NUMERICAL: False,
        ErrorClass.CAPACITY: history.same_class < 1,
        ErrorClass.INTERNAL: history.same_class < 1,
        ErrorClass.TRANSIENT: True,
        ErrorClass.LOST: True,
    }[kind]
    retry = allowed and history.charged + 1 < max_attempts
    delay = backoff(history.same_class) if kind in (ErrorClass.TRANSIENT, ErrorClass.CAPACITY) else 0.0
    return Decision(retry=retry, charged=True, delay_s=delay if retry else 0.0)


def backoff(earlier: int) -> float:
    """Seconds to wait after `earlier` failures of the same kind: 5, 10, 20, ... up to five minutes."""
    return float(min(_LONGEST_BACKOFF_S, _BACKOFF_S * 2 ** min(earlier, 10)))
