"""Fits of formats to data, against published and exact values: degrees of freedom, exponents, Lloyd-Max codebooks.

Data are quantiles at equal distances, or the seeded draws that a golden entry names; what a fitted codebook is worth is
computed by the exact oracle, not on the data.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special

from core.formats.power import power_edges, power_levels
from core.formats.root_density import codebook
from core.tensors.blocks import BlockGrid
from core.tensors.fit import fit_alpha, fit_nu, fit_student_t
from core.tensors.histogram import Histogram, scaled_histogram
from core.tensors.lloyd import lloyd, pinned_codes
from tests.golden.exact_error import Source, r_of_blocks, r_of_table

HERE = Path(__file__).parent
OPTIMAL: dict[str, Any] = json.loads((HERE / "optimal_formats.json").read_text())
FORMATS: dict[str, Any] = json.loads((HERE / "formats.json").read_text())
SAMPLES = 1 << 20
Entry = dict[str, Any]


@cache
def quantiles(family: str) -> NDArray[np.float32]:
    """2^20 values of variance about 1 at the probabilities (k + 1/2) / 2^20."""
    lower = (np.arange(SAMPLES // 2) + 0.5) / SAMPLES
    if family == "normal":
        negative = special.ndtri(lower)
    elif family == "laplace":
        negative = np.log(2 * lower) / np.sqrt(2)
    else:
        nu = float(family[1:])
        negative = special.stdtrit(nu, lower) * np.sqrt((nu - 2) / nu)
    return np.concatenate((negative, -negative[::-1])).astype(np.float32)


@cache
def rms_histogram(family: str) -> Histogram:
    values = torch.from_numpy(quantiles(family))
    scale = values.double().square().mean().sqrt().float()
    return scaled_histogram(values, BlockGrid(SAMPLES, SAMPLES, SAMPLES, one_scale=True), scale[None])


@cache
def block_histogram(family: str, statistic: str, block: int) -> Histogram:
    shuffled = np.random.default_rng(0).permutation(quantiles(family))
    rows = torch.from_numpy(shuffled).view(-1, block)
    extreme = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    scales = extreme if statistic == "signmax" else extreme.abs()
    return scaled_histogram(rows.reshape(-1), BlockGrid(SAMPLES, 1024, block), scales)


@pytest.mark.parametrize("entry", OPTIMAL["lloyd_max"]["entries"], ids=lambda one: f"{one['family']}-{one['b']}")
def test_a_codebook_fitted_under_rms_is_the_optimum(entry: Entry) -> None:
    family, codes = entry["family"], 2 ** entry["b"]
    fit = fit_nu(rms_histogram(family), "rms", "sym", codes)
    start = tuple(fit.multiplier * value for value in codebook("t", fit.parameter, "rms", "sym", codes))
    fitted = lloyd(rms_histogram(family), start)
    assert r_of_table(Source(family), fitted) == pytest.approx(entry["R"], rel=0.02 if family == "t5" else 0.003)
    assert r_of_table(Source(family), fitted) < r_of_table(Source(family), start)


@pytest.mark.parametrize(
    "entry",
    OPTIMAL["block_lloyd_max"]["entries"],
    ids=lambda one: f"{one['family']}-{one['statistic']}-{one['B']}-{one['b']}",
)
def test_a_codebook_fitted_to_blocks_is_the_optimum(entry: Entry) -> None:
    family, statistic, block, codes = entry["family"], entry["statistic"], entry["B"], 2 ** entry["b"]
    mode = "sym" if statistic == "absmax" else ""
    histogram = block_histogram(family, statistic, block)
    start = codebook("t", fit_nu(histogram, statistic, mode, codes, block).parameter, statistic, mode, codes, block)
    fitted = lloyd(histogram, start, pinned=pinned_codes(statistic, codes))
    assert r_of_blocks(Source(family), fitted, block) == pytest.approx(entry["R"], rel=0.005)
    assert fitted[-1] == 1.0
    assert statistic == "signmax" or fitted[0] == -1.0


@pytest.mark.parametrize("mode", ["sym", "asym"])
def test_the_least_error_on_t5_data_is_at_the_published_degrees_of_freedom(mode: str) -> None:
    published = OPTIMAL["student_t_fit"]["entries"][0]["nu"]
    assert fit_nu(rms_histogram("t5"), "rms", mode, 16).parameter == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize("entry", OPTIMAL["student_t_fit"]["entries"][1:], ids=lambda one: f"nu{one['nu']}")
def test_maximum_likelihood_finds_degrees_of_freedom_and_scale(entry: Entry) -> None:
    draws = np.random.default_rng(1).standard_t(entry["nu"], 1 << 17) * entry["scale"]
    nu, scale = fit_student_t(torch.from_numpy(draws))
    assert nu == entry["nu"]
    assert scale == pytest.approx(entry["scale"], rel=0.01)


@cache
def rows_of(kind: str) -> NDArray[np.float64]:
    """The data set `pq_rows`: 64 channels of 576 weights."""
    generator = np.random.default_rng(0)
    drawn = {
        "gauss": generator.standard_normal((64, 576)),
        "laplace": generator.laplace(size=(64, 576)),
        "t5": generator.standard_t(5, size=(64, 576)),
    }
    return drawn[kind]


def power_error(rows: NDArray[np.float64], codes: int, alpha: float) -> float:
    """Mean squared error of rounding in the power domain, per-row absmax, all in fp64."""
    scales = np.abs(rows).max(axis=1, keepdims=True)
    indices = np.searchsorted(np.array(power_edges(codes, alpha)), rows / scales)
    return float(np.mean((np.array(power_levels(codes, alpha))[indices] * scales - rows) ** 2))


@pytest.mark.parametrize("case", FORMATS["entries"]["power/seeded-rows"]["value"])
def test_the_exponent_of_a_power_grid_is_the_published_one(case: str) -> None:
    expected = FORMATS["entries"]["power/seeded-rows"]["value"][case]
    kind, _, bits = case.partition(",b=")
    rows, codes = rows_of(kind), 2 ** int(bits)
    weights = torch.from_numpy(rows).float()
    histogram = scaled_histogram(weights.view(-1), BlockGrid(rows.size, 576, 576), weights.abs().amax(dim=1))
    fit = fit_alpha(histogram, codes, rounding="power")
    assert fit.parameter == expected["a_star"]
    for alpha, key in [(expected["a_star"], "mse"), (1.0, "mse_a1"), (0.5, "mse_a05")]:
        assert power_error(rows, codes, alpha) == pytest.approx(expected[key], rel=1e-7)
    assert fit.r == pytest.approx(np.sqrt(expected["mse"] / np.mean(rows**2)), rel=1e-4)
    assert fit_alpha(histogram, codes).r <= fit.r
