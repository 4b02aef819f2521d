"""Error diffusion: the direct form on Gram matrices, and what it must leave as rounding to nearest has it.

Oracle: the algorithm as it is written down, which holds the output error of every column of inputs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidCheckpoint, InvalidFormat, NonFiniteWeights
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import parse
from core.rounding import base
from core.rounding.base import Sensitivity
from core.rounding.error_diffusion import round_tensor
from core.tensors.encoded import EncodedTensor
from core.tensors.nearest import encode_nearest

PLAIN = RoundingSpec(name="error_diffusion", refine=0)
REFINED = RoundingSpec(name="error_diffusion")
FORMATS = ["mxint4", "mxfp4", "int4@32", "nf4@64:absmax:fp32", "int4-asym@32:signmax:fp16", "t5_3.5@16:rms", "nvfp4"]


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(0.05 * np.random.default_rng(seed).standard_t(5, (rows, columns))).float()


def inputs(columns: int, count: int, seed: int = 1) -> torch.Tensor:
    """(columns, count), of low rank and some noise."""
    chance = np.random.default_rng(seed)
    mixing = chance.standard_normal((columns, columns // 4 + 1))
    made = mixing @ chance.standard_normal((columns // 4 + 1, count)) + 0.2 * chance.standard_normal((columns, count))
    return torch.from_numpy(made)


def statistics(quantised: torch.Tensor, exact: torch.Tensor | None = None) -> Sensitivity:
    count = quantised.shape[1]
    cross = None if exact is None else exact @ quantised.T / count
    return Sensitivity(covariance=quantised @ quantised.T / count, cross=cross)


def same(one: EncodedTensor, other: EncodedTensor) -> bool:
    parts = other.parts()
    return all(torch.equal(part, parts[name]) for name, part in one.parts().items())


def directly(weight: torch.Tensor, exact: torch.Tensor, quantised: torch.Tensor, like: EncodedTensor) -> torch.Tensor:
    """Column after column by the output error itself, with the table and the scales of a tensor."""
    rows, columns = weight.shape
    scales = like.scale_values.reshape(rows, -1)
    width, table = -(-columns // scales.shape[1]), torch.unique(like.table)
    table = table[1:] if like.format.mode == "mx" else table  # its lowest is read and never written
    residual, decoded = torch.zeros(rows, exact.shape[1], dtype=torch.float64), torch.zeros(rows, columns).double()
    for t in range(columns):
        wanted = residual + torch.outer(weight[:, t].double(), exact[t])
        power = quantised[t].square().sum()
        best = wanted @ quantised[t] / power if power > 0 else weight[:, t].double()
        levels = (table * scales[:, t // width, None]).double()
        at = (levels - best[:, None]).abs().argmin(dim=1)
        decoded[:, t] = levels[torch.arange(rows), at]
        residual = wanted - torch.outer(decoded[:, t], quantised[t])
    return decoded


@pytest.mark.parametrize(
    "text", ["mxint4", "mxfp4", "int4-asym@32:absmax:fp32", "nf4@64:absmax:fp32", "t5_3@channel:rms"]
)
@pytest.mark.parametrize("two_streams", [False, True])
def test_gram_matrices_give_the_codes_of_the_output_errors(text: str, two_streams: bool) -> None:
    weight, exact, fmt = weights(40, 192), inputs(192, 300), parse(text)
    quantised = exact + 0.05 * inputs(192, 300, 2) if two_streams else exact
    found = round_tensor(weight, fmt, statistics(quantised, exact if two_streams else None), PLAIN, 0)
    expected = directly(weight, exact, quantised, encode_nearest(weight, fmt))
    assert int((found.decode().double() != expected).sum()) <= 1


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [PLAIN, REFINED], ids=["plain", "refined"])
def test_orthogonal_inputs_and_no_inputs_are_rounding_to_nearest(
    text: str, dtype: torch.dtype, spec: RoundingSpec
) -> None:
    weight, fmt = weights(17, 128).to(dtype), parse(text)
    nearest = encode_nearest(weight, fmt)
    variances = torch.linspace(0.01, 3, 128, dtype=torch.float64)
    assert same(round_tensor(weight, fmt, Sensitivity(covariance=variances.diag()), spec, 0), nearest)
    assert same(round_tensor(weight, fmt, Sensitivity(covariance=torch.zeros(128, 128)), spec, 0), nearest)


@pytest.mark.parametrize("spec", [PLAIN, REFINED], ids=["plain", "refined"])
def test_few_tokens_are_rounding_to_nearest(spec: RoundingSpec) -> None:
    weight, fmt, known = weights(8, 64), parse("mxint4"), statistics(inputs(64, 100))
    assert same(round_tensor(weight, fmt, replace(known, tokens=255), spec, 0), encode_nearest(weight, fmt))
    few = round_tensor(weight, fmt, replace(known, tokens=256), spec, 0)
    assert same(few, round_tensor(weight, fmt, known, spec, 0))
    assert not same(few, encode_nearest(weight, fmt))


@given(seed=st.integers(0, 1000), power=st.integers(-40, 40))
@settings(max_examples=20, deadline=None)
def test_the_scale_of_the_inputs_changes_nothing(seed: int, power: int) -> None:
    weight, made = weights(5, 64, seed), inputs(64, 80, seed)
    exact = made + 0.1 * inputs(64, 80, seed + 1)
    found = round_tensor(weight, parse("mxfp4"), statistics(made, exact), REFINED, 0)
    scaled = round_tensor(weight, parse("mxfp4"), statistics(made * 2.0**power, exact * 2.0**power), REFINED, 0)
    assert same(found, scaled)


def test_an_input_that_is_always_zero_is_rounded_directly_and_the_others_as_if_it_were_not_there() -> None:
    weight, made = weights(30, 96), inputs(96, 200)
    made[40] = 0
    fmt = parse("int4-asym@channel:absmax:fp32")
    decoded = round_tensor(weight, fmt, statistics(made), PLAIN, 0).decode()
    assert torch.equal(decoded[:, 40], encode_nearest(weight, fmt).decode()[:, 40])
    assert torch.equal(decoded.double(), directly(weight, made, made, encode_nearest(weight, fmt)))


@pytest.mark.parametrize("text", [*FORMATS, "int4@32+rans", "int3@32+hadamard", "int3@32+rotate", "power3@channel"])
def test_output_errors_are_far_below_those_of_nearest_and_descent_lowers_them(text: str) -> None:
    weight, known, fmt = weights(64, 128), statistics(inputs(128, 600)), parse(text)
    assert known.covariance is not None
    nearest = encode_nearest(weight, fmt, seed=3)
    costs = []
    for encoded in (nearest, *(round_tensor(weight, fmt, known, spec, 3) for spec in (PLAIN, REFINED))):
        error = (encoded.decode() - weight).double()
        costs.append(float(((error @ known.covariance) * error).sum()))
        assert encoded.nbytes <= nearest.nbytes * 1.02
    assert costs[1] < 0.55 * costs[0]
    assert costs[2] < 0.7 * costs[1]


def test_two_streams_make_up_for_what_the_inputs_have_lost() -> None:
    weight, exact = weights(64, 128), inputs(128, 600)
    quantised = exact + 0.3 * inputs(128, 600, 5)
    one = round_tensor(weight, parse("mxint4"), statistics(quantised), REFINED, 0).decode().double()
    two = round_tensor(weight, parse("mxint4"), statistics(quantised, exact), REFINED, 0).decode().double()
    wanted = weight.double() @ exact
    assert float((two @ quantised - wanted).norm()) < 0.9 * float((one @ quantised - wanted).norm())


@pytest.mark.parametrize("option", ["", "+rotate", "+hadamard"])
def test_what_else_the_output_should_make_up_for_is_made_up_for(option: str) -> None:
    weight, made = weights(64, 128), inputs(128, 600)
    owed = 0.02 * inputs(64, 64, 7) @ inputs(64, 128, 8) @ made / 100
    known = replace(statistics(made), residual=owed @ made.T / 600)
    fmt = parse(f"int4@32{option}")
    wanted = weight.double() @ made + owed
    without = round_tensor(weight, fmt, statistics(made), REFINED, 1).decode().double() @ made
    found = round_tensor(weight, fmt, known, REFINED, 1).decode().double() @ made
    assert float((found - wanted).norm()) < 0.8 * float((without - wanted).norm())


@pytest.mark.parametrize("text", ["mxint4", "int4@32", "nf4@64", "t5_4@64:signmax"])
def test_scales_and_tables_are_those_of_nearest(text: str) -> None:
    weight, known = weights(16, 128), statistics(inputs(128, 300))
    found = round_tensor(weight, parse(text), known, REFINED, 0).parts()
    nearest = encode_nearest(weight, parse(text)).parts()
    assert found.keys() == nearest.keys()
    assert all(torch.equal(part, nearest[name]) for name, part in found.items() if name != "codes")


@pytest.mark.parametrize("shape", [(0, 32), (3, 1), (2, 3, 64), (33,), (5, 70)])
@pytest.mark.parametrize("text", ["mxint4", "int4@tensor", "int8@channel", "t5_2.58@64:signmax"])
def test_tensors_of_any_shape(shape: tuple[int, ...], text: str) -> None:
    weight = weights(1, int(np.prod(shape))).reshape(shape)
    columns = shape[-1]
    encoded = round_tensor(weight, parse(text), statistics(inputs(columns, 400)), REFINED, 0)
    read = EncodedTensor.from_parts(encoded.format, shape, "F32", encoded.parts())
    assert read.decode().shape == shape
    assert bool(torch.isfinite(read.decode()).all())


def test_rows_do_not_depend_on_each_other() -> None:
    weight, known, fmt = weights(9, 128), statistics(inputs(128, 300)), parse("mxfp4")
    alone = [round_tensor(row, fmt, known, REFINED, 0).decode() for row in weight]
    assert torch.equal(torch.stack(alone), round_tensor(weight, fmt, known, REFINED, 0).decode())


@pytest.mark.parametrize(
    "text", ["q4_k", "grid3@tensor", "lloyd4-rows@channel", "int4@32+outliers0.01", "int4@32+unbiased"]
)
def test_formats_without_fixed_scales_and_table_are_refused(text: str) -> None:
    with pytest.raises(InvalidFormat):
        round_tensor(weights(4, 256), parse(text), statistics(inputs(256, 300)), REFINED, 0)


@pytest.mark.parametrize("sensitivity", [Sensitivity(), Sensitivity(row_weights=torch.ones(4))])
def test_without_statistics_it_is_refused(sensitivity: Sensitivity) -> None:
    with pytest.raises(InvalidCheckpoint, match="no statistics"):
        round_tensor(weights(4, 64), parse("int4@32"), sensitivity, REFINED, 0)


def test_statistics_of_other_inputs_and_damaged_ones_are_refused() -> None:
    weight, fmt, good = weights(4, 64), parse("int4@32"), statistics(inputs(64, 300))
    with pytest.raises(InvalidFormat, match="covariance"):
        base.round_tensor(weight, fmt, REFINED, sensitivity=statistics(inputs(32, 300)), seed=0)
    with pytest.raises(InvalidFormat, match="cross"):
        base.round_tensor(weight, fmt, REFINED, sensitivity=replace(good, cross=torch.zeros(32, 32)), seed=0)
    with pytest.raises(InvalidFormat, match="residual"):
        base.round_tensor(weight, fmt, REFINED, sensitivity=replace(good, residual=torch.zeros(5, 64)), seed=0)
    with pytest.raises(InvalidCheckpoint, match="NaN"):
        base.round_tensor(
            weight, fmt, REFINED, sensitivity=Sensitivity(covariance=torch.full((64, 64), torch.nan)), seed=0
        )
    with pytest.raises(NonFiniteWeights):
        base.round_tensor(weight * torch.inf, fmt, REFINED, sensitivity=good, seed=0)
