"""Choosing a format's parameters on a histogram: as good as encoding with every candidate, with a rule for ties."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.errors import InvalidFormat, NonFiniteWeights
from core.formats import floating, root_density
from core.formats.power import power_levels
from core.tensors import fit as fits
from core.tensors.blocks import BlockGrid
from core.tensors.histogram import Histogram, midpoints, scaled_histogram

Vector = NDArray[np.float64]


def one_scale(count: int) -> BlockGrid:
    return BlockGrid(count, max(count, 1), max(count, 1), one_scale=True)


def heavy(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(5, count)).float()


def block_scales(values: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    return grid.to_blocks(values).abs().amax(dim=1)


def histogram_of_blocks(values: torch.Tensor, width: int, columns: int) -> Histogram:
    grid = BlockGrid(values.numel(), columns, width)
    return scaled_histogram(values, grid, block_scales(values, grid))


def nearest_error(ratios: Vector, weights: Vector, table: Vector) -> float:
    """Weighted squared error of the nearest values, by comparing with all of them."""
    return float((weights * np.abs(ratios[:, None] - table).min(axis=1) ** 2).sum())


@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 300),
    table=st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=12, unique=True).map(sorted),
)
@settings(max_examples=80, deadline=None)
def test_the_histogram_bounds_the_error_of_any_table(seed: int, count: int, table: list[float]) -> None:
    generator = np.random.default_rng(seed)
    values = torch.from_numpy(generator.standard_normal(count)).float()
    weights = torch.from_numpy(generator.random(count))
    histogram = scaled_histogram(values, one_scale(count), torch.tensor([2.0]), weights=weights)
    levels = np.array(table)
    true = nearest_error(values.double().numpy() / 2, 4 * weights.numpy(), levels)
    above, slack = float(histogram.error(levels)), histogram.slack(levels)
    rounding = 1e-12 * (true + histogram.power)
    assert above - slack - rounding <= true <= above + rounding


@pytest.mark.parametrize(("codes", "within"), [(16, 1e-5), (256, 1e-4)])
def test_the_histogram_knows_r_closely(codes: int, within: float) -> None:
    values = heavy(200_000)
    grid = BlockGrid(200_000, 200_000, 64)
    ratios = grid.from_blocks(grid.to_blocks(values) / block_scales(values, grid)[:, None]).double().numpy()
    weights = np.repeat(block_scales(values, grid).double().numpy() ** 2, 64)
    table = np.array(root_density.codebook("t", 5.0, "absmax", "asym", codes, 64))
    cells = np.searchsorted(midpoints(table), ratios)
    true = np.sqrt((weights * (ratios - table[cells]) ** 2).sum() / (weights * ratios**2).sum())
    histogram = histogram_of_blocks(values, 64, 200_000)
    assert float(histogram.r(table)) == pytest.approx(true, rel=within)
    assert float(histogram.r(table)) >= true * (1 - 1e-9)


@pytest.mark.parametrize(("columns", "width"), [(24, 8), (17, 5), (10, 16), (1, 1)])
def test_ragged_blocks_count_their_elements_only(columns: int, width: int) -> None:
    values = heavy(columns * 6)
    grid = BlockGrid(values.numel(), columns, min(width, columns))
    scales = block_scales(values, grid)
    histogram = scaled_histogram(values, grid, scales)
    spread = grid.from_blocks(scales[:, None].expand(-1, grid.width).contiguous()).double()
    assert histogram.mass_below[-1] == pytest.approx(float(spread.square().sum()), rel=1e-12)
    assert histogram.power == pytest.approx(float(values.double().square().sum()), rel=1e-6)


def test_row_and_column_sensitivities_multiply() -> None:
    values, grid = heavy(400_000).abs(), BlockGrid(400_000, 1000, 64)
    rows, columns = torch.rand(400).double(), torch.rand(1000).double()
    scales = block_scales(values, grid)
    apart = scaled_histogram(values, grid, scales, weights=(rows, columns))
    whole = scaled_histogram(values, grid, scales, weights=torch.outer(rows, columns))
    assert apart.power == whole.power
    assert np.array_equal(apart.first_below, whole.first_below)


def test_blocks_of_scale_zero_do_not_count() -> None:
    values = torch.tensor([0.0, 0.0, 1.0, -2.0])
    histogram = scaled_histogram(values, BlockGrid(4, 2, 2), torch.tensor([0.0, 2.0]))
    assert histogram.mass_below[-1] == 8.0
    assert histogram.power == 5.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_refused(bad: float) -> None:
    values, sensible = torch.tensor([1.0, bad]), torch.tensor([1.0, 2.0])
    with pytest.raises(NonFiniteWeights):
        scaled_histogram(values, one_scale(2), torch.ones(1))
    with pytest.raises(NonFiniteWeights):
        scaled_histogram(sensible, one_scale(2), torch.ones(1), weights=values)
    with pytest.raises(NonFiniteWeights, match="negative"):
        scaled_histogram(sensible, one_scale(2), torch.ones(1), weights=torch.tensor([1.0, -1.0]))
    with pytest.raises(NonFiniteWeights):
        fits.fit_student_t(values)


def test_sensitivities_of_another_size_are_refused() -> None:
    with pytest.raises(InvalidFormat, match="3 x 2 sensitivities for 4"):
        scaled_histogram(torch.ones(4), one_scale(4), torch.ones(1), weights=(torch.ones(3), torch.ones(2)))


@pytest.mark.parametrize(("statistic", "mode"), [("rms", "sym"), ("absmax", "asym"), ("signmax", "")])
def test_no_other_candidate_errs_less(statistic: str, mode: str) -> None:
    values = heavy(20_000, 1)
    scale = values.square().mean().sqrt() if statistic == "rms" else values.abs().max()
    histogram = scaled_histogram(values, one_scale(20_000), scale[None])
    ratios, equal = (values / scale).double().numpy(), np.ones(20_000)
    found = fits.fit_nu(histogram, statistic, mode, 8, 64)

    def error(nu: float, factor: float) -> float:
        table = np.array(root_density.codebook("t", nu, statistic, mode, 8, None if statistic == "rms" else 64))
        return nearest_error(ratios, equal, factor * table)

    factors = fits.MULTIPLIERS if statistic == "rms" else (1.0,)
    least = min(error(nu, factor) for nu in fits.NUS for factor in factors)
    assert error(found.parameter, found.multiplier) == pytest.approx(least, rel=1e-6)
    assert found.r == pytest.approx(np.sqrt(least / (ratios**2).sum()), rel=1e-5)


def test_of_equal_candidates_the_smallest_and_the_multiplier_nearest_to_one_are_taken() -> None:
    histogram = histogram_of_blocks(heavy(64), 64, 64)
    assert fits.fit_nu(histogram, "absmax", "sym", 2, 64).parameter == 3  # always -1 and 1
    assert fits.fit_alpha(histogram, 4).parameter == 0.2  # always -1, 0 and 1
    nothing = histogram_of_blocks(torch.zeros(64), 64, 64)
    assert fits.fit_nu(nothing, "rms", "sym", 16) == fits.Fit(3.0, 1.0, 0.0)
    assert fits.fit_exponent_bits(nothing, 4) == fits.Fit(1, 1.0, 0.0)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("mode", ["", "ns", "ieee"])
def test_data_of_a_float_get_their_own_exponent_bits(bits: int, mode: str) -> None:
    for exponent_bits in range(2, min(bits - 1, 4) + 1):
        numbers = floating.values(exponent_bits, bits - 1 - exponent_bits, mode)
        values = torch.tensor(numbers, dtype=torch.float32)
        found = fits.fit_exponent_bits(histogram_of_blocks(values, len(numbers), len(numbers)), bits, mode=mode)
        assert found.r < 1e-6
        assert found.parameter <= exponent_bits
        assert found.parameter == exponent_bits or len(numbers) <= 7


def test_floats_need_three_bits() -> None:
    with pytest.raises(InvalidFormat, match="2 bits"):
        fits.fit_exponent_bits(histogram_of_blocks(heavy(8), 8, 8), 2, mode="ns")


@pytest.mark.parametrize("rounding", ["nearest", "power"])
@pytest.mark.parametrize("alpha", [0.2, 0.55, 0.73, 1.0, 1.2])
def test_data_of_a_power_grid_get_their_own_exponent(alpha: float, rounding: str) -> None:
    values = torch.tensor(power_levels(16, alpha), dtype=torch.float32)
    found = fits.fit_alpha(histogram_of_blocks(values, 15, 15), 16, rounding=rounding)
    assert found.parameter == alpha
    assert found.r < 1e-6


def test_maximum_likelihood_follows_the_scale_of_the_data() -> None:
    values = heavy(50_000, 2)
    nu, scale = fits.fit_student_t(values)
    assert fits.fit_student_t(values * 2.0**-40) == (nu, scale * 2.0**-40)


def test_maximum_likelihood_tells_a_normal_from_a_heavy_tail() -> None:
    normal = torch.randn(50_000, generator=torch.Generator().manual_seed(8))
    nu, scale = fits.fit_student_t(normal)
    assert nu > 40
    assert scale == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("values", [[], [0.0], [0.0] * 5, [2.0], [3.0] * 6, [0.0] * 99 + [1.0], [1e-40]], ids=str)
def test_odd_tensors_are_fitted_without_warnings(values: list[float]) -> None:
    data = torch.tensor(values, dtype=torch.float32)
    histogram = scaled_histogram(data, one_scale(len(values)), torch.tensor([max([*values, 0.0])]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nu, scale = fits.fit_student_t(data)
        found = fits.fit_nu(histogram, "absmax", "asym", 16, 64)
    assert 3 <= nu <= 100
    assert np.isfinite(scale)
    assert np.isfinite([found.parameter, found.r]).all()
    if not any(values):
        assert (nu, scale) == (7.0, 0.0)
