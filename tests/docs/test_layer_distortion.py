"""The pictures and tables of rounding are functions of the numbers, and the numbers are those of the coder."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from core.recipe.rounding import PARAMETERS, RoundingSpec
from core.rounding.layer import Layer
from core.rounding.limit import SHAPE_GAP, distortion_at
from tests.docs.scripts import script
from tests.golden.covariance_families import family as covariance_of

SCRIPT = script("layer_distortion.py")
ROWS = SCRIPT.read(SCRIPT.NUMBERS.read_text("utf-8"))
POINTS = SCRIPT.points(ROWS)
LIMITS = [row for row in ROWS if isinstance(row, SCRIPT.Limit)]
PREDICTED = {row.family: row.predicted for row in ROWS if isinstance(row, SCRIPT.Predicted)}
PAGE: str = SCRIPT.PAGE.read_text("utf-8")


def gap(series: str, family: str, name: str) -> float:
    return float(next(row.gap for row in POINTS if (row.series, row.family, row.name) == (series, family, name)))


def test_the_pictures_are_those_of_the_numbers() -> None:
    for path, chart in ((SCRIPT.CURVES, SCRIPT.curves), (SCRIPT.GAPS, SCRIPT.gaps)):
        drawn = SCRIPT.svg(chart(ROWS))
        assert drawn == path.read_text("utf-8"), "python docs/layer_distortion.py draws it anew"
        assert len(drawn) < 250_000


def test_the_tables_of_the_page_are_those_of_the_numbers() -> None:
    assert SCRIPT.page_with(PAGE, ROWS) == PAGE
    for rate in SCRIPT.TABLE_RATES:
        assert SCRIPT.gap_table(ROWS, rate) in PAGE


def test_a_picture_is_the_same_whatever_was_drawn_before() -> None:
    assert len({SCRIPT.svg(SCRIPT.gaps(ROWS)) for _ in range(2)}) == 1


def test_numbers_are_read_as_they_were_written() -> None:
    assert SCRIPT.read(SCRIPT.json_lines(ROWS)) == ROWS


def test_every_series_was_measured_under_every_covariance() -> None:
    wanted = {(family, series.title) for family in SCRIPT.TITLES for series in SCRIPT.available()}
    assert {(row.family, row.series) for row in POINTS} == wanted
    assert len(POINTS) == sum(len(series.widths) for series in SCRIPT.available()) * len(SCRIPT.TITLES)


def test_every_method_is_drawn() -> None:
    assert {series.rounding["name"] for series in SCRIPT.available()} == set(RoundingSpec.KNOWN)


SLOW = ("signround", "watersic")  # half a minute each
SERIES = [
    pytest.param(one, id=one.title, marks=[pytest.mark.slow] if one.rounding["name"] in SLOW else [])
    for one in SCRIPT.available()
]


@pytest.mark.parametrize("series", SERIES)
def test_a_number_is_what_the_coder_gives_now(series: Any) -> None:
    """One flipped code, which another processor may have, flips others of its row."""
    now = SCRIPT.measured(SCRIPT.layer("scaled_ar1"), "scaled_ar1", series, 3.0)
    row = next(one for one in POINTS if (one.family, one.series, one.name) == (now.family, now.series, now.name))
    assert now.bits == pytest.approx(row.bits, rel=1e-3)
    assert now.gap == pytest.approx(row.gap, abs=3e-3)


@pytest.mark.parametrize("family", SCRIPT.TITLES)
def test_limits_are_reverse_waterfilling_of_the_weights_under_the_covariance(family: str) -> None:
    """Of white weights of variance 1, whose output has the power trace S / n, up to the sampling of the weights."""
    covariance = covariance_of(family, SCRIPT.COLUMNS)
    spectrum = np.maximum(np.linalg.eigvalsh(covariance), 0)
    for row in (one for one in LIMITS if one.family == family):
        assert row.distortion == pytest.approx(distortion_at(spectrum / spectrum.mean(), row.bits), rel=0.03)


def test_nothing_that_was_measured_lies_below_the_limit() -> None:
    assert min(row.gap for row in POINTS) > 0.1
    for row in POINTS:
        at = [one for one in LIMITS if one.family == row.family and one.bits <= row.bits]
        assert not at or row.distortion < 1
        limit = next((one for one in LIMITS if (one.family, one.bits) == (row.family, row.bits)), None)
        assert limit is None or row.distortion > limit.distortion


@pytest.mark.parametrize("family", ["identity", "pow1_diag"])
def test_nearest_on_a_grid_is_one_step_for_all_columns_where_inputs_are_independent(family: str) -> None:
    """Its 32 bits of scale are nothing here."""
    assert gap("nearest, grid@tensor", family, "grid4@tensor") == pytest.approx(PREDICTED[family], abs=0.01)
    assert PREDICTED["identity"] == pytest.approx(SHAPE_GAP, abs=1e-6)


def test_the_example_of_the_page_is_the_layer_that_the_script_makes() -> None:
    stored, made = Layer.read(SCRIPT.EXAMPLE), SCRIPT.layer("scaled_ar1", *SCRIPT.EXAMPLE_SHAPE)
    assert stored.weight.numpy() == pytest.approx(made.weight.numpy(), rel=2**-8)
    assert stored.covariance == pytest.approx(made.covariance, rel=2**-23)


def test_the_table_of_parameters_is_complete() -> None:
    table = PAGE.partition("<!-- parameters -->\n")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    shown = {row[0].strip("`"): dict(_defaults(row[2])) for row in cells}
    for method, parameters in PARAMETERS.items():
        assert {key for key, methods in shown.items() if method in methods} == set(parameters)
        for key, default in parameters.items():
            assert default is None or _same(shown[key][method], default)


def _defaults(cell: str) -> list[tuple[str, str]]:
    """(method, default) of a cell such as `gptq`, `watersic`: 4; `signround`: 200."""
    groups = [part.partition(": ") for part in cell.split("; ")]
    return [(method, default) for methods, _, default in groups for method in re.findall(r"`(\w+)`", methods)]


def _same(shown: str, default: Any) -> bool:
    if isinstance(default, float):
        return math.isclose(float(shown), default)
    return shown == str(default).lower()
