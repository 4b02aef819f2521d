"""Successive rounding against the golden numbers of data-aware rounding: codes, distortions, gaps, orders, damping.

Codes are compared exactly: fp64 against fp64.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from core.rounding.base import Sensitivity
from core.rounding.limit import predicted_gap, rate_at
from core.rounding.objective import Objective
from core.rounding.rescale import Fit, Numbers
from core.rounding.successive import Scales, round_to_steps
from tests.golden.covariance_families import DATA_AWARE, family, weights

Doubles = NDArray[np.float64]
ROWS = 4096


def objective_of(covariance: Doubles, **settings: Any) -> Objective:
    return Objective.of(Sensitivity(covariance=torch.from_numpy(covariance.copy())), **settings)


def rounded(objective: Objective, weight: Doubles, steps: Doubles, *, shrinks: bool) -> tuple[Doubles, Doubles]:
    """Numbers (rows, places) and values of 1 (places,)."""
    rows = torch.from_numpy(weight.copy())[:, objective.order]
    gains = None if shrinks else np.ones(len(steps))
    scales = Scales.ones(len(weight), len(steps))
    found = round_to_steps(objective.targets(rows).contiguous(), objective.factor, steps, scales, gains)
    return found.numbers.T.astype(np.float64), found.gains * steps


def distortion(objective: Objective, weight: Doubles, numbers: Doubles, values: Doubles, covariance: Doubles) -> float:
    error = weight[:, objective.order.numpy()] - numbers * values
    ordered = covariance[np.ix_(objective.order.numpy(), objective.order.numpy())]
    return float(np.einsum("ij,ij->", error @ ordered, error)) / error.size


def column_entropy(numbers: Doubles) -> float:
    """Mean plug-in entropy of the columns, with the Miller-Madow term."""
    total = 0.0
    for column in numbers.T:
        counts = np.unique(column, return_counts=True)[1]
        share = counts / counts.sum()
        total += -(share * np.log2(share)).sum() + (len(counts) - 1) / (2 * counts.sum()) * np.log2(np.e)
    return float(total / numbers.shape[1])


def steps_of(objective: Objective, method: str, step: float) -> Doubles:
    units = objective.units.numpy()
    return step / units if method == "watersic" else np.full(len(units), step)


class TestTheGoldenVector:
    golden = DATA_AWARE["golden_vector"]

    @pytest.mark.parametrize("name", ["plain", "lmmse"])
    def test_codes_gains_and_distortion(self, name: str) -> None:
        covariance = 0.9 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
        weight = np.random.default_rng(0).standard_normal((6, 4))
        objective = objective_of(covariance)
        steps = 0.25 / objective.units.numpy()
        numbers, values = rounded(objective, weight, steps, shrinks=name == "lmmse")
        wanted = self.golden[name]
        assert numbers.astype(int).tolist() == wanted["Z"]
        assert distortion(objective, weight, numbers, values, covariance) == pytest.approx(wanted["D"], abs=1e-9)
        if name == "lmmse":
            assert values / steps == pytest.approx(wanted["gamma"], abs=1e-9)

    def test_gptq_has_one_step(self) -> None:
        covariance = 0.9 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
        weight = np.random.default_rng(0).standard_normal((6, 4))
        objective = objective_of(covariance)
        numbers, values = rounded(objective, weight, np.full(4, 0.4), shrinks=False)
        wanted = self.golden["gptq_step_0.4"]
        assert numbers.astype(int).tolist() == wanted["Z"]
        assert distortion(objective, weight, numbers, values, covariance) == pytest.approx(wanted["D"], abs=1e-9)

    def test_rescalers(self) -> None:
        covariance = 0.9 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
        weight = np.random.default_rng(0).standard_normal((6, 4))
        objective = objective_of(covariance)
        numbers, values = rounded(objective, weight, 0.25 / objective.units.numpy(), shrinks=True)
        problem = Numbers(torch.from_numpy(weight), torch.from_numpy(numbers).T, objective)
        fit = Fit(torch.ones(6, dtype=torch.float64), torch.from_numpy(values))
        constant = float(np.einsum("ij,ij->", weight @ covariance, weight))
        before = problem.excess(fit)
        for _ in range(60):
            for half in (problem.columns_fitted, problem.rows_fitted):
                fit = half(fit)
                after = problem.excess(fit)
                assert after <= before + 1e-12
                before = after
        found = (constant + before) / weight.size
        assert found == pytest.approx(self.golden["lmmse_rescaled"]["D"], rel=1e-3)


@functools.lru_cache(maxsize=16)
def grid_row(index: int) -> tuple[Doubles, float]:
    """Numbers and distortion of a row of the golden grid."""
    row = DATA_AWARE["rate_distortion_grid"]["rows"][index]
    covariance, weight = family(row["family"], row["n"]), weights(ROWS, row["n"])
    objective = objective_of(covariance)
    steps = steps_of(objective, row["method"], row["step"])
    numbers, values = rounded(objective, weight, steps, shrinks=row["lmmse"])
    return numbers, distortion(objective, weight, numbers, values, covariance)


GRID = DATA_AWARE["rate_distortion_grid"]["rows"]
CHOSEN = [at for at, row in enumerate(GRID) if row["n"] == 256 and row["R_nominal"] in (1.0, 4.0)]


@pytest.mark.parametrize("index", CHOSEN, ids=lambda at: "{family}-{method}-{R_nominal}-{lmmse}".format(**GRID[at]))
def test_fixed_steps_give_the_golden_codes_and_distortion(index: int) -> None:
    row = GRID[index]
    numbers, found = grid_row(index)
    assert int(np.abs(numbers).sum()) == row["sum_abs_codes"]
    assert found == pytest.approx(row["D"], rel=1e-4)
    assert column_entropy(numbers) == pytest.approx(row["H_col_mm"], abs=1e-4)


@pytest.mark.parametrize("name", sorted({row["family"] for row in GRID}))
def test_gaps_at_four_bits(name: str) -> None:
    """WaterSIC lies .2546 above the limit whatever the inputs are; GPTQ where the spread of L_ii predicts it."""
    indices = {row["method"]: at for at, row in enumerate(GRID) if _is_four_bits(row, name)}
    eigenvalues = np.linalg.eigvalsh(family(name, 256))
    gaps = {}
    for method, index in indices.items():
        numbers, found = grid_row(index)
        gaps[method] = column_entropy(numbers) - rate_at(eigenvalues, found)
    assert 0.246 <= gaps["watersic"] <= 0.266
    predicted = predicted_gap(np.diag(np.linalg.cholesky(family(name, 256))))
    assert gaps["gptq"] == pytest.approx(predicted, abs=0.005)


def _is_four_bits(row: dict[str, Any], name: str) -> bool:
    return bool(row["family"] == name and row["n"] == 256 and row["R_nominal"] == 4.0 and row["lmmse"])


def test_the_gptq_recursion_is_successive_rounding_with_one_step() -> None:
    """The inverse-Hessian recursion on reversed columns, written out, gives the same codes."""
    count, step = 256, 0.4
    covariance = 0.9 ** np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
    weight = np.random.default_rng(0).standard_normal((500, count))
    left = weight[:, ::-1].copy()
    codes = np.empty_like(left)
    inverse = np.linalg.inv(covariance[::-1, ::-1])
    upper = np.linalg.cholesky(inverse).T
    for at in range(count):
        codes[:, at] = np.rint(left[:, at] / step)
        error = (left[:, at] - step * codes[:, at]) / upper[at, at]
        left[:, at:] -= np.outer(error, upper[at, at:])
    objective = objective_of(covariance)
    numbers, _ = rounded(objective, weight, np.full(count, step), shrinks=False)
    assert int((numbers != codes[:, ::-1]).sum()) <= 4


@pytest.mark.parametrize(
    "row",
    [row for row in DATA_AWARE["column_order"]["rows"] if row["R_nominal"] == 1.0],
    ids=lambda row: f"{row['family']}-{row['method']}-{row['order']}",
)
def test_orders_of_columns(row: dict[str, Any]) -> None:
    names = {"natural": "natural", "asc": "ascending", "desc": "descending", "pivot": "pivot"}
    covariance, weight = family(row["family"], row["n"]), weights(ROWS, row["n"])
    objective = objective_of(covariance, columns=names[row["order"]])
    numbers, values = rounded(objective, weight, steps_of(objective, row["method"], row["step"]), shrinks=row["lmmse"])
    tied = row["family"].startswith("ar1") and row["order"] == "pivot"
    found = distortion(objective, weight, numbers, values, covariance)
    assert found == pytest.approx(row["D"], rel=3e-3 if tied else 1e-4)
    assert column_entropy(numbers) == pytest.approx(row["H_col_mm"], abs=2e-3 if tied else 1e-4)


@pytest.mark.parametrize(
    "row",
    [row for row in DATA_AWARE["mmse_damping"]["rows"] if row["order"] == "natural" and row["R_nominal"] == 1.0],
    ids=lambda row: f"{row['family']}-{row['f']}",
)
def test_damping_towards_zero(row: dict[str, Any]) -> None:
    covariance, weight = family(row["family"], row["n"]), weights(ROWS, row["n"])
    objective = objective_of(covariance)
    objective = objective.damped(row["damping"]) if row["damping"] else objective
    numbers, values = rounded(objective, weight, steps_of(objective, "watersic", row["step"]), shrinks=True)
    found = distortion(objective, weight, numbers, values, covariance)
    eigenvalues = np.linalg.eigvalsh(covariance)
    assert column_entropy(numbers) - rate_at(eigenvalues, found) == pytest.approx(row["gap_col"], abs=2e-3)


FINITE = DATA_AWARE["finite_calibration"]
SHRUNK = [row for row in FINITE["diagonal_shrinkage"] if row["T_over_n"] == 4]


def gap_of_tokens(name: str, per_input: int, **settings: Any) -> float:
    """The gap at 3 bits of column entropy, codes by the statistics of so many tokens and errors by the true ones."""
    count, rows = 256, 2048
    covariance, weight = family(name, count), weights(rows, count)
    inputs = np.random.default_rng(77).standard_normal((per_input * count, count)) @ np.linalg.cholesky(covariance).T
    objective = objective_of(inputs.T @ inputs / len(inputs), **settings)
    log, entropy = -1.0, 0.0
    while abs(entropy - 3) > 5e-4:
        numbers, values = rounded(objective, weight, steps_of(objective, "watersic", 2.0**log), shrinks=True)
        entropy = column_entropy(numbers)
        log += entropy - 3
    return entropy - rate_at(np.linalg.eigvalsh(covariance), distortion(objective, weight, numbers, values, covariance))


@pytest.mark.parametrize("row", FINITE["rows"], ids=lambda row: f"{row['T_over_n']} tokens for each input")
def test_what_few_tokens_cost(row: dict[str, Any]) -> None:
    tolerance = FINITE["tolerance"]["T_over_n=1" if row["T_over_n"] == 1 else "others"]
    assert gap_of_tokens("pow1_haar", row["T_over_n"], damping=1e-4) == pytest.approx(row["gap_col"], abs=tolerance)


@pytest.mark.parametrize("row", SHRUNK, ids=lambda row: f"{row['family']}, {row['regularisation']}")
def test_damping_and_shrinkage_to_the_diagonal(row: dict[str, Any]) -> None:
    kind = row["regularisation"]
    settings = {"diagonal": float(kind[4:])} if kind.startswith("rho") else {"damping": float(kind.split()[0])}
    assert gap_of_tokens(row["family"], 4, **settings) == pytest.approx(row["gap_col"], abs=0.01)


def test_shrinkage_follows_the_number_of_tokens() -> None:
    covariance = torch.from_numpy(family("ar1_0.9", 64).copy())
    for tokens, share in ((64, 0.1), (640, 0.02), (64_000, 0.0002)):
        found = Objective.of(Sensitivity(covariance=covariance, tokens=tokens)).hessian
        assert float(found[0, 1]) == pytest.approx(0.9 * (1 - share), rel=1e-12)
        assert float(found[0, 0]) == pytest.approx(1.0, rel=1e-12)


def test_drift_and_residual_lower_the_true_objective() -> None:
    golden = DATA_AWARE["drift_and_residual"]["values"]
    count, rows = 256, 1024
    covariance, weight = family("pow1_haar", count), weights(rows, count)
    chance = np.random.default_rng(9)
    first = chance.standard_normal((4096, count)) @ np.linalg.cholesky(covariance).T
    second = first + 0.1 * chance.standard_normal((4096, count)) * np.sqrt(np.diag(covariance))
    residual = 0.05 * chance.standard_normal((rows, count))
    drift = second @ residual.T
    tokens = len(first)
    given = {
        "plain": Sensitivity(covariance=torch.from_numpy(first.T @ first / tokens)),
        "drift": Sensitivity(
            covariance=torch.from_numpy(second.T @ second / tokens), cross=torch.from_numpy(first.T @ second / tokens)
        ),
    }
    given["drift_plus_residual"] = Sensitivity(
        covariance=given["drift"].covariance,
        cross=given["drift"].cross,
        residual=torch.from_numpy(drift.T @ second / tokens),
    )
    found = {}
    for name, sensitivity in given.items():
        objective = Objective.of(sensitivity, damping=1e-4)
        steps = golden[name]["c"] / objective.units.numpy()
        numbers, values = rounded(objective, weight, steps, shrinks=True)
        wanted = first @ weight.T + drift - second @ (numbers * values).T
        found[name] = float((wanted**2).sum()) / (4096 * 1024 * 256)
        assert found[name] == pytest.approx(golden[name]["objective"], rel=1e-3)
    assert found["drift_plus_residual"] < found["drift"] < found["plain"]
