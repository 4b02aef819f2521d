"""The picture of all formats and its tables are functions of the numbers, and the numbers are those of the coder."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from core.formats.limits import entropy_coded_grid
from core.recipe.format_names import FAMILIES
from core.recipe.tensor_format import parse
from tests.docs.scripts import script

SCRIPT = script("rate_distortion.py")
ROWS, LIMITS = SCRIPT.read(SCRIPT.NUMBERS.read_text("utf-8"))
MODELS = SCRIPT.read_models(SCRIPT.MODEL_NUMBERS.read_text("utf-8"))


def test_the_picture_is_that_of_the_numbers() -> None:
    drawn = SCRIPT.svg(SCRIPT.chart(ROWS, LIMITS))
    assert drawn == SCRIPT.PICTURE.read_text("utf-8"), "python docs/rate_distortion.py draws it anew"
    assert len(drawn) < 250_000


def test_the_tables_of_the_page_are_those_of_the_numbers() -> None:
    page = SCRIPT.PAGE.read_text("utf-8")
    assert SCRIPT.page_with(page, ROWS, LIMITS, MODELS) == page
    assert SCRIPT.frontier(ROWS, LIMITS) in page
    assert SCRIPT.grids(ROWS, LIMITS) in page
    assert SCRIPT.coded(ROWS) in page
    assert SCRIPT.four_bits(ROWS) in page
    assert SCRIPT.model_table(MODELS) in page


def test_numbers_are_read_as_they_were_written() -> None:
    assert SCRIPT.read(SCRIPT.json_lines([*ROWS, *LIMITS])) == (ROWS, LIMITS)
    assert SCRIPT.read_models(SCRIPT.json_lines(MODELS)) == MODELS


def test_every_format_of_the_catalogue_was_measured_on_every_source() -> None:
    wanted = {(source, name) for source in SCRIPT.SOURCES for _, _, name in SCRIPT.catalogue()}
    assert {(row.source, row.name) for row in ROWS} == wanted
    assert {parse(row.name).family for row in ROWS} >= set(FAMILIES)
    assert {one.format for one in MODELS} == set(SCRIPT.MODEL_FORMATS)


@pytest.mark.parametrize(
    "name",
    [
        "nf4@64",
        "t7_4@32:signmax-search:e4m3",
        "q4_k",
        "lloyd3@tensor:rms+outliers0.01",
        "grid3@tensor:rms",
        "int4@64+rans",
        "higgs4-p2@1024+hadamard",
    ],
)
def test_a_number_is_what_the_coder_gives_now(name: str) -> None:
    from cli.local import draw, measure_format

    found = measure_format(name, draw("laplace", SCRIPT.SAMPLES, SCRIPT.SEED).reshape(-1, SCRIPT.COLUMNS), SCRIPT.SEED)
    row = next(one for one in ROWS if (one.source, one.name) == ("laplace", name))
    assert math.isclose(row.r, found["relative_rms_error"], rel_tol=1e-6)
    assert math.isclose(row.bits, found["bits_per_param"], rel_tol=1e-6)


def test_a_fitted_codebook_has_the_published_optimum_on_the_normal() -> None:
    """Mean squared errors of Max, 1960, within the noise of 2^20 samples."""
    lloyd_max = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}
    for bits, error in lloyd_max.items():
        row = next(one for one in ROWS if (one.source, one.name) == ("normal", f"lloyd{bits}@tensor:rms"))
        assert row.r == pytest.approx(math.sqrt(error), rel=3e-3)


def test_codes_of_fixed_length_lie_above_the_ideal_grid_and_that_above_shannon() -> None:
    for source in SCRIPT.SOURCES:
        ideal = [one for one in LIMITS if (one.source, one.limit) == (source, "entropy-coded grid")]
        heights = np.array([SCRIPT.gap(one, LIMITS) for one in ideal])
        assert (heights > 0.25).all()
        worst = max(height for one, height in zip(ideal, heights, strict=True) if one.bits >= 2)
        fixed = [row for row in ROWS if row.source == source and row.group != SCRIPT.CODED]
        assert min(SCRIPT.gap(row, LIMITS) for row in fixed) > worst


SPACE_FILLING = math.log2(2 * math.pi * math.e / 12) / 2  # what any scalar code loses to Shannon's limit at high rates


@pytest.mark.parametrize(("source", "law"), SCRIPT.SOURCES.items())
def test_grids_with_one_scale_take_the_bits_asked_for_and_err_as_an_ideal_code_would(source: str, law: Any) -> None:
    """A little less at few bits, where outer cells are decoded at their means and the ideal ones at their middles."""
    rows = [row for row in ROWS if (row.source, row.series) == (source, SCRIPT.GRID)]
    assert {parse(row.name).bits for row in rows} == {*SCRIPT.WIDTHS, *SCRIPT.BUDGETS}
    for row in rows:
        nbytes = math.floor(parse(row.name).bits * SCRIPT.SAMPLES / 8)
        assert math.isclose(row.bits, 8 * nbytes / SCRIPT.SAMPLES, rel_tol=1e-6)
        above = math.log2(row.r / entropy_coded_grid(*law, row.bits).r)
        assert -0.08 < above < (0.005 if row.bits < 5 else 0.02)
        assert 0.22 < SCRIPT.gap(row, LIMITS) < SPACE_FILLING + 0.02
        if parse(row.name).bits in SCRIPT.BUDGETS:
            assert row.r < 0.82 * SCRIPT.best_of_fixed_length(ROWS, source, parse(row.name).bits).r


def test_an_entropy_code_changes_bits_and_no_error_and_leaves_all_others_above_the_grid() -> None:
    r = {(row.source, row.name): row.r for row in ROWS}
    for row in ROWS:
        if row.group == SCRIPT.CODED and row.series != SCRIPT.GRID:
            assert row.r > entropy_coded_grid(*SCRIPT.SOURCES[row.source], row.bits).r * 2**-0.08
        if row.name.endswith("+rans"):
            assert row.r == r[row.source, row.name.removesuffix("+rans")]
            assert SCRIPT.gap(row, LIMITS) > SPACE_FILLING


@pytest.mark.parametrize("bits", [3, 4, 5])
@pytest.mark.parametrize("source", list(SCRIPT.SOURCES))
def test_small_blocks_with_searched_cheap_scales_come_closest_without_options(source: str, bits: int) -> None:
    """What the page reads from the picture."""
    rows = [row for row in ROWS if row.source == source and bits <= row.bits < bits + 1]
    rows = [row for row in rows if row.group != SCRIPT.CODED and "+" not in row.name]
    best = min(rows, key=lambda row: SCRIPT.gap(row, LIMITS))
    assert best.name.endswith(":e4m3")
    assert "search" in best.name


@pytest.mark.parametrize("source", ["laplace", "student_t:5"])
def test_heavy_tails_make_one_scale_worse_than_blocks_and_rotation_or_outliers_mend_it(source: str) -> None:
    r = {row.name: row.r for row in ROWS if row.source == source}
    assert r["lloyd4@tensor:rms"] > r["t_4@64"]
    assert r["normal4@tensor:rms+rotate"] < r["t_4@64"]
    assert r["lloyd4@tensor:rms+outliers0.01"] < r["t_4@64"]


@pytest.mark.parametrize(("name", "published"), [("higgs2-p2", 0.1078), ("higgs4-p2", 0.00775), ("higgs3-p4", 0.0256)])
def test_grids_of_vectors_have_their_published_error_on_every_source(name: str, published: float) -> None:
    for source in SCRIPT.SOURCES:
        row = next(one for one in ROWS if (one.source, one.name) == (source, f"{name}@1024+hadamard"))
        assert row.r**2 == pytest.approx(published, rel=0.015)


@pytest.mark.parametrize("source", list(SCRIPT.SOURCES))
def test_the_fitted_cube_root_code_errs_less_than_quantiles_and_a_search_less_than_four_over_six(source: str) -> None:
    r = {row.name: row.r for row in ROWS if row.source == source}
    assert r["t_4@64"] < min(r["nf4@64"], r["sf4@64"])
    assert r["float4_e2m1@16:search:e4m3"] < r["float4_e2m1@16:fouroversix:e4m3"] < r["nvfp4"]
