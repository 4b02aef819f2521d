"""Codebooks of rows: the least error that any values give, in counted bytes, decoded exactly; weighted by sensitivity.

Oracles: all partitions of sorted values, Lloyd's iterations from many starts, numpy's percentiles.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.errors import InvalidCheckpoint, InvalidFormat, NonFiniteWeights
from core.formats.catalogue import describe
from core.formats.stored import stored_parts
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import parse
from core.rounding.base import Sensitivity
from core.rounding.squeezellm import round_tensor
from core.tensors.encoded import EncodedTensor
from core.tensors.kmeans_jit import best_codebooks
from core.tensors.nearest import encode_nearest
from core.tensors.outliers import select_by_iqr

Doubles = NDArray[np.float64]
SPEC = RoundingSpec()


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    chance = np.random.default_rng(seed)
    return torch.from_numpy(0.02 * chance.standard_t(5, (rows, columns))).float()


def error_of(values: Doubles, counts: Doubles, codebook: Doubles) -> float:
    """Weighted squared error of every value at its nearest code."""
    return float((counts * ((values[:, None] - codebook) ** 2).min(axis=1)).sum())


def least_error(values: Doubles, counts: Doubles, clusters: int) -> float:
    """The least over all ways to cut the ascending values into runs."""
    best = np.inf
    for cuts in combinations(range(1, len(values)), min(clusters, len(values)) - 1):
        total = 0.0
        for low, high in zip((0, *cuts), (*cuts, len(values)), strict=True):
            mass = counts[low:high].sum()
            mean = (counts[low:high] * values[low:high]).sum() / mass if mass else 0.0
            total += float((counts[low:high] * (values[low:high] - mean) ** 2).sum())
        best = min(best, total)
    return best


def lloyds(values: Doubles, counts: Doubles, start: Doubles) -> Doubles:
    """Lloyd's iterations from that codebook."""
    codes = np.sort(start)
    for _ in range(60):
        cell = np.abs(values[:, None] - codes).argmin(axis=1)
        for k in range(len(codes)):
            if counts[cell == k].sum() > 0:
                codes[k] = np.average(values[cell == k], weights=counts[cell == k])
    return codes


def best(values: Doubles, counts: Doubles, clusters: int) -> Doubles:
    """By the compiled loops, (rows, clusters)."""
    found = np.empty((len(values), clusters))
    best_codebooks(values, counts, found)
    return found


@st.composite
def rows_of_values(draw: st.DrawFn) -> tuple[Doubles, Doubles, int]:
    """Rows of few values, ties and zero weights among them, and a number of clusters."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    numbers = st.integers(-6, 6) | st.floats(-3, 3).map(lambda one: round(one, 3))
    values = [sorted(draw(st.lists(numbers, min_size=columns, max_size=columns))) for _ in range(rows)]
    counts = [draw(st.lists(st.integers(0, 3), min_size=columns, max_size=columns)) for _ in range(rows)]
    return np.array(values, np.float64), np.array(counts, np.float64), draw(st.integers(1, 6))


@given(case=rows_of_values())
@settings(max_examples=400, deadline=None)
def test_no_codebook_of_a_row_errs_less(case: tuple[Doubles, Doubles, int]) -> None:
    values, counts, clusters = case
    for row, codebook in enumerate(best(values, counts, clusters)):
        counting = counts[row] if counts[row].sum() else np.ones(values.shape[1])
        expected = least_error(values[row], counting, clusters)
        assert error_of(values[row], counting, codebook) == pytest.approx(expected, abs=1e-9)
        assert (np.diff(codebook) >= 0).all()


@pytest.mark.parametrize("clusters", [2, 3, 8, 16])
def test_lloyd_from_many_starts_is_never_better(clusters: int) -> None:
    chance = np.random.default_rng(clusters)
    values, counts = np.sort(chance.standard_t(4, (4, 300)), axis=1), chance.exponential(1, (4, 300)) ** 3
    for row, codebook in enumerate(best(values, counts, clusters)):
        found = error_of(values[row], counts[row], codebook)
        starts = [chance.choice(values[row], clusters, replace=False) for _ in range(20)]
        tried = [error_of(values[row], counts[row], lloyds(values[row], counts[row], start)) for start in starts]
        assert found <= min(tried) * (1 + 1e-9)


def test_every_code_is_the_mean_of_what_it_encodes_up_to_fp16() -> None:
    weight = weights(3, 700)
    encoded = encode_nearest(weight, parse("lloyd3-rows@channel"))
    codes = encoded.all_codes().reshape(3, 700).numpy()
    values = encoded.table.numpy() * encoded.scale_values.numpy()[:, None]
    for row in range(3):
        for k in range(8):
            mean = weight[row].double().numpy()[codes[row] == k].mean()
            assert values[row, k] == pytest.approx(mean, abs=2.0**-11 * float(encoded.scale_values[row]))


@pytest.mark.parametrize("text", ["lloyd4-rows@channel", "lloyd2.58-rows@channel:fp32", "lloyd8-rows@channel:e8m0"])
@pytest.mark.parametrize("shape", [(5, 96), (1, 3), (2, 3, 31), (7,), (4, 1)])
def test_weights_take_the_nearest_value_of_their_row_and_are_decoded_from_the_parts(
    text: str, shape: tuple[int, ...]
) -> None:
    weight = weights(1, int(np.prod(shape))).reshape(shape)
    encoded = encode_nearest(weight, parse(text))
    values = (encoded.table * encoded.scale_values[:, None]).double()
    distances = (weight.reshape(len(values), -1, 1).double() - values[:, None]).abs().min(dim=2).values
    decoded = EncodedTensor.from_parts(parse(text), shape, "F32", encoded.parts()).decode()
    assert torch.equal((decoded.double() - weight.double()).abs().reshape(distances.shape), distances)
    assert torch.equal(encoded.decode(torch.bfloat16), decoded.bfloat16())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_codebook_of_fp16_and_one_scale_are_all_that_a_row_costs(bits: int) -> None:
    rows, columns = 16, 512
    fmt = parse(f"lloyd{bits}-rows@channel")
    encoded = encode_nearest(weights(rows, columns), fmt)
    assert encoded.nbytes * 8 == rows * (columns * bits + 16 * 2**bits + 16)
    parts = {name: (tuple(part.shape), part.element_size()) for name, part in encoded.parts().items()}
    assert parts["codebook"] == ((rows, 2**bits), 2)
    assert stored_parts(fmt, (rows, columns))["codebook"] == ("F16", (rows, 2**bits))
    assert f"{16 * 2**bits} bits a row" in describe(fmt)["not_counted"]


def test_rows_of_few_different_weights_are_exact() -> None:
    weight = torch.tensor([[0.5, -0.25, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0], [-2.0, -2.0, -2.0, -2.0]])
    assert torch.equal(encode_nearest(weight, parse("lloyd2-rows@channel")).decode(), weight)


@pytest.mark.parametrize("magnitude", [1e-38, 1e-6, 1e6, 3e38])
def test_weights_of_any_magnitude_have_the_codebook_of_their_shape(magnitude: float) -> None:
    weight = weights(4, 256)
    scaled = (weight / weight.abs().max()).double() * magnitude
    encoded = encode_nearest(scaled.float(), parse("lloyd4-rows@channel:e8m0"))
    error = (encoded.decode().double() - scaled).norm() / scaled.norm()
    assert float(error) < 0.1
    assert bool(torch.isfinite(encoded.table).all())


def test_a_codebook_for_every_row_errs_less_than_one_for_all() -> None:
    weight = weights(64, 1024) * torch.logspace(-1, 1, 64)[:, None] + torch.linspace(-0.1, 0.1, 64)[:, None]
    by_rows = encode_nearest(weight, parse("lloyd4-rows@channel")).decode()
    shared = encode_nearest(weight, parse("lloyd4@channel")).decode()
    assert float((by_rows - weight).norm()) < 0.8 * float((shared - weight).norm())


@pytest.mark.parametrize("option", ["rans", "huffman", "hadamard", "rotate", "unbiased", "outliers0.01", "iqr1.5"])
def test_options_go_with_codebooks_of_rows(option: str) -> None:
    weight = weights(32, 256)
    encoded = encode_nearest(weight, parse(f"lloyd4-rows@channel+{option}"), seed=3)
    read = EncodedTensor.from_parts(encoded.format, encoded.shape, encoded.dtype, encoded.parts())
    assert torch.equal(read.decode(), encoded.decode())
    assert float((encoded.decode() - weight).norm() / weight.norm()) < 0.1
    if option in ("rans", "huffman"):
        assert torch.equal(encoded.decode(), encode_nearest(weight, parse("lloyd4-rows@channel")).decode())


def test_outliers_that_are_set_aside_have_no_part_in_the_codebook() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 1000.0]])
    encoded = encode_nearest(weight, parse("lloyd2-rows@channel:fp32+outliers0.13"))
    values = sorted((encoded.table[0] * encoded.scale_values[0]).tolist())
    assert error_of(np.arange(1.0, 8.0), np.ones(7), np.array(values)) == pytest.approx(
        least_error(np.arange(1.0, 8.0), np.ones(7), 4), rel=2e-3
    )
    assert float(encoded.decode()[0, 7]) == 1000.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded_as_their_numbers_are(dtype: torch.dtype) -> None:
    weight = weights(8, 128).to(dtype)
    found = encode_nearest(weight, parse("lloyd3-rows@channel"))
    assert torch.equal(found.decode(), encode_nearest(weight.float(), parse("lloyd3-rows@channel")).decode())


def test_the_number_of_threads_changes_nothing() -> None:
    weight, before = weights(900, 1024), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = encode_nearest(weight, parse("lloyd2-rows@channel"))
        torch.set_num_threads(3)
        together = encode_nearest(weight, parse("lloyd2-rows@channel"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(part, together.parts()[name]) for name, part in alone.parts().items())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lloyd4-rows@64", "scale for every row"),
        ("lloyd4-rows@tensor", "scale for every row"),
        ("lloyd4-rows@channel:search", "search does not apply"),
        ("lloyd4-rows@channel:rms", "rms does not apply"),
        ("lloyd4-rows@channel:e4m3", "e4m3 scales"),
        ("lloyd9-rows@channel", "up to 256 codes"),
        ("lloyd4-rows@channel+iqr0", "positive multiple"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(InvalidFormat, match=reason):
        parse(text)


def test_damaged_weights_and_damaged_parts_are_refused() -> None:
    fmt = parse("lloyd2-rows@channel")
    with pytest.raises(NonFiniteWeights, match=r"\[0, 1\]"):
        encode_nearest(torch.tensor([[1.0, float("nan"), 2.0]]), fmt)
    encoded = encode_nearest(weights(4, 64), fmt)
    with pytest.raises(InvalidCheckpoint, match="codebook"):
        EncodedTensor.from_parts(fmt, (4, 64), "F32", encoded.parts() | {"codebook": torch.zeros(4, dtype=torch.half)})


# The rounding method


def covariance(columns: int, seed: int = 1) -> torch.Tensor:
    chance = np.random.default_rng(seed)
    inputs = chance.standard_normal((4 * columns, columns)) * chance.exponential(1, columns) ** 2
    return torch.from_numpy(inputs.T @ inputs / len(inputs))


@given(seed=st.integers(0, 50), bits=st.sampled_from([2, 3]))
@settings(max_examples=20, deadline=None)
def test_sensitive_weights_err_less_than_by_nearest(seed: int, bits: int) -> None:
    weight, spread = weights(6, 96, seed), covariance(96, seed)
    fmt = parse(f"lloyd{bits}-rows@channel")

    def cost(encoded: EncodedTensor) -> float:
        return float(((encoded.decode().double() - weight.double()) ** 2 @ spread.diagonal()).sum())

    found = round_tensor(weight, fmt, Sensitivity(covariance=spread), SPEC, 0)
    assert cost(found) <= cost(encode_nearest(weight, fmt)) * (1 + 1e-4)


def test_inputs_that_are_always_zero_count_nothing() -> None:
    weight = weights(5, 64)
    spread = torch.eye(64, dtype=torch.float64)
    spread[60:, 60:] = 0
    fmt = parse("lloyd3-rows@channel:fp32")
    found = round_tensor(weight, fmt, Sensitivity(covariance=spread), SPEC, 0)
    changed = weight.clone()
    changed[:, 60:] = 0.25 * weight[:, 60:].sign() * weight[:, :60].abs().amax(dim=1, keepdim=True)
    scaled = weight.abs().amax(dim=1) == weight[:, :60].abs().amax(dim=1)
    again = round_tensor(changed, fmt, Sensitivity(covariance=spread), SPEC, 0)
    assert torch.equal(found.table[scaled], again.table[scaled])
    assert bool(scaled.any())


@pytest.mark.parametrize(
    "sensitivity",
    [None, Sensitivity(), Sensitivity(row_weights=torch.arange(5.0)), Sensitivity(covariance=torch.zeros(64, 64))],
)
def test_without_knowledge_of_the_inputs_it_is_nearest_rounding(sensitivity: Sensitivity | None) -> None:
    weight, fmt = weights(5, 64), parse("lloyd3-rows@channel")
    assert torch.equal(round_tensor(weight, fmt, sensitivity, SPEC, 0).decode(), encode_nearest(weight, fmt).decode())


@pytest.mark.parametrize("text", ["int4@32", "q4_k", "lloyd4@tensor:rms", "lloyd4-rows@channel+rotate"])
def test_other_formats_and_rotated_ones_are_rounded_to_nearest(text: str) -> None:
    weight = weights(4, 256)
    found = round_tensor(weight, parse(text), Sensitivity(covariance=covariance(256)), SPEC, 7)
    assert torch.equal(found.decode(), encode_nearest(weight, parse(text), seed=7).decode())


def test_a_covariance_of_other_inputs_is_refused() -> None:
    with pytest.raises(InvalidFormat, match="8 inputs for 64"):
        round_tensor(weights(4, 64), parse("lloyd3-rows@channel"), Sensitivity(covariance=torch.eye(8)), SPEC, 0)


# Outliers by quartiles


@given(
    numbers=st.lists(st.floats(-1e6, 1e6, width=32) | st.integers(-3, 3).map(float), max_size=60),
    multiple=st.sampled_from([0.5, 1.5, 2.0]),
)
@settings(max_examples=300, deadline=None)
def test_outliers_by_quartiles_are_those_of_the_definition(numbers: list[float], multiple: float) -> None:
    values = np.array(numbers, np.float32)
    q1, q3 = np.percentile(values.astype(np.float64), [25, 75]) if numbers else (0.0, 0.0)
    limit = max(abs(q1 - multiple * (q3 - q1)), abs(q3 + multiple * (q3 - q1))) if q3 > q1 else np.inf
    expected = np.nonzero(np.abs(values.astype(np.float64)) > limit * (1 + 1e-12))[0].tolist()
    allowed = np.nonzero(np.abs(values.astype(np.float64)) > limit * (1 - 1e-12))[0].tolist()
    found = select_by_iqr(torch.from_numpy(values), multiple).tolist()
    assert set(expected) <= set(found) <= set(allowed)
    assert found == sorted(found)
