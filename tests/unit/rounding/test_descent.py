"""Coordinate descent over levels: every step is the least over the whole table, so the cost never rises.

Oracle: the same steps one by one, each level tried, with the cost computed anew from inputs and outputs.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.recipe.tensor_format import parse
from core.rounding.base import Sensitivity
from core.rounding.descent import OutputCost, best_indices, descend
from core.rounding.levels import Indices, Levels
from core.tensors.frame import Frame
from core.tensors.nearest import encode_nearest

FORMATS = ["int3@16", "mxfp4", "nf4@channel", "t5_2.58@16:signmax", "power3-power@channel", "int4-mx@32"]


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(0.05 * np.random.default_rng(seed).standard_t(5, (rows, columns))).float()


def inputs(columns: int, count: int, seed: int = 1) -> torch.Tensor:
    chance = np.random.default_rng(seed)
    mixing = chance.standard_normal((columns, columns // 4 + 1))
    made = mixing @ chance.standard_normal((columns // 4 + 1, count)) + 0.3 * chance.standard_normal((columns, count))
    return torch.from_numpy(made)


def two_streams(columns: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, Sensitivity]:
    """Inputs x, inputs h, and their statistics in units that the cost keeps: the largest mean square is 1."""
    exact = inputs(columns, 100, seed)
    found = exact + 0.1 * inputs(columns, 100, seed + 1)
    unit = found.square().sum(dim=1).max().sqrt()
    exact, found = exact / unit, found / unit
    return exact, found, Sensitivity(covariance=found @ found.T, cross=exact @ found.T)


def stepwise(weight: torch.Tensor, indices: Indices, levels: Levels, cost: OutputCost, passes: int) -> list[float]:
    """Every level tried for one weight after the other, kept where the cost falls: the costs after every move."""
    pull, costs = cost.pull(weight, 0), []

    def cost_of(tried: Indices) -> float:
        error = weight - levels.decoded(tried)
        linear = torch.zeros_like(error) if pull is None else 2 * pull
        damped = cost.covariance + cost.damping * torch.eye(weight.shape[1], dtype=torch.float64)
        return float(((error @ damped + linear) * error).sum())

    least = cost_of(indices)
    for _ in range(passes):
        for t in range(weight.shape[1]):
            for row in range(len(indices)):
                for level in range(len(levels.values)):
                    tried = indices.copy()
                    tried[row, t] = level
                    found = cost_of(tried)
                    if found < least - 1e-12 * abs(least):
                        least, indices[row, t] = found, level
            costs.append(least)
    return costs


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.01])
def test_codes_are_those_of_trying_every_level_of_every_weight(text: str, share: float) -> None:
    weight = weights(2, 32)
    frame, (_, _, known) = Frame.of(weight, parse(text)), two_streams(32)
    cost, levels = OutputCost.of(known, frame).damped(share), Levels.of(frame)
    found, expected = levels.nearest(weight.double()), levels.nearest(weight.double())
    descend(weight.double(), found, cost, cost.pull(weight.double(), 0), levels, 3)
    costs = stepwise(weight.double(), expected, levels, cost, 3)
    assert np.array_equal(found, expected)
    assert costs[-1] < costs[0]


@given(seed=st.integers(0, 10**6), text=st.sampled_from(FORMATS))
@settings(max_examples=30, deadline=None)
def test_the_cost_falls_from_pass_to_pass_until_nothing_moves(seed: int, text: str) -> None:
    weight = weights(6, 96, seed)
    frame, (_, _, known) = Frame.of(weight, parse(text)), two_streams(96, seed)
    cost, levels, exact = OutputCost.of(known, frame).damped(0.01), Levels.of(frame), weight.double()
    pull, indices = cost.pull(exact, 0), levels.nearest(exact)
    costs = [cost.of_error(exact - levels.decoded(indices), pull)]
    for _ in range(200):
        moved = descend(exact, indices, cost, pull, levels, 1)
        costs.append(cost.of_error(exact - levels.decoded(indices), pull))
        if not moved:
            break
    assert moved == 0
    slack = 1e-12 * abs(costs[0])
    assert all(after <= before + slack for before, after in pairwise(costs))
    assert costs[-1] < costs[0]


def test_the_cost_is_that_of_the_outputs_up_to_a_constant() -> None:
    weight, (exact, found, known) = weights(12, 64).double(), two_streams(64)
    owed = 0.1 * inputs(12, 100, 4) @ torch.eye(100, dtype=torch.float64)
    known = replace(known, residual=owed @ found.T)
    cost = OutputCost.of(known, Frame.of(weight.float(), parse("int4@32")))
    pull = cost.pull(weight, 0)

    def of_outputs(decoded: torch.Tensor) -> float:
        return float((weight @ exact + owed - decoded @ found).square().sum())

    nothing = of_outputs(weight)
    for seed in range(3):
        decoded = weight + weights(12, 64, seed + 7).double()
        assert cost.of_error(weight - decoded, pull) == pytest.approx(of_outputs(decoded) - nothing, rel=1e-9)


@pytest.mark.parametrize("option", ["+hadamard", "+rotate"])
def test_a_rotation_changes_the_basis_of_the_cost_and_not_the_cost(option: str) -> None:
    weight, (_, _, known) = weights(16, 64), two_streams(64)
    known = replace(known, residual=torch.from_numpy(np.random.default_rng(3).standard_normal((16, 64))))
    frame, plain = Frame.of(weight, parse(f"int4@32{option}"), seed=5), Frame.of(weight, parse("int4@32"))
    turned, cost = OutputCost.of(known, frame), OutputCost.of(known, plain)
    unit = float(cost.covariance.diagonal().max())
    decoded = encode_nearest(weight, parse(f"int4@32{option}"), seed=5).decode()
    levels = Levels.of(frame)
    coded = levels.decoded(levels.nearest(frame.matrix.double()))
    expected = cost.of_error((weight - decoded).double(), cost.pull(weight.double(), 0))
    found = turned.of_error(frame.matrix.double() - coded, turned.pull(frame.matrix.double(), 0))
    assert unit == pytest.approx(1)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
def test_blocks_of_columns_change_nothing(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(33, columns)
    frame, (_, _, known) = Frame.of(weight, parse("int4@32")), two_streams(columns)
    cost, levels = OutputCost.of(known, frame).damped(0.01), Levels.of(frame)
    found = []
    for block, dense in ((64, 0.1), (7, 0.0), (1000, 1.0), (30, 1.0)):
        monkeypatch.setattr("core.rounding.descent.BLOCK", block)
        monkeypatch.setattr("core.rounding.descent._DENSE", dense)
        indices = levels.nearest(weight.double())
        descend(weight.double(), indices, cost, cost.pull(weight.double(), 0), levels, 20)
        found.append(indices)
    assert all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("text", [*FORMATS, "int8@tensor", "nvfp4", "int4@128:rms:dq8", "t5_4@16:rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_are_what_the_format_decodes(text: str, dtype: torch.dtype) -> None:
    weight = weights(7, 80).to(dtype)
    frame = Frame.of(weight, parse(text))
    indices = Levels.of(frame).nearest(frame.matrix.double())
    decoded = frame.encoded(torch.from_numpy(indices)).decode()
    assert torch.equal(Levels.of(frame).decoded(indices).float(), decoded)
    if "nvfp4" not in text and "dq8" not in text:  # which round quotients, and by scales before they are quantised
        assert torch.equal(decoded, encode_nearest(weight, parse(text)).decode())


def test_a_start_that_costs_more_than_nearest_is_given_up() -> None:
    weight, (_, _, known) = weights(8, 64), two_streams(64)
    frame = Frame.of(weight, parse("int4@32"))
    cost = OutputCost.of(known, frame).damped(0.01)

    def worst(rows: torch.Tensor, _first: int, _levels: Levels) -> Indices:
        return np.zeros(tuple(rows.shape), np.int32)

    assert best_indices(frame, cost, worst, 0) is None
    assert best_indices(frame, cost, lambda rows, _, levels: levels.nearest(rows), 0) is None
    assert best_indices(frame, cost, lambda rows, _, levels: levels.nearest(rows), 1) is not None
