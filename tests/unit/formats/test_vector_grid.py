"""Grids of vectors: trained without chance, stationary, in one order; the golden tests hold their errors."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from scipy import spatial

from core.formats.block_lloyd import lloyd_max
from core.formats.elements import element_table
from core.formats.vector_grid import halton, stored_grid, vector_grid
from core.recipe.tensor_format import parse

SMALL = [(2, 4), (2, 16), (2, 64), (3, 27), (4, 16), (6, 64)]


def radical_inverse(number: int, base: int) -> Fraction:
    """The digits of a number behind the point."""
    found, place = Fraction(0), Fraction(1)
    while number:
        place /= base
        found, number = found + place * (number % base), number // base
    return found


def test_the_sequence_is_that_of_halton() -> None:
    wanted = [[float(radical_inverse(number, base)) for base in (2, 3, 5, 7, 11, 13)] for number in range(1, 300)]
    assert halton(299, 6) == pytest.approx(np.array(wanted), abs=1e-15)


@pytest.mark.parametrize(("dimension", "points"), SMALL)
def test_every_point_is_the_mean_of_what_is_nearest_to_it(dimension: int, points: int) -> None:
    """On samples that the training did not see, within their noise."""
    grid = vector_grid(dimension, points)
    drawn = np.random.default_rng(1).standard_normal((1 << 18, dimension))
    cells = spatial.cKDTree(grid).query(drawn)[1]
    for number in range(points):
        inside = drawn[cells == number]
        noise = inside.std(axis=0) / np.sqrt(len(inside))
        assert len(inside) > 50
        assert np.abs(inside.mean(axis=0) - grid[number]) == pytest.approx(0, abs=float(6 * noise.max()) + 0.01)


@pytest.mark.parametrize(("dimension", "points"), [*SMALL, (1, 2), (1, 9), (2, 2), (5, 2), (3, 100)])
def test_points_are_distinct_ascend_and_do_not_change(dimension: int, points: int) -> None:
    grid = vector_grid(dimension, points)
    assert grid.shape == (points, dimension)
    stored = stored_grid(dimension, points)
    assert stored.tolist() == sorted(stored.tolist())
    assert stored.dtype == np.float16
    assert len(np.unique(stored, axis=0)) == points
    reach = element_table(parse("higgs2@64"), 64).values[-1]
    assert np.abs(grid).max() < reach
    with pytest.raises(ValueError, match="read-only"):
        grid[0] = 0


def test_training_again_gives_the_same_bits() -> None:
    first = vector_grid(3, 27)
    vector_grid.cache_clear()
    assert np.array_equal(vector_grid(3, 27), first)
    assert vector_grid(3, 27) is not first


def test_two_points_lie_on_a_line_through_the_centre_as_far_out_as_in_one_dimension() -> None:
    """The best two points for p Normal numbers: those of one dimension, on any axis."""
    for dimension in (2, 3, 6):
        low, high = vector_grid(dimension, 2)
        assert np.linalg.norm(low + high) == pytest.approx(0, abs=0.02)
        assert np.linalg.norm(high) == pytest.approx(lloyd_max("normal", None, 2)[1], rel=0.01)
