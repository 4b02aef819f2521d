"""The search over several paths: the best codes where all paths are kept, and the same ones however ties fall."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.rounding.successive import Scales, Search, best_numbers
from core.tensors.entropy.matrix import class_costs

Doubles = NDArray[np.float64]


def problem(rows: int, places: int, seed: int) -> tuple[Doubles, Doubles, Doubles]:
    """Targets Y^T, a factor and values of 1."""
    chance = np.random.default_rng(seed)
    inputs = chance.standard_normal((3 * places, places)) @ chance.standard_normal((places, places))
    factor = np.asarray(np.linalg.cholesky(inputs.T @ inputs / len(inputs)), np.float64)
    values = chance.uniform(0.3, 1.5, places)
    return factor.T @ chance.standard_normal((places, rows)), factor, values


def found(targets: Doubles, factor: Doubles, values: Doubles, search: Search) -> NDArray[np.int32]:
    scales = Scales.ones(targets.shape[1], len(targets))
    return best_numbers(torch.from_numpy(targets), torch.from_numpy(factor), values, scales, search)


def cost(targets: Doubles, factor: Doubles, values: Doubles, numbers: Any, price: float, bits: Doubles) -> Doubles:
    """Of each row: the squared error and the price of its bits; `bits` of magnitudes (places, numbers)."""
    error = targets - factor.T @ (values[:, None] * numbers)
    paid = np.take_along_axis(bits, np.minimum(np.abs(numbers), bits.shape[1] - 1).astype(int), axis=1)
    return np.asarray((error**2).sum(axis=0) + price * paid.sum(axis=0), np.float64)


def best_of_all(targets: Doubles, factor: Doubles, values: Doubles, price: float, bits: Doubles) -> float:
    """The least cost of one row among all codes of which each is one of the two numbers nearest to what is left."""
    least = np.inf
    for turns in product((0, 1), repeat=len(targets)):
        left, numbers = targets[:, 0].copy(), np.zeros((len(targets), 1))
        for at in range(len(targets) - 1, -1, -1):
            wanted = left[at] / (factor[at, at] * values[at])
            nearest = np.rint(wanted)
            numbers[at] = nearest + turns[at] * (1 if wanted > nearest else -1)
            left[: at + 1] -= numbers[at] * values[at] * factor[at, : at + 1]
        least = min(least, float(cost(targets, factor, values, numbers, price, bits)[0]))
    return least


@given(st.integers(1, 7), st.integers(0, 1000), st.sampled_from([0.0, 0.05, 0.5]))
@settings(max_examples=25, deadline=None)
def test_with_as_many_paths_as_there_are_codes_it_finds_the_best(places: int, seed: int, price: float) -> None:
    targets, factor, values = problem(1, places, seed)
    stds, costs = class_costs(63)
    spreads = np.random.default_rng(seed).choice(stds, places)
    bits = costs[[int(np.abs(stds - spread).argmin()) for spread in spreads]]
    numbers = found(targets, factor, values, Search(128, price, spreads))
    wanted = best_of_all(targets, factor, values, price, bits)
    assert float(cost(targets, factor, values, numbers, price, bits)[0]) == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("places", [1, 31, 32, 33, 100, 700])
@pytest.mark.parametrize("paths", [2, 3, 16, 40])
def test_more_paths_cost_no_more_than_one_number_after_another(places: int, paths: int) -> None:
    """33 rows: two groups that take turns, and one more; 700 places: longer than codes wait to be decided."""
    targets, factor, values = problem(33, places, places)
    left, alone = targets.copy(), np.zeros(targets.shape)
    for at in range(places - 1, -1, -1):
        alone[at] = np.rint(left[at] / (factor[at, at] * values[at]))
        left[: at + 1] -= np.outer(factor[at, : at + 1], alone[at] * values[at])
    numbers = found(targets, factor, values, Search(paths, 0.0, np.ones(places)))
    free = np.zeros((places, 1))
    searched, single = (cost(targets, factor, values, one, 0.0, free).sum() for one in (numbers, alone))
    assert searched <= single * (1 + 1e-6)


def test_rows_do_not_depend_on_each_other() -> None:
    targets, factor, values = problem(40, 90, 5)
    search = Search(8, 0.1, np.full(90, 1.5))
    whole, some = found(targets, factor, values, search), found(targets[:, 17:22].copy(), factor, values, search)
    assert np.array_equal(whole[:, 17:22], some)


def test_equal_candidates_leave_no_path_out() -> None:
    """Half-way between two numbers both cost the same, in every column and for every path."""
    places = 40
    targets = np.full((places, 3), 0.5)
    numbers = found(targets, np.eye(places), np.ones(places), Search(16, 0.0, np.ones(places)))
    assert set(np.unique(numbers)) <= {0, 1}
    nothing = found(np.zeros((places, 3)), np.eye(places), np.ones(places), Search(16, 0.1, np.ones(places)))
    assert not nothing.any()
