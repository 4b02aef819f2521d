"""The information-theoretic limit that `bitmill layer measure` compares with."""

from pathlib import Path

import numpy as np
import pytest

from cli.local import data_to_measure, draw, rate_at, waterfilling
from core.errors import UserError


def _by_bisection(variances: np.ndarray, rate: float) -> float:
    low, high = 1e-30, float(variances.max())
    for _ in range(300):
        level = (low * high) ** 0.5
        found = np.mean(0.5 * np.log2(np.maximum(1, variances / level)))
        low, high = (level, high) if found > rate else (low, level)
    return float(np.mean(np.minimum(variances, level)))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.7, 2.0, 4.25])
def test_the_closed_form_equals_bisection_on_the_water_level(rate: float) -> None:
    variances = np.random.default_rng(3).gamma(0.5, size=37)
    assert waterfilling(variances, rate) == pytest.approx(_by_bisection(variances, rate), rel=1e-9)


@pytest.mark.parametrize("rate", [0.1, 0.7, 2.0, 4.25])
def test_rate_and_distortion_are_inverse_to_each_other(rate: float) -> None:
    variances = np.append(np.random.default_rng(4).gamma(0.5, size=20), 0.0)
    assert rate_at(variances, waterfilling(variances, rate)) == pytest.approx(rate, rel=1e-9)


def test_at_high_rate_it_is_the_shannon_bound_of_one_gaussian() -> None:
    assert waterfilling(np.ones(8), 4.25) == pytest.approx(2**-8.5)


def test_more_distortion_than_variance_needs_no_bits() -> None:
    assert rate_at(np.ones(4), 1.5) == 0.0


def test_dead_components_cost_nothing() -> None:
    assert waterfilling(np.array([1.0, 0.0]), 1.0) == pytest.approx(0.5 * 2**-4)
    assert waterfilling(np.zeros(3), 1.0) == 0.0


@pytest.mark.parametrize("distribution", ["normal", "laplace", "student_t:5"])
def test_synthetic_data_have_unit_variance_and_are_the_same_for_a_seed(distribution: str) -> None:
    values = draw(distribution, 400_000, 7)
    assert values.var() == pytest.approx(1.0, abs=0.05)  # empirical: student_t:5 has spread 0.01 at this size
    assert (values == draw(distribution, 400_000, 7)).all()


@pytest.mark.parametrize(
    "distribution", ["cauchy", "student_t", "student_t:2", "student_t:x", "student_t:nan", "student_t:inf"]
)
def test_a_distribution_without_variance_is_refused(distribution: str) -> None:
    with pytest.raises(UserError):
        draw(distribution, 10, 0)


@pytest.mark.parametrize("shape", ["0,4", "4", "²,3", "-1,4", f"{1 << 20},{1 << 20}"])
def test_a_shape_that_is_none_or_too_large_is_refused(shape: str) -> None:
    with pytest.raises(UserError):
        data_to_measure("normal", 1, 0, shape, None)


def test_a_file_without_one_array_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "several.npz", a=np.ones(3))
    np.save(tmp_path / "nothing.npy", np.zeros((0, 3), np.float32))
    for name in ("empty.npy", "several.npz", "nothing.npy"):
        with pytest.raises(UserError):
            data_to_measure("normal", 1, 0, None, tmp_path / name)
