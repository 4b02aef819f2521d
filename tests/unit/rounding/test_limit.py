"""Reverse waterfilling: closed forms, an independent bisection, and the properties of a rate-distortion function."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.rounding.limit import SHAPE_GAP, Limit, distortion_at, mean_square, predicted_gap, rate_at

_EXPONENTS = st.lists(st.floats(-20, 20), min_size=1, max_size=12)
_RATES = st.floats(0.001, 12)


def _by_bisection(variances: np.ndarray, rate: float) -> float:
    low, high = 1e-30, float(variances.max())
    for _ in range(300):
        level = (low * high) ** 0.5
        found = np.mean(0.5 * np.log2(np.maximum(1, variances / level)))
        low, high = (level, high) if found > rate else (low, level)
    return float(np.mean(np.minimum(variances, level)))


@pytest.mark.parametrize("rate", [0.1, 0.7, 2.0, 4.25])
def test_the_closed_form_equals_bisection_on_the_water_level(rate: float) -> None:
    variances = np.random.default_rng(3).gamma(0.5, size=37)
    assert distortion_at(variances, rate) == pytest.approx(_by_bisection(variances, rate), rel=1e-10)


@given(_EXPONENTS, st.integers(0, 5), _RATES)
def test_rate_is_the_inverse_of_distortion(exponents: list[float], zeros: int, rate: float) -> None:
    variances = np.append(np.exp2(exponents), np.zeros(zeros))
    assert rate_at(variances, distortion_at(variances, rate)) == pytest.approx(rate, rel=1e-9, abs=1e-10)


@given(_EXPONENTS, st.floats(0.001, 0.999))
def test_distortion_is_the_inverse_of_rate(exponents: list[float], share: float) -> None:
    variances = np.exp2(exponents)
    distortion = share * float(variances.mean())
    assert distortion_at(variances, rate_at(variances, distortion)) == pytest.approx(distortion, rel=1e-9)


@given(_EXPONENTS, _RATES, _RATES)
def test_distortion_falls_and_is_convex_in_the_rate(exponents: list[float], one: float, other: float) -> None:
    variances = np.exp2(exponents)
    low, high = sorted((one, other))
    at_low, between, at_high = (distortion_at(variances, rate) for rate in (low, (low + high) / 2, high))
    assert at_low * (1 + 1e-12) >= between >= at_high * (1 - 1e-12)
    assert between <= (at_low + at_high) / 2 * (1 + 1e-12)


@given(_EXPONENTS, _RATES, st.floats(1e-6, 1e6))
def test_distortion_has_the_unit_of_the_variances_and_no_order_of_them(
    exponents: list[float], rate: float, unit: float
) -> None:
    variances = np.exp2(exponents)
    assert distortion_at(unit * variances[::-1], rate) == pytest.approx(
        unit * distortion_at(variances, rate), rel=1e-10
    )


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0, 4.25, 16.0])
def test_equal_variances_are_one_gaussian(rate: float) -> None:
    assert distortion_at(np.full(7, 0.3), rate) == pytest.approx(0.3 * 4**-rate, rel=1e-12)
    assert rate_at(np.full(7, 0.3), 0.3 * 4**-rate) == pytest.approx(rate, abs=1e-12)


def test_at_high_rate_only_the_determinant_counts() -> None:
    variances = np.array([4.0, 1.0, 0.25, 0.5])
    assert distortion_at(variances, 5) == pytest.approx(np.prod(variances) ** 0.25 * 4**-5, rel=1e-12)


@pytest.mark.parametrize("correlation", [0.5, 0.9, 0.99])
def test_autoregressive_inputs_have_their_closed_forms(correlation: float) -> None:
    """L_11 = 1 and L_ii^2 = 1 - r^2, so that det = (1 - r^2)^(n - 1)."""
    n, rest = 12, 1 - correlation**2
    places = np.arange(n)
    covariance = correlation ** np.abs(places[:, None] - places)
    limit = Limit.of(np.ones((1, n)), covariance)
    assert limit.distortion_at(10) == pytest.approx(rest ** ((n - 1) / n) * 4**-10, rel=1e-10)
    arithmetic, geometric = (1 + (n - 1) * rest) / n, rest ** ((n - 1) / n)
    diagonal = np.diag(np.linalg.cholesky(covariance))
    assert predicted_gap(diagonal) == pytest.approx(SHAPE_GAP + math.log2(arithmetic / geometric) / 2, abs=1e-12)


def test_steps_in_proportion_leave_only_the_shape_of_the_cells() -> None:
    assert predicted_gap(np.full(5, 0.01)) == pytest.approx(SHAPE_GAP, abs=1e-13)
    assert pytest.approx(0.2546143348) == SHAPE_GAP


def test_no_bits_leave_all_of_the_variance_and_more_distortion_needs_none() -> None:
    variances = [3.0, 1.0, 0.0]
    assert distortion_at(variances, 0) == pytest.approx(4 / 3)
    assert rate_at(variances, 4 / 3) == 0.0
    assert rate_at(variances, 2.0) == 0.0


def test_components_without_variance_cost_nothing() -> None:
    assert distortion_at([1.0, 0.0], 1) == pytest.approx(0.5 * 2**-4)
    assert distortion_at([0.0, 0.0, 0.0], 1) == 0.0
    assert rate_at([0.0, 0.0], 0.0) == 0.0


def test_only_an_exact_copy_has_no_distortion() -> None:
    assert rate_at([1.0, 0.0], 0.0) == math.inf
    assert rate_at([1.0], -1e-20) == math.inf
    assert distortion_at([1.0, 2.0], math.inf) == 0.0


@pytest.mark.parametrize("variances", [[], [-1.0, 2.0], [math.nan], [math.inf, 1.0]])
def test_what_is_no_variance_is_refused(variances: list[float]) -> None:
    with pytest.raises(ValueError, match="variances"):
        distortion_at(variances, 1)
    with pytest.raises(ValueError, match="variances"):
        rate_at(variances, 1)


@pytest.mark.parametrize("rate", [-0.1, math.nan])
def test_what_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        distortion_at([1.0], rate)


def test_a_gap_is_bits_above_the_limit_and_none_where_the_limit_says_nothing() -> None:
    limit = Limit(np.array([2.0, 1.0]))
    assert limit.gap(3.25, limit.distortion_at(3)) == pytest.approx(0.25)
    assert limit.gap(3, 0.0) is None
    assert Limit(np.zeros(2)).gap(3, 0.0) is None


def test_small_negative_eigenvalues_count_as_none() -> None:
    found = Limit.of(np.full((3, 2), 2.0), np.diag([1.0, -1e-9]))
    assert sorted(found.variances) == [0.0, 4.0]


@pytest.mark.parametrize(("weight", "covariance"), [((2, 3), (2, 2)), ((3,), (3, 3)), ((0, 3), (3, 3)), ((2, 3), (3,))])
def test_a_covariance_of_another_layer_is_refused(weight: tuple[int, ...], covariance: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="covariance"):
        Limit.of(np.ones(weight), np.ones(covariance))


def test_the_mean_square_is_that_of_float64_over_any_number_of_tiles() -> None:
    weight = np.random.default_rng(0).standard_normal((5000, 1000)).astype(np.float32)
    assert mean_square(weight) == pytest.approx((weight.astype(np.float64) ** 2).mean(), rel=1e-12)
