"""Measures the rounding methods on layers whose inputs have known statistics, and draws them against the limit.

Every method rounds the same seeded Normal weights under the input covariances of tests/golden/covariance_families.py;
the stored bytes are counted, the decoded error is weighed by the covariance, and reverse waterfilling says what the
best of all codes would leave at those bits. `docs/images/layer_distortion.jsonl` takes the numbers. The pictures
`layer_distortion.svg` and `layer_gap.svg` and the tables between the markers `<!-- 2 bits -->` (3, 4) in
docs/rounding.md are functions of them: the same numbers give the same bytes.

    python docs/layer_distortion.py --measure   measures anew, then draws
    python docs/layer_distortion.py             draws what is there
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from docs.pictures import json_lines, svg, with_tables

if TYPE_CHECKING:
    from core.rounding.layer import Layer

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
NUMBERS = IMAGES / "layer_distortion.jsonl"
CURVES, GAPS = IMAGES / "layer_distortion.svg", IMAGES / "layer_gap.svg"
EXAMPLE = IMAGES / "layer.safetensors"
PAGE = ROOT / "docs" / "rounding.md"
ROWS, COLUMNS = 2048, 512
EXAMPLE_SHAPE = (256, 128)
TITLES = {
    "identity": "independent inputs",
    "ar1_0.9": "neighbours correlated by 0.9",
    "pow1_diag": "scales falling as 1/i",
    "pow1_haar": "the same, rotated",
    "pow2_haar": "falling as 1/i², rotated",
    "scaled_ar1": "correlated, log-normal scales",
    "factor_mix": "16 factors, log-normal scales",
}
CURVES_OF = ("identity", "ar1_0.9", "scaled_ar1", "pow2_haar")
RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
WIDTHS = (2.0, 3.0, 4.0, 5.0)
SLOW, WIDTH_OF_SLOW = ("signround",), (3.0,)  # half a minute for each point
LIMIT_RATES = tuple(step / 8 for step in range(6, 49))
TABLE_RATES = (2.0, 3.0, 4.0)

Json = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """A method with a format for every width, how the legend names it, and its colour and dash in the pictures."""

    title: str
    rounding: Json
    format: str
    colour: str
    dash: tuple[int, int] = (1, 0)

    @property
    def widths(self) -> tuple[float, ...]:
        if self.rounding["name"] in SLOW:
            return WIDTH_OF_SLOW
        return RATES if self.format.startswith("grid") else WIDTHS


SERIES = (
    Series("nearest, int@64", {"name": "nearest"}, "int{}@64", "#9a9a9a", (4, 3)),
    Series("gptq, int@64", {"name": "gptq"}, "int{}@64", "#3b7dd8", (4, 3)),
    Series("error_diffusion, int@64", {"name": "error_diffusion"}, "int{}@64", "#8bbf1f", (4, 3)),
    Series("signround, int@64", {"name": "signround"}, "int{}@64", "#00acc1", (4, 3)),
    Series("power_learned, power@channel", {"name": "power_learned"}, "power{}@channel", "#e08a00", (4, 3)),
    Series("squeezellm, lloyd-rows@channel", {"name": "squeezellm"}, "lloyd{}-rows@channel", "#6a3fa0", (4, 3)),
    Series("nearest, grid@tensor", {"name": "nearest"}, "grid{}@tensor", "#9a9a9a"),
    Series("gptq, grid@tensor", {"name": "gptq"}, "grid{}@tensor", "#3b7dd8"),
    Series("watersic, grid@tensor", {"name": "watersic"}, "grid{}@tensor", "#0b6e4f"),
)


@dataclass(frozen=True)
class Measured:
    """One method and format under one covariance.

    `bits` stored per weight, `distortion` over that of zeros, `gap` in bits above the limit.
    """

    family: str
    series: str
    name: str
    bits: float
    distortion: float
    gap: float


@dataclass(frozen=True)
class Limit:
    """What no code goes below under a covariance: `distortion` over that of zeros at `bits`."""

    family: str
    bits: float
    distortion: float


@dataclass(frozen=True)
class Predicted:
    """What theory says of successive rounding with one step for all columns: bits above the limit at high rates."""

    family: str
    predicted: float


Row = Measured | Limit | Predicted


def layer(family: str, rows: int = ROWS, columns: int = COLUMNS) -> Layer:
    """Seeded weights of unit variance, fp32, with the covariance of a family, which counts as exact."""
    import numpy as np
    import torch

    from core.rounding.layer import Layer
    from tests.golden.covariance_families import family as covariance_of
    from tests.golden.covariance_families import weights

    weight = torch.from_numpy(weights(rows, columns).astype(np.float32))
    return Layer(weight, covariance_of(family, columns).copy())


def available() -> tuple[Series, ...]:
    """The series whose methods are there."""
    from core.recipe.rounding import RoundingSpec

    return tuple(one for one in SERIES if one.rounding["name"] in RoundingSpec.KNOWN)


def measure() -> Iterator[Row]:
    """All methods under all covariances, with the limits."""
    import numpy as np

    from core.rounding.limit import predicted_gap

    for family in TITLES:
        given = layer(family)
        yield Predicted(family, predicted_gap(np.diag(np.linalg.cholesky(given.covariance))))
        power = given.distortion()
        yield from (Limit(family, bits, given.limit.distortion_at(bits) / power) for bits in LIMIT_RATES)
        for series in available():
            yield from (measured(given, family, series, width) for width in series.widths)


def measured(given: Layer, family: str, series: Series, width: float) -> Measured:
    """One point."""
    from core.recipe.rounding import RoundingSpec
    from core.recipe.tensor_format import number_text, parse

    name = series.format.format(number_text(width))
    found = given.measure(parse(name), RoundingSpec.model_validate(series.rounding))
    distortion, gap = found["relative_distortion"], found["gap_bits"]
    return Measured(family, series.title, name, found["bits_per_param"], distortion, gap)


def write_example() -> None:
    """The layer that the commands of the page measure: bf16 weights, their inputs' covariance in fp32."""
    import torch
    from safetensors.torch import save_file

    given = layer("scaled_ar1", *EXAMPLE_SHAPE)
    covariance = torch.from_numpy(given.covariance).float()
    save_file({"weight": given.weight.bfloat16(), "covariance": covariance}, EXAMPLE)


def read(text: str) -> list[Row]:
    """What `json_lines` wrote."""
    return [_row(json.loads(line)) for line in text.splitlines()]


def _row(fields: Json) -> Row:
    if "name" in fields:
        return Measured(**fields)
    return Predicted(**fields) if "predicted" in fields else Limit(**fields)


def points(rows: list[Row]) -> list[Measured]:
    """What was measured."""
    return [row for row in rows if isinstance(row, Measured)]


def curves(rows: list[Row]) -> Json:
    """A Vega-Lite description: distortion against stored bits on a logarithmic axis, a panel a family."""
    x = _axis("bits", {"domain": [0.75, 6], "nice": False}, "stored bits per weight", {"tickMinStep": 1, "format": "d"})
    ticks = {"values": [10.0**-power for power in range(6)], "format": "~g"}
    y = _axis("distortion", {"type": "log", "domain": [1e-5, 1]}, "output error over output power", ticks)
    limits = [row for row in rows if isinstance(row, Limit) and row.family in CURVES_OF]
    values = [{"kind": "limit", **_mark(row, distortion=row.distortion)} for row in limits]
    shown = [row for row in points(rows) if row.family in CURVES_OF]
    values += [{"kind": "line", "series": row.series, **_mark(row, distortion=row.distortion)} for row in shown]
    titles = [TITLES[family] for family in CURVES_OF]
    return _picture(rows, values, {"x": x, "y": y}, titles, {"width": 230, "height": 260})


def gaps(rows: list[Row]) -> Json:
    """The same of the bits above the limit, which is the bottom line, for every family."""
    x = _axis("bits", {"domain": [0.75, 6], "nice": False}, "stored bits per weight", {"tickMinStep": 1, "format": "d"})
    y = _axis("gap", {"domain": [0, 2.5]}, "bits above the limit", {})
    values = [{"kind": "line", "series": row.series, **_mark(row, gap=row.gap)} for row in points(rows)]
    return _picture(rows, values, {"x": x, "y": y}, list(TITLES.values()), {"width": 230, "height": 200})


def _picture(rows: list[Row], values: list[Json], at: Json, titles: list[str], size: Json) -> Json:
    """Panels in rows of four, lines with their points, and a legend of what is drawn."""
    drawn = {row.series for row in points(rows)}
    series = [one for one in SERIES if one.title in drawn]
    names = [one.title for one in series]
    legend = {"orient": "bottom", "columns": 4, "labelLimit": 260, "symbolType": "stroke", "symbolStrokeWidth": 2}
    scale = {"domain": names, "range": [one.colour for one in series]}
    dashes = {"domain": names, "range": [list(one.dash) for one in series]}
    colour = {"field": "series", "type": "nominal", "title": None, "scale": scale, "legend": legend}
    dash = {"field": "series", "type": "nominal", "title": None, "scale": dashes, "legend": legend}
    layers = [
        _layer("limit", {"type": "line", "color": "#222222", "strokeWidth": 2}, at),
        _layer("line", {"type": "line", "strokeWidth": 1.7}, at | {"color": colour, "strokeDash": dash}),
        _layer("line", {"type": "point", "filled": True, "size": 16, "opacity": 1}, at | {"color": colour}),
    ]
    facet = {"field": "title", "type": "nominal", "title": None, "sort": titles}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "white",
        "padding": 10,
        "data": {"values": values},
        "facet": facet,
        "columns": 4,
        "spec": size | {"layer": layers},
        "config": {
            "aria": False,
            "font": "sans-serif",
            "axis": {"labelFontSize": 11, "titleFontSize": 12, "gridColor": "#eeeeee"},
            "header": {"labelFontSize": 13},
            "legend": {"labelFontSize": 12},
            "view": {"stroke": None},
        },
    }


def _axis(field: str, scale: Json, title: str, axis: Json) -> Json:
    return {"field": field, "type": "quantitative", "scale": scale, "axis": axis, "title": title}


def _layer(kind: str, mark: Json, encoding: Json) -> Json:
    return {"transform": [{"filter": f"datum.kind == '{kind}'"}], "mark": mark | {"clip": True}, "encoding": encoding}


def _mark(row: Measured | Limit, **height: float) -> Json:
    return {"title": TITLES[row.family], "bits": row.bits, **height}


def gap_table(rows: list[Row], rate: float) -> str:
    """A table in Markdown: the bits above the limit of every method at a width, a column a family."""
    from core.recipe.tensor_format import number_text

    found = {(row.series, row.family, row.name): row for row in points(rows)}
    drawn = {row.series for row in points(rows)}
    lines = [f"| method, format | {' | '.join(f'`{family}`' for family in TITLES)} |", "|---|" + "---|" * len(TITLES)]
    for series in SERIES:
        name = series.format.format(number_text(rate))
        if series.title in drawn and rate in series.widths:
            cells = (f"{found[series.title, family, name].gap:.2f}" for family in TITLES)
            lines.append(f"| `{series.rounding['name']}`, `{name}` | {' | '.join(cells)} |")
    predicted = {row.family: row.predicted for row in rows if isinstance(row, Predicted)}
    cells = (f"{predicted[family]:.2f}" for family in TITLES)
    lines.append(f"| one step for all columns, at high rates | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page_with(page: str, rows: list[Row]) -> str:
    """The page with its tables as the numbers have them."""
    return with_tables(page, {f"{rate:g} bits": gap_table(rows, rate) for rate in TABLE_RATES})


def main(arguments: list[str]) -> None:
    """Measure if asked to, then draw and write the tables."""
    if "--measure" in arguments:
        write_example()
        NUMBERS.write_text(json_lines(measure()), "utf-8")
    rows = read(NUMBERS.read_text("utf-8"))
    CURVES.write_text(svg(curves(rows)), "utf-8")
    GAPS.write_text(svg(gaps(rows)), "utf-8")
    PAGE.write_text(page_with(PAGE.read_text("utf-8"), rows), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
