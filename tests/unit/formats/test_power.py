"""Power grids: symmetric levels and, for rounding in the power domain, the cells between them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidFormat
from core.formats.power import power_edges, power_levels

CODES = st.integers(3, 300)
EXPONENTS = st.floats(0.2, 2.0)


def steps_of(codes: int) -> int:
    """L: for 2^b codes 2^(b-1) - 1."""
    return (codes - 1) // 2


@given(CODES, EXPONENTS)
def test_levels_are_the_decoded_codes(codes: int, alpha: float) -> None:
    last = steps_of(codes)
    decoded = [math.copysign((abs(k) / last) ** (1 / alpha), k) for k in range(-last, last + 1)]
    assert power_levels(codes, alpha) == pytest.approx(decoded, rel=1e-14)
    assert power_levels(codes, alpha) == tuple(-value for value in reversed(power_levels(codes, alpha)))


@given(CODES, EXPONENTS)
def test_edges_lie_between_levels_one_fewer_than_they(codes: int, alpha: float) -> None:
    levels, edges = np.asarray(power_levels(codes, alpha)), np.asarray(power_edges(codes, alpha))
    assert len(edges) == len(levels) - 1
    assert np.all((levels[:-1] < edges) & (edges < levels[1:]))


@given(st.integers(2, 8), EXPONENTS, st.floats(-1, 1))
def test_the_cell_of_a_weight_is_where_its_power_rounds_to(bits: int, alpha: float, weight: float) -> None:
    last = steps_of(2**bits)
    exact = last * abs(weight) ** alpha
    if abs(exact % 1 - 0.5) < 1e-9:
        return
    code = math.copysign(round(exact), weight)
    assert np.searchsorted(power_edges(2**bits, alpha), weight) - last == code


@given(st.integers(2, 10))
def test_exponent_one_is_the_symmetric_uniform_quantiser(bits: int) -> None:
    last = 2 ** (bits - 1) - 1
    assert power_levels(2**bits, 1.0) == tuple(k / last for k in range(-last, last + 1))
    assert power_edges(2**bits, 1.0) == tuple((2 * j + 1) / (2 * last) for j in range(-last, last))


@given(st.floats(1e-3, 1), st.floats(1e-3, 1), EXPONENTS)
def test_powers_keep_products_as_products(x: float, y: float, alpha: float) -> None:
    """Levels i/L and j/L multiply to level (i j)/L^2: the identity that the grid is made for."""
    assert (x * y) ** alpha == pytest.approx(x**alpha * y**alpha, rel=1e-12)
    fine = power_levels(2 * 7**2 + 1, alpha)[7**2 :]
    coarse = power_levels(2 * 7 + 1, alpha)[7:]
    for i in range(1, 8):
        for j in range(1, 8):
            assert coarse[i] * coarse[j] == pytest.approx(fine[i * j], rel=1e-12)


@given(CODES, EXPONENTS, st.integers(0, 2**32 - 1))
def test_the_nearest_level_is_never_worse_than_rounding_the_power(codes: int, alpha: float, seed: int) -> None:
    weights = np.random.default_rng(seed).uniform(-1, 1, 200)
    levels = np.asarray(power_levels(codes, alpha))
    rounded = levels[np.searchsorted(power_edges(codes, alpha), weights)]
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, weights)]
    assert np.all(np.abs(nearest - weights) <= np.abs(rounded - weights) + 1e-16)


@pytest.mark.parametrize(
    ("codes", "alpha"),
    [(2, 1.0), (0, 1.0), (16, 0.0), (16, -0.5), (16, math.nan), (16, math.inf), (16, 0.01), (4096, 1e4)],
)
def test_grids_that_are_none_are_refused(codes: int, alpha: float) -> None:
    with pytest.raises(InvalidFormat):
        power_levels(codes, alpha)


def test_edges_of_grids_without_levels_or_exponent_are_refused() -> None:
    for codes, alpha in [(2, 1.0), (16, 0.0), (16, math.nan)]:
        with pytest.raises(InvalidFormat):
            power_edges(codes, alpha)
