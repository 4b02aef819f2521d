"""SignRound: starts at rounding to nearest, moves by the signs of straight-through gradients, never ends above it.

Oracle: the forward pass as it is written down, differentiated by autograd with rounding taken for the identity.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidCheckpoint, InvalidFormat
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import parse
from core.rounding import base, signround
from core.rounding.base import Sensitivity
from core.rounding.signround import first_rate, round_tensor
from core.tensors.encoded import EncodedTensor
from core.tensors.frame import Frame
from core.tensors.nearest import encode_nearest

SPEC = RoundingSpec(name="signround", steps=50)
TRAINED = ["int4@32", "int3-sym@64:absmax:fp32", "int2@channel", "int4-asym@32:signmax:fp16", "int4@16:absmax:e4m3"]
FIXED = ["mxint4", "int4@tensor", "int4@64:absmax:dq8", "int3@32:absmax:e8m0"]


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(0.05 * np.random.default_rng(seed).standard_t(5, (rows, columns))).float()


def inputs(columns: int, count: int, seed: int = 1) -> torch.Tensor:
    chance = np.random.default_rng(seed)
    mixing = chance.standard_normal((columns, columns // 4 + 1))
    made = mixing @ chance.standard_normal((columns // 4 + 1, count)) + 0.2 * chance.standard_normal((columns, count))
    return torch.from_numpy(made)


def covariance(columns: int, seed: int = 1) -> torch.Tensor:
    made = inputs(columns, 400, seed)
    return made @ made.T / 400


def cost(weight: torch.Tensor, encoded: EncodedTensor, spread: torch.Tensor) -> float:
    error = (encoded.decode() - weight).double()
    return float(((error @ spread) * error).sum())


def same(one: EncodedTensor, other: EncodedTensor) -> bool:
    parts = other.parts()
    return all(torch.equal(part, parts[name]) for name, part in one.parts().items())


@given(seed=st.integers(0, 1000), text=st.sampled_from([*TRAINED, *FIXED]), steps=st.sampled_from([1, 7, 40]))
@settings(max_examples=40, deadline=None)
def test_it_never_costs_more_than_rounding_to_nearest(seed: int, text: str, steps: int) -> None:
    weight, spread, fmt = weights(6, 96, seed), covariance(96, seed), parse(text)
    found = round_tensor(weight, fmt, Sensitivity(covariance=spread), RoundingSpec(name="signround", steps=steps), 0)
    assert cost(weight, found, spread) <= cost(weight, encode_nearest(weight, fmt), spread) * (1 + 1e-9)


@pytest.mark.parametrize("text", [*TRAINED, *FIXED, "int4@32+hadamard", "int4@32+rotate", "int4@32+rans"])
def test_it_costs_far_less_than_rounding_to_nearest(text: str) -> None:
    weight, spread, fmt = weights(32, 128), covariance(128), parse(text)
    found = round_tensor(weight, fmt, Sensitivity(covariance=spread), SPEC, 4)
    assert cost(weight, found, spread) < 0.6 * cost(weight, encode_nearest(weight, fmt, seed=4), spread)
    read = EncodedTensor.from_parts(found.format, found.shape, found.dtype, found.parts())
    assert torch.equal(read.decode(), found.decode())


def test_more_steps_cost_less() -> None:
    weight, spread = weights(32, 128), covariance(128)
    found = [
        cost(
            weight,
            round_tensor(
                weight,
                parse("int3@64"),
                Sensitivity(covariance=spread),
                RoundingSpec(name="signround", steps=steps),
                0,
            ),
            spread,
        )
        for steps in (5, 50, 500)
    ]
    assert found[0] > found[1] > found[2]


@pytest.mark.parametrize("text", [*TRAINED, *FIXED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_inputs_it_stays_where_it_starts_at_rounding_to_nearest(text: str, dtype: torch.dtype) -> None:
    weight, fmt = weights(8, 64).to(dtype), parse(text)
    found = round_tensor(weight, fmt, Sensitivity(covariance=torch.zeros(64, 64)), SPEC, 0)
    assert same(found, encode_nearest(weight, fmt))
    assert any("nearest" in note for note in found.notes)


def started(weight: torch.Tensor, frame: Frame, spread: torch.Tensor) -> signround._State:
    return signround._State.at_start(weight, frame.scales, spread.float(), None)


def grid_of(frame: Frame) -> signround._Grid:
    values = frame.table.values
    return signround._Grid(
        values[0], values[1] - values[0], len(values) - 1, frame.width, lambda scales: scales.bfloat16().float()
    )


@pytest.mark.parametrize("text", ["int4@32", "int3-sym@32", "int4-asym@64:signmax"])
def test_a_step_moves_against_the_signs_of_the_gradients(text: str) -> None:
    weight, spread = weights(6, 64), covariance(64)
    frame = Frame.of(weight, parse(text))
    grid, state = grid_of(frame), started(weight, frame, spread)
    for rate in (0.05, 0.04, 0.03):
        offsets, factors = state.offsets.clone().requires_grad_(), state.factors.clone().requires_grad_()
        exact = frame.scales * factors
        scales = exact + (exact.bfloat16().float() - exact).detach()
        wide = scales.repeat_interleave(grid.width, dim=1)
        number = (weight / wide - grid.low) / grid.step + offsets
        index = (number + (number.round() - number).detach()).clamp(0, grid.top)
        error = weight - (grid.low + grid.step * index) * wide
        lost = ((error @ spread.float()) * error).sum()
        by_offset, by_factor = torch.autograd.grad(lost, (offsets, factors))
        expected = (offsets - rate * by_offset.sign()).clamp(-0.5, 0.5), factors - rate * by_factor.sign()
        state.step(grid, rate)
        for found, wanted in zip((state.offsets, state.factors), expected, strict=True):
            differ = (found - wanted.clamp(-0.5, 1)).abs() > 1e-6  # gradients of about 0 may have either sign
            assert float(differ.double().mean()) < 0.01


def test_the_first_state_is_rounding_to_nearest() -> None:
    weight, fmt = weights(16, 96), parse("int4@32")
    frame = Frame.of(weight, fmt)
    state = started(weight, frame, covariance(96))
    state.step(grid_of(frame), 0.01)
    assert torch.equal(frame.encoded(state.best_indices).decode(), encode_nearest(weight, fmt).decode())
    assert bool((state.best_factors == 1).all())


def test_offsets_move_codes_by_one_at_most_where_scales_stand_still() -> None:
    weight, fmt = weights(16, 128), parse("mxint4")
    found = round_tensor(weight, fmt, Sensitivity(covariance=covariance(128)), SPEC, 0)
    moved = (found.all_codes().int() - encode_nearest(weight, fmt).all_codes().int()).abs()
    assert int(moved.max()) == 1
    assert torch.equal(found.scales, encode_nearest(weight, fmt).scales)


@pytest.mark.parametrize("text", TRAINED)
def test_learned_scales_are_smaller_and_stored_as_the_format_stores_them(text: str) -> None:
    weight, fmt = weights(16, 128), parse(text)
    found = round_tensor(weight, fmt, Sensitivity(covariance=covariance(128)), SPEC, 0)
    nearest = encode_nearest(weight, fmt)
    assert found.scales.dtype == nearest.scales.dtype
    assert found.scales.shape == nearest.scales.shape
    assert bool((found.scale_values.abs() <= nearest.scale_values.abs()).all())
    assert bool((found.scale_values.abs() < nearest.scale_values.abs()).any())
    assert found.nbytes == nearest.nbytes


@pytest.mark.parametrize("text", FIXED)
def test_scales_that_are_not_learned_are_those_of_nearest(text: str) -> None:
    weight, fmt = weights(16, 128), parse(text)
    found = round_tensor(weight, fmt, Sensitivity(covariance=covariance(128)), SPEC, 0)
    nearest = encode_nearest(weight, fmt).parts()
    assert all(torch.equal(part, nearest[name]) for name, part in found.parts().items() if name != "codes")


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("text", ["int4@32", "int4@32:absmax:fp32", "int4@16:absmax:e4m3"])
def test_weights_of_any_magnitude(text: str, magnitude: float) -> None:
    weight = weights(8, 64)
    weight = (weight / weight.abs().max()).double().mul(magnitude).float()
    weight[3] = 0
    found = round_tensor(weight, parse(text), Sensitivity(covariance=covariance(64)), SPEC, 0).decode()
    assert float((found.double() - weight.double()).norm() / weight.double().norm()) < 0.2
    assert not bool(found[3].any())


@pytest.mark.parametrize("power", [-100, -60, 60, 100])
def test_weights_of_another_scale_have_the_same_codes(power: int) -> None:
    weight, known, fmt = weights(8, 64), Sensitivity(covariance=covariance(64)), parse("int4@32")
    found = round_tensor(weight * 2.0**power, fmt, known, SPEC, 0)
    assert torch.equal(found.decode(), round_tensor(weight, fmt, known, SPEC, 0).decode() * 2.0**power)
    assert not torch.equal(found.decode(), encode_nearest(weight * 2.0**power, fmt).decode())


def test_two_streams_make_up_for_what_the_inputs_have_lost() -> None:
    weight, exact = weights(32, 96), inputs(96, 500)
    quantised = exact + 0.3 * inputs(96, 500, 5)
    one = Sensitivity(covariance=quantised @ quantised.T / 500)
    two = replace(one, cross=exact @ quantised.T / 500)
    wanted = weight.double() @ exact
    errors = [
        float((round_tensor(weight, parse("int4@32"), known, SPEC, 0).decode().double() @ quantised - wanted).norm())
        for known in (one, two)
    ]
    assert errors[1] < 0.95 * errors[0]


def test_rows_do_not_depend_on_each_other() -> None:
    weight, known, fmt = weights(5, 64), Sensitivity(covariance=covariance(64)), parse("int4@32")
    alone = [round_tensor(row, fmt, known, SPEC, 0).decode() for row in weight]
    together = round_tensor(weight, fmt, known, SPEC, 0).decode()
    assert float((torch.stack(alone) != together).double().mean()) < 0.05  # sums in fp32 have another order


@pytest.mark.parametrize("shape", [(3, 1), (2, 3, 64), (33,), (5, 70)])
@pytest.mark.parametrize("text", ["int4@32", "mxint4", "int8@channel"])
def test_tensors_of_any_shape(shape: tuple[int, ...], text: str) -> None:
    weight = weights(1, int(np.prod(shape))).reshape(shape)
    found = round_tensor(weight, parse(text), Sensitivity(covariance=covariance(shape[-1])), SPEC, 0)
    assert found.decode().shape == shape


@pytest.mark.parametrize(
    ("steps", "bits", "rate"), [(200, 4, 1 / 200), (1000, 4, 1 / 1000), (1000, 3, 2 / 1000), (999, 2, 1 / 999)]
)
def test_the_rate_is_that_of_the_method(steps: int, bits: float, rate: float) -> None:
    assert first_rate(steps, bits) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["nf4@64", "mxfp4", "power4@channel", "q4_k", "grid3@tensor", "int4@32+outliers0.01"])
def test_other_formats_are_refused(text: str) -> None:
    with pytest.raises(InvalidFormat):
        base.round_tensor(
            weights(4, 256), parse(text), SPEC, sensitivity=Sensitivity(covariance=covariance(256)), seed=0
        )


def test_missing_statistics_and_those_of_other_inputs_are_refused() -> None:
    with pytest.raises(InvalidCheckpoint, match="no statistics"):
        round_tensor(weights(4, 64), parse("int4@32"), Sensitivity(), SPEC, 0)
    with pytest.raises(InvalidFormat, match="covariance"):
        base.round_tensor(
            weights(4, 64), parse("int4@32"), SPEC, sensitivity=Sensitivity(covariance=covariance(32)), seed=0
        )
