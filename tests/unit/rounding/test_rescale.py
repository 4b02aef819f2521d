"""Scales fitted to numbers that stand: what is solved, and in which precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.rounding import rescale
from core.rounding.base import Sensitivity
from core.rounding.grids import GridRounding, GridSettings
from core.rounding.objective import Objective
from core.rounding.rescale import Fit, Numbers
from core.rounding.successive import Scales
from tests.golden.covariance_families import FAMILIES, family


def problem(name: str, dtype: torch.dtype, rows: int = 300, columns: int = 200) -> tuple[Numbers, Fit]:
    """Numbers of a Normal weight rounded column by column, decoded as they were rounded."""
    chance = np.random.default_rng(0)
    objective = Objective.of(Sensitivity(covariance=torch.from_numpy(family(name, columns).copy())))
    weight, step = torch.from_numpy(chance.standard_normal((rows, columns))), 0.4
    numbers = torch.round(weight / step)[:, objective.order].T
    fit = Fit(torch.ones(rows, dtype=torch.float64), torch.full((columns,), step, dtype=torch.float64))
    return Numbers(weight.to(dtype), numbers.to(torch.int8), objective), fit


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_fp32_and_fp64_fit_the_same_scales(name: str) -> None:
    (single, fit), (double, _) = problem(name, torch.float32), problem(name, torch.float64)
    for half in ("columns_fitted", "rows_fitted", "columns_stored"):
        one, two = getattr(single, half)(fit), getattr(double, half)(fit)
        assert torch.allclose(one.rows, two.rows, rtol=1e-5)
        assert double.excess(one) == pytest.approx(double.excess(two), rel=1e-6)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_cost_is_the_excess_but_for_a_constant(name: str) -> None:
    numbers, fit = problem(name, torch.float64)
    fitted = numbers.fitted(fit, rounds=2)
    saved = numbers.excess(fit) - numbers.excess(fitted)
    assert saved > 0
    assert numbers.cost(fit) - numbers.cost(fitted) == pytest.approx(saved, rel=1e-6)


def test_systems_that_gradients_are_slow_for_are_solved_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, fit = problem("scaled_ar1", torch.float64)
    by_gradients = numbers.columns_fitted(fit)
    monkeypatch.setattr(rescale, "_GRADIENTS", 1)
    directly = numbers.columns_fitted(fit)
    assert torch.allclose(by_gradients.columns, directly.columns, rtol=1e-6)


@pytest.mark.parametrize(("outlier", "wanted"), [(1.0, torch.float32), (1e5, torch.float64)])
def test_targets_far_beyond_their_cells_are_rounded_in_fp64(outlier: float, wanted: torch.dtype) -> None:
    chance = np.random.default_rng(1)
    scales = np.ones(64)
    scales[-1] = outlier  # rounded first, and in the targets of all others
    inputs = chance.standard_normal((512, 64)) @ chance.standard_normal((64, 64)) * scales
    objective = Objective.of(Sensitivity(covariance=torch.from_numpy(inputs.T @ inputs / len(inputs))))
    settings = GridSettings(waterfilled=False, shrinks=True, paths=1, mmse=0.0, classes=True)
    weight = torch.from_numpy(chance.standard_normal((32, 64))).float()
    layer = GridRounding(weight, objective, Scales.ones(32, 64), settings, 0)
    assert layer._prepared(3.0).precision == wanted
