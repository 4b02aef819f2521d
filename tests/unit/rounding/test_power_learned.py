"""Power grids learned from data: the descent's cost against GPTQ and rounding, and codes over the whole grid.

The numbers of a reference run are in tests/golden/test_layer_reconstruction.py.
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
from core.rounding import base
from core.rounding.base import Sensitivity
from core.rounding.power_learned import round_tensor
from core.tensors.encoded import EncodedTensor
from core.tensors.nearest import encode_nearest

LEARNED = RoundingSpec(name="power_learned")
GPTQ = RoundingSpec(name="power_learned", refine=0)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(0.05 * np.random.default_rng(seed).standard_t(5, (rows, columns))).float()


def covariance(columns: int, seed: int = 1) -> torch.Tensor:
    chance = np.random.default_rng(seed)
    mixing = chance.standard_normal((columns, columns // 4 + 1))
    made = mixing @ chance.standard_normal((columns // 4 + 1, 400)) + 0.2 * chance.standard_normal((columns, 400))
    return torch.from_numpy(made @ made.T / 400)


def damped_cost(weight: torch.Tensor, encoded: EncodedTensor, spread: torch.Tensor) -> float:
    error = (encoded.decode() - weight).double()
    damping = 0.01 * spread.diagonal().mean() * torch.eye(len(spread), dtype=torch.float64)
    return float(((error @ (spread + damping)) * error).sum())


@given(
    seed=st.integers(0, 1000),
    text=st.sampled_from(["power3@channel", "power4-power@channel", "power0.5_4@64", "power1_3@32:absmax:fp32"]),
)
@settings(max_examples=25, deadline=None)
def test_descent_costs_no_more_than_gptq_and_gptq_no_more_than_nearest(seed: int, text: str) -> None:
    weight, spread, fmt = weights(12, 64, seed), covariance(64, seed), parse(text)
    known = Sensitivity(covariance=spread)
    nearest, gptq, learned = (
        damped_cost(weight, encoded, spread)
        for encoded in (
            encode_nearest(weight, fmt),
            round_tensor(weight, fmt, known, GPTQ, 0),
            round_tensor(weight, fmt, known, LEARNED, 0),
        )
    )
    assert learned <= gptq * (1 + 1e-9)
    assert gptq <= nearest * (1 + 1e-9)
    assert learned < 0.8 * nearest


def test_codes_leave_the_two_neighbours_of_their_weight() -> None:
    weight, spread = weights(32, 128), covariance(128)
    encoded = round_tensor(weight, parse("power0.6_3@channel:absmax:fp32"), Sensitivity(covariance=spread), LEARNED, 0)
    levels = (encoded.table.double() * encoded.scale_values.double()[:, None])[:, None, :]
    below = (levels <= weight.double()[:, :, None]).sum(dim=2)
    taken = (levels < encoded.decode().double()[:, :, None]).sum(dim=2)
    outside = ((taken < below - 1) | (taken > below)).double().mean()
    assert 0.005 < float(outside) < 0.3


def test_the_exponent_that_is_left_open_is_that_of_the_weights_alone() -> None:
    weight, fmt = weights(32, 128), parse("power4@channel")
    learned = round_tensor(weight, fmt, Sensitivity(covariance=covariance(128)), LEARNED, 0)
    assert learned.fitted == encode_nearest(weight, fmt).fitted
    again = round_tensor(
        weight, fmt.with_fitted(learned.fitted or 0), Sensitivity(covariance=covariance(128)), LEARNED, 0
    )
    assert torch.equal(again.decode(), learned.decode())
    parts = EncodedTensor.from_parts(fmt, (32, 128), "F32", learned.parts())
    assert torch.equal(parts.decode(), learned.decode())


@pytest.mark.parametrize(
    "spread", [torch.eye(64).double(), torch.zeros(64, 64).double(), torch.rand(64).double().diag()]
)
def test_where_inputs_are_orthogonal_or_zero_it_is_nearest(spread: torch.Tensor) -> None:
    weight, fmt = weights(8, 64), parse("power0.7_4@channel")
    found = round_tensor(weight, fmt, Sensitivity(covariance=spread), LEARNED, 0)
    assert torch.equal(found.decode(), encode_nearest(weight, fmt).decode())
    assert any("nearest" in note for note in found.notes)


def test_two_streams_and_inputs_that_are_always_zero() -> None:
    weight, fmt = weights(48, 96), parse("power0.7_3@channel")
    chance = np.random.default_rng(0)
    exact = torch.from_numpy(chance.standard_normal((96, 24)) @ chance.standard_normal((24, 500)))
    found = exact + 0.3 * torch.from_numpy(chance.standard_normal((96, 500)))
    exact[7], found[7] = 0, 0
    one = Sensitivity(covariance=found @ found.T / 500)
    two = replace(one, cross=exact @ found.T / 500)
    wanted = weight.double() @ exact
    errors = []
    for known in (one, two):
        encoded = round_tensor(weight, fmt, known, LEARNED, 0)
        assert torch.equal(encoded.decode()[:, 7], encode_nearest(weight, fmt).decode()[:, 7])
        errors.append(float((encoded.decode().double() @ found - wanted).norm()))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("text", ["int4@32", "nf4@64", "mxfp4", "lloyd4@channel", "grid3@tensor"])
def test_other_families_are_refused_and_gptq_is_named(text: str) -> None:
    with pytest.raises(InvalidFormat, match="power grids") as refused:
        base.round_tensor(
            weights(4, 256), parse(text), LEARNED, sensitivity=Sensitivity(covariance=covariance(256)), seed=0
        )
    assert "gptq" in refused.value.hint


def test_missing_and_impossible_statistics_are_refused() -> None:
    weight, fmt = weights(4, 64), parse("power4@channel")
    with pytest.raises(InvalidCheckpoint, match="no statistics"):
        round_tensor(weight, fmt, Sensitivity(), LEARNED, 0)
    with pytest.raises(InvalidFormat, match="covariance"):
        base.round_tensor(weight, fmt, LEARNED, sensitivity=Sensitivity(covariance=covariance(32)), seed=0)
    with pytest.raises(InvalidCheckpoint, match="negative"):
        base.round_tensor(weight, fmt, LEARNED, sensitivity=Sensitivity(covariance=-covariance(64)), seed=0)
