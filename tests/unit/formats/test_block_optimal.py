"""Optimal codebooks for any block size and number of codes: stationary, ascending, and better than what they replace.

Residuals and errors come from an oracle of its own (Gauss–Legendre over the block maximum), not from the solver.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidFormat
from core.formats.block_lloyd import MAX_CODES, Metric, block_lloyd_max, lloyd_max
from core.formats.block_optimal import absmax_float, block_optimal
from core.formats.limits import entropy_coded_grid, panter_dite, r_of_blocks
from core.formats.quantile import normal_float, student_float
from core.formats.root_density import codebook
from tests.golden.exact_error import Source
from tests.golden.exact_error import r_of_blocks as exact_r_of_blocks
from tests.golden.gaussian_block_error import block_error, midpoints, residuals

METRICS: tuple[Metric, ...] = get_args(Metric)
POWERS: dict[Metric, int] = {"mae": 1, "mse": 2}
BLOCKS = st.integers(2, 5000)
EVEN_CODES = st.integers(2, 32).map(lambda half: 2 * half)
SOURCES = st.one_of(
    st.sampled_from([("normal", None), ("laplace", None)]), st.tuples(st.just("t"), st.floats(2.5, 60.0))
)


def free(values: tuple[float, ...], *, signed: bool) -> list[int]:
    """Indices of the levels that are not fixed: all but 0 and the ends, of which signed scales fix one."""
    return [k for k in range(len(values) - 1) if values[k] != 0 and (signed or k > 0)]


@settings(max_examples=50)
@given(EVEN_CODES, BLOCKS, st.booleans(), st.sampled_from(METRICS))
def test_bof_levels_are_means_or_medians_of_their_cells(codes: int, block: int, signed: bool, metric: Metric) -> None:
    values = block_optimal(codes, block, signed=signed, metric=metric)
    assert len(values) == codes
    assert np.all(np.diff(values) > 0)
    assert (values[codes // 2 - 1], values[-1]) == (0.0, 1.0)
    assert values[0] > -1 if signed else values[0] == -1
    missed = residuals(values, block, POWERS[metric], metric)
    assert np.abs(missed[free(values, signed=signed)]).max(initial=0) < 1e-10


@settings(max_examples=50)
@given(EVEN_CODES, BLOCKS)
def test_signed_and_absolute_scales_have_the_same_positive_half(codes: int, block: int) -> None:
    for metric in METRICS:
        signed, absolute = (block_optimal(codes, block, signed=one, metric=metric) for one in (True, False))
        assert signed[codes // 2 - 1 :] == pytest.approx(absolute[codes // 2 - 1 :], abs=1e-12)


@settings(max_examples=50)
@given(EVEN_CODES, BLOCKS, st.sampled_from(["published", "l1"]))
def test_af_levels_are_medians_with_either_rule_for_the_zero(
    codes: int, block: int, rule: Literal["published", "l1"]
) -> None:
    values = absmax_float(codes, block, rule)
    assert len(values) == codes
    assert np.all(np.diff(values) > 0)
    zero = codes // 2 - 1
    assert (values[0], values[zero], values[-1]) == (-1.0, 0.0, 1.0)
    for side in (slice(0, zero + 1), slice(zero, codes)):
        edges = midpoints(values)
        if rule == "published":  # the cell next to 0 reaches 0, seen from either side
            edges[zero - 1 if side.start == 0 else zero] = 0.0
        missed = residuals(values, block, 0, "mae", edges.tolist())
        of_side = [k for k in free(values, signed=False) if side.start <= k < side.stop]
        assert np.abs(missed[of_side]).max(initial=0) < 1e-10


@settings(max_examples=25)
@given(BLOCKS)
def test_no_optimised_error_is_above_that_of_nf4(block: int) -> None:
    nf4 = normal_float(16)
    for metric in METRICS:
        signed, absolute = (block_optimal(16, block, signed=one, metric=metric) for one in (True, False))
        errors = [block_error(values, block, POWERS[metric]) for values in (signed, absolute, nf4)]
        assert errors[0] < errors[1] < errors[2]
    star = block_error(absmax_float(16, block, "l1"), block, 1, normalised=True)
    assert star < block_error(nf4, block, 1, normalised=True)


@settings(max_examples=25)
@given(BLOCKS, st.integers(0, 15), st.sampled_from([-1, 1]))
def test_moving_any_free_level_raises_the_error(block: int, index: int, direction: int) -> None:
    values = block_optimal(16, block, signed=True, metric="mse")
    if index not in free(values, signed=True):
        return
    moved = [value + 1e-4 * direction * (k == index) for k, value in enumerate(values)]
    assert block_error(moved, block, 2) > block_error(values, block, 2)


@pytest.mark.parametrize("codes", [4, 6, 16, 254, 256, MAX_CODES])
@pytest.mark.parametrize("block", [1, 2, 3, 4, 2048, 65536, 2**24])
def test_the_smallest_and_largest_blocks_and_codes_are_solved(codes: int, block: int) -> None:
    for metric in METRICS:
        for signed in (False, True):
            assert np.all(np.diff(block_optimal(codes, block, signed=signed, metric=metric)) > 0)
    assert np.all(np.diff(absmax_float(codes, block, "published")) > 0)


def test_a_code_of_four_levels_is_found_by_brute_force_too() -> None:
    """Absolute scale, -1, 0, c, 1: the only free level on a grid of a thousand."""
    grid = np.arange(1, 1000) / 1000
    errors = [block_error((-1.0, 0.0, c, 1.0), 32, 2) for c in grid]
    assert block_optimal(4, 32, signed=False, metric="mse")[2] == pytest.approx(grid[np.argmin(errors)], abs=1e-3)


@pytest.mark.parametrize("codes", [2, 3, 15, MAX_CODES + 2])
def test_impossible_numbers_of_codes_are_refused(codes: int) -> None:
    with pytest.raises(InvalidFormat):
        block_optimal(codes, 64, signed=True, metric="mse")
    with pytest.raises(InvalidFormat):
        absmax_float(codes, 64, "l1")


@settings(max_examples=30)
@given(SOURCES, st.sampled_from(["absmax", "signmax"]), st.integers(3, 24), BLOCKS)
def test_block_lloyd_max_is_not_worse_than_the_cube_root_codebook(
    source: tuple[str, float | None], statistic: str, codes: int, block: int
) -> None:
    values = block_lloyd_max(*source, statistic, codes, block)
    assert len(values) == codes
    assert np.all(np.diff(values) > 0)
    assert values[-1] == 1
    if statistic == "absmax":
        assert values == tuple(-value for value in reversed(values))
    start = codebook(*source, statistic, "sym" if codes % 2 or statistic == "absmax" else "", codes, block)
    assert r_of_blocks(*source, values, block) <= r_of_blocks(*source, start, block) * (1 + 1e-12)


@settings(max_examples=10)
@given(st.integers(0, 6), st.sampled_from([-1e-3, 1e-3]), st.floats(3, 12), st.integers(8, 300))
def test_moving_a_level_of_block_lloyd_max_raises_the_error(index: int, change: float, nu: float, block: int) -> None:
    values = block_lloyd_max("t", nu, "signmax", 8, block)
    moved = [value + change * (k == index) for k, value in enumerate(values)]
    source = Source(f"t{nu!r}")
    assert exact_r_of_blocks(source, moved, block, 8001) > exact_r_of_blocks(source, values, block, 8001)


@settings(max_examples=20)
@given(st.integers(2, 64), SOURCES)
def test_lloyd_max_levels_are_the_means_of_their_cells(codes: int, source: tuple[str, float | None]) -> None:
    values = np.asarray(lloyd_max(*source, codes))
    assert np.all(np.diff(values) > 0)
    assert np.array_equal(values, -values[::-1])
    family, nu = source
    edges = np.concatenate(([-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]))
    mass, first, _ = (np.diff(moment) for moment in Source(f"t{nu!r}" if nu else family).moments(edges))
    assert np.abs(first - values * mass).max() < 1e-10


@pytest.mark.parametrize(("family", "nu"), [("t", None), ("t", 2.0), ("cauchy", None)])
def test_sources_without_a_variance_are_refused(family: str, nu: float | None) -> None:
    with pytest.raises(InvalidFormat):
        panter_dite(family, nu)
    with pytest.raises(InvalidFormat):
        block_lloyd_max(family, nu, "absmax", 16, 64)


@pytest.mark.parametrize("bits", [0.0, -1.0, 15.0])
def test_grids_without_bits_or_with_too_many_are_refused(bits: float) -> None:
    with pytest.raises(InvalidFormat):
        entropy_coded_grid("normal", None, bits)


@given(st.integers(2, 500).map(lambda half: 2 * half), st.floats(0.5, 1e4))
def test_quantile_codebooks_ascend_from_minus_one_over_zero_to_one(codes: int, nu: float) -> None:
    for values in (normal_float(codes), student_float(codes, nu)):
        assert len(values) == codes
        assert np.all(np.diff(values) > 0)
        assert (values[codes // 2 - 1], values[-1]) == (0.0, 1.0)
        assert values[0] == -1


def test_sf_with_many_degrees_of_freedom_is_nf() -> None:
    assert student_float(32, 1e7) == pytest.approx(normal_float(32), abs=1e-6)


def test_quantile_codebooks_of_odd_size_or_without_freedom_are_refused() -> None:
    for codes in (2, 15):
        with pytest.raises(InvalidFormat):
            normal_float(codes)
    with pytest.raises(InvalidFormat):
        student_float(16, 0.0)
