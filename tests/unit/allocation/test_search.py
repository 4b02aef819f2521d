"""The search towards a KL target, on curves instead of models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.allocation.search import Round, best, search


def curve(scale: float, slope: float, *, step: float = 0.001, calls: list[float] | None = None) -> Callable[..., Round]:
    """KL = scale * 2^(slope * bits), of which only multiples of `step` bits can be stored."""

    def measure(bits: float) -> Round:
        if calls is not None:
            calls.append(bits)
        stored = step * int(bits / step + 1e-9)
        return Round(stored, scale * 2 ** (slope * stored))

    return measure


def test_a_curve_that_follows_the_theory_takes_two_rounds() -> None:
    rounds = search(0.05, curve(9.0, -2), start=3.0, least=2, most=8, rounds=4)
    assert len(rounds) == 2
    found = best(rounds, 0.05)
    assert found is not None
    assert 0.93 * 0.05 <= found.kl <= 0.05


@given(st.floats(1e-4, 0.5), st.floats(1, 20), st.floats(-3, -1.2), st.floats(2, 8))
def test_every_target_that_can_be_met_is_met_with_little_to_spare(
    target: float, scale: float, slope: float, start: float
) -> None:
    measure = curve(scale, slope)
    rounds = search(target, measure, start=start, least=2, most=8, rounds=4)
    found = best(rounds, target)
    if measure(8).kl > target:
        assert found is None
        return
    assert found is not None
    assert found.bits == 2 or found.kl > target / 2
    assert len(rounds) <= 8


def test_a_budget_that_gives_what_is_known_ends_the_search() -> None:
    calls: list[float] = []
    rounds = search(0.05, curve(9.0, -2, step=1, calls=calls), start=4.0, least=2, most=8, rounds=4)
    assert best(rounds, 0.05) == Round(4, 9.0 * 2**-8)
    assert len(calls) <= 4


def test_a_loose_target_gets_the_smallest_size() -> None:
    rounds = search(100.0, curve(9.0, -2), start=3.0, least=2, most=8, rounds=4)
    assert best(rounds, 100.0) == Round(2, 9.0 * 2**-4)


def test_a_target_out_of_reach_has_been_tried_with_all_the_bits_there_are() -> None:
    rounds = search(1e-9, curve(9.0, -2), start=3.0, least=2, most=8, rounds=4)
    assert best(rounds, 1e-9) is None
    assert max(one.bits for one in rounds) == pytest.approx(8)


def test_a_kl_of_exactly_zero_is_within_every_target() -> None:
    rounds = search(1e-3, lambda bits: Round(bits, 0.0), start=6.0, least=2, most=8, rounds=3)
    assert best(rounds, 1e-3) is not None
