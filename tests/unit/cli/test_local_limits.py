"""The data that `bitmill format measure` draws or reads, and what of it is refused."""

from pathlib import Path

import numpy as np
import pytest

from cli.local import data_to_measure, draw
from core.errors import UserError


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
