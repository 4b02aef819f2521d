"""Towards a KL target: the fewest bits per parameter at which the measured KL is within it.

Measured is what a caller measures; nothing here knows models. The search is a secant on log2 KL against bits, which is
nearly a line of slope -2 (KL ~ 4^-b; fisher-and-allocation, section 7.4), kept inside what earlier rounds have shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_AIM = 0.97
_GOOD_ENOUGH = 0.93
_SLOPE = -2.0
_SLOPES = (-6.0, -0.5)
_LEAST_KL = 1e-30
_NUDGE = 0.1


@dataclass(frozen=True)
class Round:
    """One measurement: stored bits per parameter and KL in nats per token."""

    bits: float
    kl: float


def search(
    target: float,
    measure: Callable[[float], Round],
    *,
    start: float,
    least: float,
    most: float,
    rounds: int,
    emergency_rounds: int = 4,
) -> list[Round]:
    """The rounds in the order in which they were done. `measure(bits)` answers for a budget of that many bits.

    It stops when a KL lies just below the target, when a budget gives a round that is known already, or after `rounds`;
    if none is within the target by then, after `emergency_rounds` more, the last of them at `most`. Budgets are between
    `least` and `most`.
    """
    done: list[Round] = []
    wanted = start
    for number in range(rounds + emergency_rounds):
        if number >= rounds and best(done, target):
            break
        last_resort = number == rounds + emergency_rounds - 1
        found = measure(most if last_resort else min(max(wanted, least), most))
        if found in done and best(done, target):
            break
        if found in done:
            wanted += _NUDGE
            continue
        done.append(found)
        if _GOOD_ENOUGH * target <= found.kl <= target or (found.kl > target and wanted >= most):
            break
        wanted = _next(done, target)
    return done


def best(done: Sequence[Round], target: float) -> Round | None:
    """The round with the fewest bits whose KL is within the target; None if there is none."""
    return min((one for one in done if one.kl <= target), key=lambda one: (one.bits, one.kl), default=None)


def _next(done: Sequence[Round], target: float) -> float:
    """Bits at which the line through the last two rounds meets the target; bisects where it leaves the bracket."""
    last = done[-1]
    guess = last.bits + (_log2(_AIM * target) - _log2(last.kl)) / _slope(done)
    too_few = max((one.bits for one in done if one.kl > target), default=-math.inf)
    enough = min((one.bits for one in done if one.kl <= target), default=math.inf)
    if too_few < guess < enough:
        return guess
    return (too_few + enough) / 2 if math.isfinite(too_few + enough) else guess


def _slope(done: Sequence[Round]) -> float:
    if len(done) < 2 or done[-1].bits == done[-2].bits:
        return _SLOPE
    rise = (_log2(done[-1].kl) - _log2(done[-2].kl)) / (done[-1].bits - done[-2].bits)
    return min(max(rise, _SLOPES[0]), _SLOPES[1])


def _log2(value: float) -> float:
    return math.log2(max(value, _LEAST_KL))
