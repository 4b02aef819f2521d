"""The solver: widths as real numbers and as choices from lists, against golden numbers and exhaustive search."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.allocation.budget import Option, bounded_widths, choose, hull_start
from core.errors import InfeasibleTarget

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[2] / "golden" / "allocation.json").read_text())
N: list[int] = GOLDEN["input"]["N"]
GAINS = [
    math.log2(sigma) + math.log2(fisher) / 2
    for sigma, fisher in zip(GOLDEN["input"]["sigma"], GOLDEN["input"]["fbar"], strict=True)
]
BUDGET = GOLDEN["input"]["target"] * sum(N)
Groups = Mapping[str, Sequence[Option]]

# Losses that are multiples of 2^-20 add up without rounding, so equality of sums is equality of numbers.
LOSSES = st.integers(0, 1 << 20).map(lambda count: count / (1 << 20))
OPTIONS = st.lists(st.tuples(st.integers(0, 40), LOSSES), min_size=1, max_size=5)


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, list[Option]], int]:
    """Up to six small groups and a budget that can be met."""
    rows = draw(st.lists(OPTIONS, min_size=1, max_size=6))
    groups = {
        f"g{at}": [Option(cost, loss, f"o{number}") for number, (cost, loss) in enumerate(row)]
        for at, row in enumerate(rows)
    }
    least = sum(min(one.cost for one in row) for row in groups.values())
    most = sum(max(one.cost for one in row) for row in groups.values())
    return groups, draw(st.integers(least, most + 3))


def loss(choice: Mapping[str, Option]) -> float:
    return math.fsum(one.loss for one in choice.values())


def cost(choice: Mapping[str, Option]) -> int:
    return sum(one.cost for one in choice.values())


def exhaustive(groups: Groups, budget: int) -> float:
    return min(
        math.fsum(one.loss for one in picks)
        for picks in itertools.product(*groups.values())
        if sum(one.cost for one in picks) <= budget
    )


def distortion(widths: Sequence[float]) -> float:
    return sum(0.5 * n * 4 ** (gain - bits) for n, gain, bits in zip(N, GAINS, widths, strict=True))


def worked_example(widths: Sequence[float]) -> dict[str, list[Option]]:
    """The golden example with costs in half bits."""
    return {
        f"t{at}": [Option(round(2 * n * bits), 0.5 * n * 4 ** (gain - bits), f"{bits:g}") for bits in widths]
        for at, (n, gain) in enumerate(zip(N, GAINS, strict=True))
    }


@pytest.mark.parametrize(
    ("case", "low", "high"), [("unclamped", -99, 99), ("clamped_lo3", 3, 99), ("clamped_lo2_hi6", 2, 6)]
)
def test_the_continuous_solution_is_the_golden_one(case: str, low: float, high: float) -> None:
    widths = bounded_widths(GAINS, N, [low] * 3, [high] * 3, BUDGET)
    assert widths == pytest.approx(GOLDEN[case]["bits"], abs=1e-5)
    assert distortion(widths) == pytest.approx(GOLDEN[case]["D"], abs=1e-5)
    assert sum(n * bits for n, bits in zip(N, widths, strict=True)) == pytest.approx(BUDGET, abs=1e-9)


@pytest.mark.parametrize(
    ("case", "widths"),
    [("integer_optimum", list(range(2, 9))), ("half_bit_optimum", [bits / 2 for bits in range(4, 17)])],
)
def test_the_discrete_optimum_is_the_golden_one(case: str, widths: list[float]) -> None:
    chosen = choose(worked_example(widths), 2 * BUDGET)
    assert [float(one.label) for one in chosen.values()] == GOLDEN[case]["bits"]
    assert loss(chosen) == pytest.approx(GOLDEN[case]["D"], abs=1e-5)


def test_greedy_on_the_hull_is_not_enough() -> None:
    example = worked_example(range(2, 9))
    greedy = hull_start(example, 2 * BUDGET)
    assert [one.label for one in greedy.values()] == ["8", "8", "2"]
    assert loss(greedy) > 1.3 * loss(choose(example, 2 * BUDGET))


def test_rounding_each_width_on_its_own_overruns_the_budget_and_the_solver_does_not() -> None:
    wrong = GOLDEN["wrong_answer_to_avoid"]["bits"]
    assert [round(bits) for bits in GOLDEN["unclamped"]["bits"]] == wrong
    assert sum(n * bits for n, bits in zip(N, wrong, strict=True)) > BUDGET
    assert cost(choose(worked_example(range(2, 9)), 2 * BUDGET)) <= 2 * BUDGET


def test_the_gain_over_equal_widths_is_the_arithmetic_over_the_geometric_mean() -> None:
    costs = [4**gain for gain in GAINS]
    weights = [n / sum(N) for n in N]
    arithmetic = sum(weight * one for weight, one in zip(weights, costs, strict=True))
    geometric = math.exp(sum(weight * math.log(one) for weight, one in zip(weights, costs, strict=True)))
    free = bounded_widths(GAINS, N, [-99] * 3, [99] * 3, BUDGET)
    assert distortion([4, 4, 4]) / distortion(free) == pytest.approx(arithmetic / geometric, rel=1e-9)
    assert arithmetic / geometric == pytest.approx(GOLDEN["am_gm_ratio"], rel=1e-6)
    assert math.log2(arithmetic / geometric) / 2 == pytest.approx(GOLDEN["bits_saved"], rel=1e-6)


TENSORS = st.lists(
    st.tuples(st.floats(-8, 8), st.integers(1, 10_000), st.floats(0, 4), st.floats(0, 6)), min_size=1, max_size=12
)


@given(TENSORS, st.floats(0, 1))
def test_the_continuous_solution_meets_the_budget_with_equal_marginal_costs(
    tensors: list[tuple[float, int, float, float]], share: float
) -> None:
    gains, elements, low, spans = map(list, zip(*tensors, strict=True))
    high = [bits + span for bits, span in zip(low, spans, strict=True)]
    least = sum(n * bits for n, bits in zip(elements, low, strict=True))
    most = sum(n * bits for n, bits in zip(elements, high, strict=True))
    budget = least + share * (most - least)
    widths = bounded_widths(gains, elements, low, high, budget)
    assert sum(n * bits for n, bits in zip(elements, widths, strict=True)) == pytest.approx(budget, rel=1e-9, abs=1e-9)
    free = [
        bits - gain for bits, gain, lo, hi in zip(widths, gains, low, high, strict=True) if lo + 1e-9 < bits < hi - 1e-9
    ]
    assert max(free, default=0) - min(free, default=0) <= 1e-9
    for bits, gain, lo, hi in zip(widths, gains, low, high, strict=True):
        assert lo <= bits <= hi
        for level in free:
            assert bits == pytest.approx(min(max(level + gain, lo), hi), abs=1e-9)


def test_a_budget_below_the_clamps_is_refused_with_the_smallest_that_works() -> None:
    with pytest.raises(InfeasibleTarget, match="3000"):
        bounded_widths(GAINS, N, [3] * 3, [8] * 3, 2999)
    with pytest.raises(InfeasibleTarget, match="4000"):
        choose(worked_example(range(2, 9)), 3999)


def test_a_budget_above_the_clamps_is_all_that_can_be_used() -> None:
    assert bounded_widths(GAINS, N, [2] * 3, [6] * 3, 1e9) == [6, 6, 6]
    assert [one.label for one in choose(worked_example(range(2, 9)), 1 << 40).values()] == ["8", "8", "8"]
    assert choose({}, 0) == {}


@given(problems())
def test_the_choice_is_the_best_of_all_and_within_the_budget(problem: tuple[dict[str, list[Option]], int]) -> None:
    groups, budget = problem
    chosen = choose(groups, budget)
    assert set(chosen) == set(groups)
    assert all(option in groups[name] for name, option in chosen.items())
    assert cost(chosen) <= budget
    assert loss(chosen) <= exhaustive(groups, budget) * (1 + 1e-6)


@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_groups_and_options_decides_nothing(
    problem: tuple[dict[str, list[Option]], int], chance: random.Random
) -> None:
    groups, budget = problem
    names = list(groups)
    chance.shuffle(names)
    shuffled = {name: chance.sample(groups[name], len(groups[name])) for name in names}
    assert choose(shuffled, budget) == choose(groups, budget)


@given(problems(), st.integers(-30, 30))
def test_the_scale_of_the_fisher_information_decides_nothing(
    problem: tuple[dict[str, list[Option]], int], exponent: int
) -> None:
    groups, budget = problem
    scaled = {name: [Option(o.cost, o.loss * 2.0**exponent, o.label) for o in row] for name, row in groups.items()}
    labels = {name: one.label for name, one in choose(groups, budget).items()}
    assert {name: one.label for name, one in choose(scaled, budget).items()} == labels


@given(problems(), st.integers(0, 40))
def test_more_budget_is_never_worse(problem: tuple[dict[str, list[Option]], int], more: int) -> None:
    groups, budget = problem
    assert loss(choose(groups, budget + more)) <= loss(choose(groups, budget)) * (1 + 1e-6)


def test_equal_options_are_chosen_by_label_and_equal_groups_by_name() -> None:
    twins = {name: [Option(0, 1.0, "narrow"), Option(5, 0.5, "b"), Option(5, 0.5, "a")] for name in "zyx"}
    assert {name: one.label for name, one in choose(twins, 10).items()} == {"x": "a", "y": "a", "z": "narrow"}


def random_model(groups: int, seed: int = 0) -> dict[str, list[Option]]:
    """Groups of a language model's sizes and spread of sensitivities, 13 widths each, costs in bytes."""
    chance = random.Random(seed)
    made = {}
    for at in range(groups):
        elements = chance.choice([16_384, 65_536, 180_224, 1_048_576])
        scale, ragged = math.exp(chance.gauss(0, 1.5)), chance.randrange(10)
        made[f"n{at:05}"] = [
            Option(int(elements * half / 16) + ragged, scale * 4 ** (-half / 2), f"{half / 2:g}")
            for half in range(4, 17)
        ]
    return made


def test_a_checkpoint_of_thousands_of_groups_is_solved_in_seconds() -> None:
    model = random_model(3000)
    budget = sum(row[-1].cost for row in model.values()) // 2
    started = time.process_time()
    chosen = choose(model, budget)
    assert time.process_time() - started < 20  # 1 to 2 s on one core of 2023
    assert 0 <= budget - cost(chosen) < 1e-5 * budget
    assert loss(chosen) <= loss(hull_start(model, budget))


def test_between_a_few_dozen_groups_the_search_beats_the_greedy_start() -> None:
    model = random_model(33)
    budget = sum(row[-1].cost for row in model.values()) * 2 // 5
    assert loss(choose(model, budget)) < loss(hull_start(model, budget))
