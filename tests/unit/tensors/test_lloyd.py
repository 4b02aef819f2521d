"""Lloyd-Max codebooks: never worse than their start on the data itself, pinned at block maxima, reproducible."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.errors import InvalidFormat
from core.formats.root_density import codebook
from core.tensors.blocks import BlockGrid
from core.tensors.histogram import Histogram, scaled_histogram
from core.tensors.lloyd import lloyd, pinned_codes

STATISTICS = ("rms", "absmax", "signmax")


@pytest.fixture
def any_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def one_scale(count: int) -> BlockGrid:
    return BlockGrid(count, max(count, 1), max(count, 1), one_scale=True)


def scale_of(values: torch.Tensor, statistic: str) -> torch.Tensor:
    """The one scale of a tensor, fp32 (1,)."""
    if not values.numel():
        return torch.zeros(1)
    if statistic == "rms":
        return values.double().square().mean().sqrt().float()[None]
    extreme = values[values.abs().argmax()][None]
    return extreme if statistic == "signmax" else extreme.abs()


def start_of(statistic: str, codes: int, nu: float = 7.0) -> tuple[float, ...]:
    return codebook("t", nu, statistic, "" if statistic == "signmax" else "sym", codes, 64)


def histogram_of(values: torch.Tensor, statistic: str, weights: torch.Tensor | None = None) -> Histogram:
    return scaled_histogram(values, one_scale(values.numel()), scale_of(values, statistic), weights=weights)


def fitted(values: torch.Tensor, statistic: str, codes: int, weights: torch.Tensor | None = None) -> tuple[float, ...]:
    histogram = histogram_of(values, statistic, weights)
    return lloyd(histogram, start_of(statistic, codes), pinned=pinned_codes(statistic, codes))


def encoded_error(
    values: NDArray[np.float32], scale: np.float32, table: tuple[float, ...], weights: NDArray[np.float64] | float = 1.0
) -> float:
    """Weighted squared error of the coder's own arithmetic: fp32 thresholds, fp32 table, fp32 products."""
    sign = np.float32(-1 if scale < 0 else 1)
    limits = ((np.array(table[1:]) + np.array(table[:-1])) / 2 * abs(float(scale))).astype(np.float32)
    codes = (values[:, None] * sign > limits).sum(axis=1)
    decoded = np.array(table, dtype=np.float32)[codes] * scale
    return float((weights * (decoded.astype(np.float64) - values) ** 2).sum())


NUMBERS = st.floats(-1e3, 1e3, width=32).map(lambda x: x if abs(x) > 1e-3 else 0.0)


@given(
    values=st.lists(NUMBERS, max_size=40), statistic=st.sampled_from(STATISTICS), codes=st.sampled_from([4, 6, 8, 16])
)
@settings(max_examples=150, deadline=None)
def test_encoding_by_a_fit_is_never_worse_than_by_its_start(values: list[float], statistic: str, codes: int) -> None:
    data, start = torch.tensor(values, dtype=torch.float32), start_of(statistic, codes)
    found, scale = fitted(data, statistic, codes), scale_of(data, statistic).numpy()[0]
    assert encoded_error(data.numpy(), scale, found) <= encoded_error(data.numpy(), scale, start)
    stored = np.array(found, dtype=np.float32).tolist()
    assert stored == sorted(set(stored))
    assert all(found[index] == start[index] for index in pinned_codes(statistic, codes))


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("codes", [8, 16, 256])
def test_a_fit_to_many_weights_is_better_than_its_start(statistic: str, codes: int) -> None:
    data = torch.from_numpy(np.random.default_rng(2).standard_t(4, 100_000)).float()
    found, scale = fitted(data, statistic, codes), scale_of(data, statistic).numpy()[0]
    better = encoded_error(data.numpy(), scale, found)
    assert better < 0.999 * encoded_error(data.numpy(), scale, start_of(statistic, codes))
    assert np.array_equal(np.array(found, dtype=np.float32), found)


def plain_lloyd(ratios: NDArray[np.float64], start: tuple[float, ...], steps: int) -> tuple[float, ...]:
    table = np.array(start)
    for _ in range(steps):
        cells = np.searchsorted((table[1:] + table[:-1]) / 2, ratios)
        table = np.array([ratios[cells == code].mean() for code in range(len(table))])
    return tuple(table.tolist())


def test_codes_are_the_means_of_what_they_encode_and_as_good_as_lloyds_method_on_the_samples() -> None:
    data = torch.from_numpy(np.random.default_rng(3).standard_normal(20_000)).float()
    found, scale = fitted(data, "rms", 8), scale_of(data, "rms").numpy()[0]
    ratios = data.double().numpy() / scale
    assert plain_lloyd(ratios, found, 1) == pytest.approx(found, abs=2e-4)  # a bin is up to 2e-4 wide
    expected = encoded_error(data.numpy(), scale, plain_lloyd(ratios, start_of("rms", 8), 300))
    assert encoded_error(data.numpy(), scale, found) == pytest.approx(expected, rel=1e-3)


def test_an_error_counts_with_its_weight_once() -> None:
    data, weights = torch.tensor([-1.0, 0.25, 0.75, 1.0]), torch.tensor([1.0, 3.0, 1.0, 1.0])
    table = lloyd(histogram_of(data, "absmax", weights), (-1.0, 0.45, 1.0), pinned=frozenset({0, 2}))
    assert table == (-1.0, 0.25, 1.0)  # 0.75 is nearer to 1
    table = lloyd(histogram_of(data, "absmax", weights), (-1.0, 0.55, 1.2), pinned=frozenset({0, 2}))
    assert table == (-1.0, 0.375, 1.2)  # (3 * 0.25 + 0.75) / 4


@given(seed=st.integers(0, 10_000), statistic=st.sampled_from(STATISTICS))
@settings(max_examples=60, deadline=None)
def test_a_weighted_fit_is_never_worse_where_errors_count_by_weight(seed: int, statistic: str) -> None:
    generator = np.random.default_rng(seed)
    data = torch.from_numpy(generator.standard_t(4, 500)).float()
    weights, scale = generator.exponential(size=500) ** 3, scale_of(data, statistic).numpy()[0]
    start, found = start_of(statistic, 8), fitted(data, statistic, 8, torch.from_numpy(weights))
    assert encoded_error(data.numpy(), scale, found, weights) <= encoded_error(data.numpy(), scale, start, weights)


def test_weights_of_one_are_no_weights() -> None:
    data = torch.randn(5000, generator=torch.Generator().manual_seed(4))
    assert fitted(data, "rms", 16, torch.ones(5000)) == fitted(data, "rms", 16)


def test_a_weight_of_zero_removes_an_element() -> None:
    data = torch.randn(3000, generator=torch.Generator().manual_seed(5))
    kept, scale = torch.arange(3000) % 3 != 0, scale_of(data, "rms")
    weighted = scaled_histogram(data, one_scale(3000), scale, weights=kept.float())
    without = scaled_histogram(data[kept], one_scale(2000), scale)
    assert lloyd(weighted, start_of("rms", 16)) == lloyd(without, start_of("rms", 16))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_power_of_two_changes_no_codebook(statistic: str) -> None:
    data = torch.randn(4000, generator=torch.Generator().manual_seed(6))
    assert fitted(data * 2.0**-30, statistic, 8) == fitted(data, statistic, 8) == fitted(data * 2.0**20, statistic, 8)


@pytest.mark.usefixtures("any_number_of_threads")
def test_fits_do_not_depend_on_threads() -> None:
    data = torch.randn(300_000, generator=torch.Generator().manual_seed(7))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        histogram = histogram_of(data, "absmax")
        found.append((histogram.mass_below.tobytes(), histogram.first_below.tobytes(), fitted(data, "absmax", 16)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("values", [[], [0.0] * 9, [-0.0], [3.5], [-2.0] * 7, [1e-40, -3e-41], [3e38, 1.0]], ids=str)
def test_odd_tensors_give_an_ascending_codebook_without_warnings(values: list[float], statistic: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fitted(torch.tensor(values, dtype=torch.float32), statistic, 8)
    assert np.isfinite(found).all()
    assert list(found) == sorted(set(found))
    if not any(values):
        assert found == start_of(statistic, 8)


def test_empty_cells_keep_their_codes() -> None:
    data = torch.tensor([0.9, 1.0, 1.1, 0.05])
    start = (-1.5, -0.5, 0.5, 1.5)
    found = lloyd(histogram_of(data, "rms"), start)
    assert found[:2] == start[:2]
    assert found[2:] != start[2:]


def test_a_start_that_does_not_ascend_is_refused() -> None:
    with pytest.raises(InvalidFormat, match="ascend"):
        lloyd(histogram_of(torch.ones(3), "rms"), (-1.0, 0.0, 0.0, 1.0))
