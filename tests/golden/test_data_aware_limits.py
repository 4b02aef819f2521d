"""The limit of rounding with data against values computed elsewhere, and the inputs that they were computed on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from core.rounding.limit import SHAPE_GAP, Limit, distortion_at, predicted_gap, rate_at
from tests.golden.covariance_families import DATA_AWARE, FAMILIES, autoregressive, family, weights

Entry = dict[str, Any]
VECTOR: Entry = DATA_AWARE["golden_vector"]


def label(entry: Entry) -> str:
    return "-".join(str(entry[key]) for key in ("family", "n", "R") if key in entry)


@pytest.mark.parametrize("entry", DATA_AWARE["fingerprints"]["sigma"], ids=label)
def test_the_covariances_are_those_of_the_recipes(entry: Entry) -> None:
    covariance = family(entry["family"], entry["n"])
    factor = np.linalg.cholesky(covariance)
    assert covariance[0, 0] == pytest.approx(entry["S00"], rel=1e-9)
    assert covariance[0, 1] == pytest.approx(entry["S01"], rel=1e-9, abs=1e-12)
    assert np.log(np.diag(factor)).mean() == pytest.approx(entry["mean_ln_Lii"], rel=1e-9, abs=1e-12)
    assert np.trace(covariance) == pytest.approx(entry["n"], rel=1e-9)


def test_every_family_has_a_fingerprint() -> None:
    assert {entry["family"] for entry in DATA_AWARE["fingerprints"]["sigma"]} == set(FAMILIES)


@pytest.mark.parametrize("n", [256, 512])
def test_the_weights_are_those_of_the_recipes(n: int) -> None:
    given, found = DATA_AWARE["fingerprints"][f"W_4096x{n}"], weights(4096, n)
    assert found[0, 0] == given["first"]
    assert found[-1, -1] == given["last"]
    assert found.sum() == pytest.approx(given["sum"], rel=1e-9)
    assert (found**2).sum() == pytest.approx(given["sum_sq"], rel=1e-9)


@pytest.mark.parametrize("entry", DATA_AWARE["it_limits"]["rows"], ids=label)
def test_distortion_and_rate_of_every_family(entry: Entry) -> None:
    limit = Limit(_spectrum(entry))
    assert limit.distortion_at(entry["R"]) == pytest.approx(entry["D"], rel=1e-8)
    assert limit.rate_at(entry["D"]) == pytest.approx(entry["R"], rel=1e-8)


@pytest.mark.parametrize("entry", DATA_AWARE["predicted_gptq_gap"]["rows"], ids=label)
def test_what_one_step_for_all_columns_costs(entry: Entry) -> None:
    diagonal = np.diag(np.linalg.cholesky(family(entry["family"], entry["n"])))
    assert predicted_gap(diagonal) == pytest.approx(entry["gap"], abs=1e-6)


@pytest.mark.parametrize("entry", DATA_AWARE["rate_distortion_grid"]["rows"][::5], ids=label)
def test_rates_at_distortions_that_rounding_left(entry: Entry) -> None:
    assert rate_at(_spectrum(entry), entry["D"]) == pytest.approx(entry["R_it_at_D"], abs=1e-7)


def test_the_constants() -> None:
    given = DATA_AWARE["constants"]
    assert pytest.approx(given["shape_gap_bits"], abs=1e-15) == SHAPE_GAP
    assert pytest.approx(given["shape_gap_factor"], rel=1e-14) == 4**SHAPE_GAP
    assert 20 * math.log10(2) * SHAPE_GAP == pytest.approx(given["shape_gap_dB"], rel=1e-14)


def test_the_worked_example() -> None:
    covariance = autoregressive(0.9, 4)
    assert np.linalg.eigvalsh(covariance) == pytest.approx(VECTOR["eigenvalues"], rel=1e-9)
    for rate, distortion in VECTOR["waterfilling"]["D_at_R"].items():
        assert distortion_at(VECTOR["eigenvalues"], float(rate)) == pytest.approx(distortion, rel=1e-8)
    for distortion, rate in VECTOR["waterfilling"]["R_at_D"].items():
        assert rate_at(VECTOR["eigenvalues"], float(distortion)) == pytest.approx(rate, rel=1e-8)


def test_the_limit_of_a_layer_takes_the_variance_of_its_weights_and_the_spectrum_of_its_inputs() -> None:
    covariance, weight = family("pow1_haar", 256), 3 * weights(64, 256)
    spectrum = np.linalg.eigvalsh(covariance) * (weight**2).mean()
    found = Limit.of(weight, np.triu(covariance) * 2 - np.diag(np.diag(covariance)))
    assert found.distortion_at(2) == pytest.approx(distortion_at(spectrum, 2), rel=1e-10)


def _spectrum(entry: Entry) -> np.ndarray:
    return np.asarray(np.linalg.eigvalsh(family(entry["family"], entry["n"])))
