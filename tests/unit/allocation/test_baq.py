"""Allocation `baq`: the closed form, and plans from the errors of layers' outputs.

Oracles: numerical minimisation, the trace by loops over outputs of inputs, exact sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.allocation.baq import Baq, output_loss, rates
from core.allocation.sizes import Sizes
from core.allocation.space import Space
from core.allocation.uniform import uniform
from core.errors import BitmillError, InfeasibleTarget, InvalidFormat, InvalidRecipe
from core.exports.layout import layout_bytes
from core.jobs.steps import StepInput, StepRequest, recipe_params
from core.pipeline.allocate import allocate
from core.pipeline.calibrate import calibrate
from core.pipeline.plan_file import read_plan
from core.recipe.allocation import needs_covariance
from core.recipe.recipe import load_recipe
from core.recipe.tensor_format import parse
from core.sensitivity.covariance import InputStatistics
from core.storage.checkpoint import CheckpointIndex
from core.tensors.nearest import encode_nearest
from core.tensors.reader import read_tensor
from tests.unit.allocation.conftest import space_of
from tests.unit.allocation.test_allocate_step import Bench
from tests.unit.pipeline.conftest import write_llama

EMBEDDING = "model.embed_tokens.weight"

# The closed form


@given(
    losses=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12),
    mean=st.floats(1, 8),
    data=st.data(),
)
def test_losses_of_a_weight_are_equal_and_the_mean_is_met(
    losses: list[float], mean: float, data: st.DataObject
) -> None:
    elements = data.draw(st.lists(st.integers(1, 10**9), min_size=len(losses), max_size=len(losses)))
    found = np.array(rates(losses, elements, mean))
    left = np.array(losses) * 4.0**-found
    assert left == pytest.approx(left[0], rel=1e-6)
    assert float(np.average(found, weights=elements)) == pytest.approx(mean, abs=1e-6)


@given(losses=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8), moved=st.floats(-1, 1), data=st.data())
def test_no_exchange_of_bits_is_better(losses: list[float], moved: float, data: st.DataObject) -> None:
    elements = data.draw(st.lists(st.integers(1, 1000), min_size=len(losses), max_size=len(losses)))
    bounds = [(2.0, 5.0)] * len(losses)
    found = np.array(rates(losses, elements, 3.5, bounds))
    assert (found >= 2).all()
    assert (found <= 5).all()
    changed = found + np.array([moved / elements[0], -moved / elements[1]] + [0.0] * (len(losses) - 2))
    if (changed >= 2).all() and (changed <= 5).all():
        costs = np.array(losses) * np.array(elements)
        assert float(costs @ 4.0**-found) <= float(costs @ 4.0**-changed) * (1 + 1e-9)


def test_a_tensor_of_no_loss_gets_what_its_bounds_leave() -> None:
    assert rates([0.0, 1.0], [10, 10], 4, [(2, 8), (2, 8)]) == pytest.approx([2.0, 6.0])


# The loss of a tensor


def covariance(columns: int, seed: int = 0) -> torch.Tensor:
    chance = np.random.default_rng(seed)
    inputs = chance.standard_normal((3 * columns, columns)) * chance.exponential(1, columns)
    return torch.from_numpy(inputs.T @ inputs / len(inputs))


@pytest.mark.parametrize("text", ["int4@32", "t7_3@16:signmax", "lloyd3@tensor:rms", "grid3@tensor"])
def test_the_loss_is_the_mean_square_of_the_outputs_error_scaled_to_no_bits(text: str) -> None:
    weight, fmt, spread = torch.randn(12, 64), parse(text), covariance(64)
    error = encode_nearest(weight, fmt).decode().double() - weight.double()
    expected = sum(float(row @ spread @ row) for row in error) * 4**fmt.element_bits / weight.numel()
    assert output_loss(weight, fmt, InputStatistics(spread, 100)) == pytest.approx(expected, rel=1e-9)


def test_a_tensor_that_is_stored_by_inputs_is_turned() -> None:
    weight, fmt, spread = torch.randn(48, 32), parse("int4@32"), covariance(48)
    error = encode_nearest(weight, fmt).decode().double() - weight.double()
    expected = float(torch.trace(error.T @ spread @ error)) * 256 / weight.numel()
    found = output_loss(weight, fmt, InputStatistics(spread, 100, transposed=True))
    assert found == pytest.approx(expected, rel=1e-9)


def test_large_tensors_are_measured_on_some_rows() -> None:
    weight = torch.randn(1100, 2048)
    found = output_loss(weight, parse("int4@64"), InputStatistics(torch.eye(2048, dtype=torch.float64), 1))
    error = encode_nearest(weight, parse("int4@64")).decode().double() - weight.double()
    assert found == pytest.approx(256 * float(error.square().mean()), rel=0.01)


def test_a_covariance_of_other_inputs_is_refused() -> None:
    with pytest.raises(InvalidFormat, match="8 inputs for 64"):
        output_loss(torch.randn(4, 64), parse("int4@32"), InputStatistics(covariance(8), 1))


# Plans


@pytest.fixture(scope="module")
def space(index: CheckpointIndex) -> Space:
    return space_of(index)


def known_inputs(index: CheckpointIndex, louder: str = "") -> Callable[[str], InputStatistics | None]:
    """Of every tensor but the embedding; those of `louder` are 64 times as large in square."""

    def inputs(name: str) -> InputStatistics | None:
        if name == EMBEDDING:
            return None
        columns = index.tensors[name].shape[-1]
        return InputStatistics(covariance(columns, columns) * (64.0 if louder and louder in name else 1.0), 1000)

    return inputs


@pytest.mark.parametrize("bits", [3.5, 4.0, 5.25])
@pytest.mark.parametrize("text", ["t7_4@32:signmax", "int4@32", "grid4@tensor", "lloyd4-rows@channel"])
def test_the_stored_size_is_just_below_the_budget(index: CheckpointIndex, text: str, bits: float) -> None:
    space = space_of(index, text)
    sizes = Sizes(index, space)
    budget = max(sizes.budget(bits), sizes.least)
    formats = Baq(sizes, parse(text), known_inputs(index))(budget)
    stored = layout_bytes(index, space.choice(formats))
    assert Fraction(stored) <= budget
    assert sizes.bits(budget - stored) < (0.15 if text.startswith("int") else 0.05)


def test_inputs_of_four_times_the_size_are_worth_up_to_two_bits_more(index: CheckpointIndex, space: Space) -> None:
    sizes, base = Sizes(index, space), parse("t7_4@32:signmax")
    budget = sizes.budget(4.5)
    plain = Baq(sizes, base, known_inputs(index))(budget)
    louder = Baq(sizes, base, known_inputs(index, "layers.0.mlp.down_proj"))(budget)
    name = "model.layers.0.mlp.down_proj.weight"
    gained = parse(louder[name]).element_bits - parse(plain[name]).element_bits
    assert 2 < gained <= 3.1  # 1/2 log2 64 = 3 bits, less what its share of the mean takes away


def test_the_modelled_loss_is_less_than_that_of_one_width(index: CheckpointIndex, space: Space) -> None:
    sizes, base, inputs = Sizes(index, space), parse("t7_4@32:signmax"), known_inputs(index, "q_proj")
    budget = sizes.budget(4.5)
    even, found = uniform(sizes, base, budget), Baq(sizes, base, inputs)(budget)

    def loss(formats: dict[str, str]) -> float:
        total = 0.0
        for group in space.groups:
            for name in group.members:
                statistics = inputs(name)
                if statistics is not None:
                    weight = read_tensor(index, name)
                    error = encode_nearest(weight, parse(formats[group.name])).decode().double() - weight.double()
                    total += float(((error @ statistics.covariance) * error).sum())
        return total

    assert loss(found) < 0.95 * loss(even)


def test_tensors_whose_inputs_are_not_known_get_what_uniform_gives(index: CheckpointIndex, space: Space) -> None:
    sizes, base = Sizes(index, space), parse("t7_4@32:signmax")
    budget = sizes.budget(4.5)
    assert Baq(sizes, base, known_inputs(index))(budget)[EMBEDDING] == uniform(sizes, base, budget)[EMBEDDING]
    assert Baq(sizes, base, lambda _name: None)(budget) == uniform(sizes, base, budget)


def test_a_budget_below_the_smallest_size_is_refused(index: CheckpointIndex, space: Space) -> None:
    sizes = Sizes(index, space)
    with pytest.raises(InfeasibleTarget):
        Baq(sizes, parse("t7_4@32:signmax"), known_inputs(index))(sizes.least - 1)


def test_it_needs_calibration_and_the_covariance() -> None:
    document = {"target": {"bits_per_param": 4}, "format": "int4@64", "allocation": "baq"}
    recipe = load_recipe(document)
    assert recipe.calibration
    assert needs_covariance(recipe.canonical()["allocation"])
    assert not needs_covariance(load_recipe(document | {"allocation": "fisher"}).canonical()["allocation"])
    with pytest.raises(InvalidRecipe, match="baq needs calibration"):
        load_recipe(document | {"calibration": False})


def test_the_step_plans_from_a_calibration_that_gathered_covariances(tmp_path: Path) -> None:
    bench = Bench(write_llama(tmp_path / "llama"), tmp_path / "bench")
    params = recipe_params("calibrate", bench.recipe().canonical()) | {"gather": ["fisher", "covariance"]}
    given = (StepInput(kind="fetch", output=bench.fetched),)
    calibrated = calibrate(StepRequest(kind="calibrate", input_hash="b" * 64, params=params, inputs=given), bench.ctx)
    request = bench.request(calibrated=calibrated, allocation="baq")
    plan = read_plan(bench.ctx, allocate(request, bench.ctx))
    assert 4.4 < plan.predicted_bits_per_param <= 4.5
    assert plan.predicted_kl is not None  # by Fisher information, which was gathered too
    assert len(set(plan.choice.values())) > 2
    with pytest.raises(BitmillError, match="covariance of inputs"):
        allocate(bench.request(allocation="baq"), bench.ctx)
