"""Measures the catalogue of formats on three distributions and on the bundled model, and draws it.

Every format encodes the same seeded 2^20 samples, 256 rows of 4096, with the real coder, and its bytes are counted.
`docs/images/rate_distortion.jsonl` takes these numbers, `rate_distortion_model.jsonl` beside it the KL divergence of
the bundled model in some formats. The picture `rate_distortion.svg` and the tables between the markers
`<!-- frontier -->`, `<!-- grids -->`, `<!-- coded -->`, `<!-- four bits -->` and `<!-- model -->` in docs/formats.md
are functions of them: the same numbers give the same bytes.

    python docs/rate_distortion.py --measure   measures anew (five minutes on one core), then draws
    python docs/rate_distortion.py             draws what is there
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from docs.pictures import json_lines, rounded, svg, with_tables

ROOT = Path(__file__).parents[1]

NUMBERS = ROOT / "docs" / "images" / "rate_distortion.jsonl"
MODEL_NUMBERS = ROOT / "docs" / "images" / "rate_distortion_model.jsonl"
PICTURE = ROOT / "docs" / "images" / "rate_distortion.svg"
PAGE = ROOT / "docs" / "formats.md"
SAMPLES, COLUMNS, SEED = 1 << 20, 4096, 0
WIDTHS = tuple(map(float, range(2, 9)))
SOURCES = {"normal": ("normal", None), "laplace": ("laplace", None), "student_t:5": ("t", 5.0)}
TITLES = {"normal": "Normal", "laplace": "Laplace", "student_t:5": "Student-t, 5 degrees of freedom"}
BUDGETS = (2.3, 2.7, 3.3, 4.05, 4.3, 4.6, 5.3, 6.3, 8.3)
GRID = "grid{}@tensor:rms"  # measured at the budgets too: a grid takes what it is asked for
CODED_BITS = tuple(step / 4 for step in range(6, 37))

# Series by group: a format for each width that the family allows ({}), or a single one. The first is the group's line.
CODED = "entropy coded"
SERIES = {
    CODED: (
        GRID,
        "grid{}@channel",
        "grid{}@64",
        "t7_{}@64:signmax+rans",
        "int{}@64+rans",
        "t_{}@tensor:rms-search+rans",
        "lloyd{}@tensor:rms+rans",
    ),
    "integers and floats": (
        "int{}@64",
        "int{}@64:signmax",
        "int{}@64:search",
        "int{}-sym@64",
        "int{}@tensor:rms-search",
        "float{}@64",
        "float{}@64:search",
        "int{}@32:signmax-search:e4m3",
    ),
    "codebooks, absmax": (
        "t_{}@64",
        "normal{}@64",
        "laplace{}@64",
        "nf{}@64",
        "nf{}@64:dq8",
        "nf{}@64:e4m3",
        "nf{}@32:search:e4m3",
        "sf{}@64",
        "af{}@64",
        "af{}-l1@64",
        "bof{}@64",
        "bof{}-mae@64",
        "power{}@64",
        "lloyd{}@64",
    ),
    "codebooks, signmax": (
        "lloyd{}@64:signmax",
        "t_{}@64:signmax",
        "t7_{}@64:signmax",
        "t7_{}-opt@64:signmax",
        "normal{}@64:signmax",
        "bof{}-s@64",
        "lloyd{}@128:signmax",
    ),
    "codebooks, signmax, searched": (
        "t7_{}@32:signmax-search:e4m3",
        "t7_{}@64:signmax-search:e4m3",
        "t7_{}@64:signmax-search",
        "lloyd{}@64:signmax-search",
        "bof{}-s@32:search:e4m3",
    ),
    "codebooks, one scale per tensor": (
        "lloyd{}@tensor:rms",
        "t_{}@tensor:rms-search",
        "normal{}@tensor:rms-search",
        "lloyd{}@tensor:rms+outliers0.001",
        "lloyd{}@tensor:rms+outliers0.01",
        "normal{}@tensor:rms+rotate",
    ),
    "vectors, rotated": ("higgs{}-p2@1024+hadamard", "higgs{}-p4@1024+hadamard"),
    "MX, NVFP4, block floating point": (
        "mxfp4",
        "mxfp6_e2m3",
        "mxfp6_e3m2",
        "mxfp8_e4m3",
        "mxfp8_e5m2",
        "mxint4",
        "mxint8",
        "bfp4",
        "bfp8",
        "float4_e2m1@32:e8m0-even",
        "float4_e2m1@32:search:e8m0",
        "nvfp4",
        "float4_e2m1@16:fouroversix:e4m3",
        "float4_e2m1@16:search:e4m3",
        "mx4",
        "mx6",
        "mx9",
        "e2m1_e32s8o1",
        "icb44fi2_e32s8",
    ),
    "GGUF": ("q2_k", "q3_k", "q4_0", "q4_1", "iq4_nl", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0"),
}
# On the bundled model, all with elements of four bits; a grid's bits count its scales.
MODEL_FORMATS = (
    "grid4.25@tensor",
    "grid4.25@channel",
    "grid4.25@64",
    "grid4@tensor",
    "t7_4@32:signmax-search:e4m3",
    "float4_e2m1@16:search:e4m3",
    "lloyd4@64:signmax",
    "bof4-s@64",
    "t7_4-asym@64",
    "t_4@tensor:rms-search+outliers0.01",
    "int4@64:search",
    "t7_4@64:signmax+unbiased",
    "t7_4@64:signmax",
    "nvfp4",
    "nf4@64",
    "int4@64+unbiased",
    "int4@64",
    "higgs4-p2@1024",
    "normal4@tensor:rms+rotate",
    "mxfp4",
)
MODEL_COMMAND = (
    "quantise models/bitmill_5m --recipe fast --set target.bits_per_param=4.6 --set allocation.min_bits={bits} "
    "--set allocation.max_bits={bits} --set evaluation.sequences=16 --set evaluation.sequence_length=512"
)
_COLOURS = ("#00acc1", "#9a9a9a", "#3b7dd8", "#0b6e4f", "#8bbf1f", "#e08a00", "#795548", "#c2185b", "#6a3fa0")
_LABELS: dict[str, dict[str, str]] = {  # what is named in the picture, and on which side of its point
    "left": {
        "grid2@tensor:rms": "grid",
        "mxfp4": "mxfp4",
        "nf4@64": "nf4",
        "int4@64": "int4@64",
        "normal4@tensor:rms+rotate": "rotated",
    },
    "right": {
        "int6@64+rans": "int6@64+rans",
        "nvfp4": "nvfp4",
        "q2_k": "q2_k",
        "q4_k": "q4_k",
        "q6_k": "q6_k",
        "mxfp6_e2m3": "mxfp6_e2m3",
    },
}
_LIMIT_LABELS = {"shannon": "Shannon", "entropy-coded grid": "uniform grid with an ideal entropy code"}
_LABELLED_BITS = 4.0
_FIVE = 4.9  # stored bits, below which a format counts as one of four bits an element
_MOST = 2.0  # bits above the limit that the picture reaches

Json = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One format on one source: `name` as it is written, `bits` stored per parameter, `r` the relative RMS error."""

    source: str
    group: str
    series: str
    name: str
    bits: float
    r: float


@dataclass(frozen=True)
class Limit:
    """What no coder, or no entropy-coded grid, goes below on a source: `r` at `bits`."""

    source: str
    limit: str
    bits: float
    r: float


@dataclass(frozen=True)
class Model:
    """The bundled model in one format: stored `bits` per parameter, KL divergence in nats per token and its error."""

    format: str
    bits: float
    kl: float
    stderr: float


def catalogue() -> Iterator[tuple[str, str, str]]:
    """(group, series, format) of all that is measured."""
    from core.errors import InvalidFormat
    from core.recipe.tensor_format import number_text, parse

    for group, series in SERIES.items():
        for one in series:
            for width in widths_of(one):
                name = one.format(number_text(width))
                try:
                    parse(name)
                except InvalidFormat:
                    continue
                yield group, one, name


def widths_of(series: str) -> tuple[float, ...]:
    """The widths that a series is measured at, as far as its family allows them."""
    if "{}" not in series:
        return (0.0,)
    return tuple(sorted((*WIDTHS, *BUDGETS))) if series == GRID else WIDTHS


def measure() -> Iterator[Measured | Limit]:
    """All formats and limits on all sources."""
    from cli.local import draw, measure_format
    from core.formats import limits

    for source, (family, nu) in SOURCES.items():
        values = draw(source, SAMPLES, SEED).reshape(-1, COLUMNS)
        for group, series, name in catalogue():
            found = measure_format(name, values, SEED)
            yield Measured(source, group, series, name, found["bits_per_param"], found["relative_rms_error"])
        for bits in CODED_BITS:
            yield Limit(source, "shannon", bits, limits.shannon(family, nu) * 2.0**-bits)
            yield Limit(source, "entropy-coded grid", bits, limits.entropy_coded_grid(family, nu, bits).r)


def measure_models() -> Iterator[Model]:
    """The bundled model in each of its formats, by the command line."""
    from cli.main import run
    from core.recipe.tensor_format import number_text, parse

    for name in MODEL_FORMATS:
        command, answer = MODEL_COMMAND.format(bits=number_text(parse(name).bits)), io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT), contextlib.redirect_stdout(answer):
            run([*command.split(), "--set", f"format={name}", "--out", f"{folder}/out", "--json"])
        report = json.loads(answer.getvalue())
        metrics = report["metrics"]
        yield Model(name, report["summary"]["bits_per_param"], metrics["kl_mean"], metrics["kl_stderr"])


def read(text: str) -> tuple[list[Measured], list[Limit]]:
    """What `json_lines` wrote."""
    lines = [json.loads(line) for line in text.splitlines()]
    return [Measured(**one) for one in lines if "name" in one], [Limit(**one) for one in lines if "limit" in one]


def read_models(text: str) -> list[Model]:
    """The same of the models."""
    return [Model(**json.loads(line)) for line in text.splitlines()]


def gap(row: Measured | Limit, limits: list[Limit]) -> float:
    """Bits above Shannon's limit: log2(R 2^bits) minus the limit's."""
    shannon = next(one for one in limits if (one.source, one.limit) == (row.source, "shannon"))
    return math.log2(row.r) + row.bits - math.log2(shannon.r) - shannon.bits


def chart(rows: list[Measured], limits: list[Limit]) -> Json:
    """A Vega-Lite description: bits above Shannon's limit against stored bits per parameter, a panel a source."""
    x = _axis("bits", [1.5, 9], "stored bits per parameter", {"tickMinStep": 1, "format": "d"})
    at = {"x": x, "y": _axis("gap", [0, _MOST], "bits above the Shannon limit", {})}
    legend = {"orient": "bottom", "columns": 4, "labelLimit": 260, "symbolType": "circle", "symbolOpacity": 1}
    scale = {"domain": list(SERIES), "range": list(_COLOURS)}
    colour = {"color": {"field": "group", "type": "nominal", "title": None, "scale": scale, "legend": legend}}
    named = at | {"text": {"field": "name"}}
    layers = [
        _layer("limit", {"type": "line", "color": "#222222"}, at | {"strokeDash": _dash()}),
        _layer("line", {"type": "line", "strokeWidth": 2}, at | colour | {"detail": {"field": "series"}}),
        _layer("point", {"type": "point", "filled": True, "size": 18, "opacity": 0.6}, at | colour),
        _layer("limit name", {"type": "text", "align": "left", "dy": -7, "color": "#222222"}, named),
        *_names("left", {"align": "right", "dx": -6, "dy": -1}, named, colour),
        *_names("right", {"align": "left", "dx": 6, "dy": -1}, named, colour),
    ]
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "white",
        "padding": 10,
        "data": {"values": list(_marks(rows, limits))},
        "facet": {"column": {"field": "title", "type": "nominal", "title": None, "sort": list(TITLES.values())}},
        "spec": {"width": 300, "height": 380, "layer": layers},
        "config": {
            "aria": False,
            "font": "sans-serif",
            "axis": {"labelFontSize": 11, "titleFontSize": 12, "gridColor": "#eeeeee"},
            "header": {"labelFontSize": 13},
            "legend": {"labelFontSize": 12},
            "text": {"fontSize": 10},
            "view": {"stroke": None},
        },
    }


def best_of_fixed_length(rows: list[Measured], source: str, budget: float) -> Measured:
    """Of the formats without an entropy code the one of least error within a budget of stored bits."""
    fixed = (row for row in rows if row.source == source and row.group != CODED and row.bits <= budget)
    return min(fixed, key=lambda row: row.r)


def frontier(rows: list[Measured], limits: list[Limit]) -> str:
    """A table in Markdown: within each budget the best format of fixed length, and how far above the limit it is."""
    titles = " | ".join(f"{title}: least error | R | above" for title in TITLES.values())
    lines = [f"| stored bits, at most | {titles} |", "|---|" + "---|" * (3 * len(TITLES))]
    for budget in BUDGETS:
        cells = []
        for source in SOURCES:
            best = best_of_fixed_length(rows, source, budget)
            cells.append(f"`{best.name}` | {best.r:.4f} | {gap(best, limits):.2f}")
        lines.append(f"| {budget:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def grids(rows: list[Measured], limits: list[Limit]) -> str:
    """A table in Markdown: at each budget the grid, how far above the limit, and its R over that of the frontier."""
    titles = " | ".join(f"{title}: R | above | of the best above" for title in TITLES.values())
    lines = [f"| stored bits | {titles} |", "|---|" + "---|" * (3 * len(TITLES))]
    for budget in BUDGETS:
        name, cells = GRID.format(f"{budget:g}"), []
        for source in SOURCES:
            row = next(one for one in rows if (one.source, one.name) == (source, name))
            share = row.r / best_of_fixed_length(rows, source, budget).r
            cells.append(f"{row.r:.4f} | {gap(row, limits):.2f} | {share:.2f}")
        lines.append(f"| {budget:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def coded(rows: list[Measured]) -> str:
    """A table in Markdown: what formats of four bits an element take with the option rans, and their R, unchanged."""
    titles = " | ".join(f"{title}: bits | R" for title in TITLES.values())
    lines = [f"| format | {titles} |", "|---|" + "---|" * (2 * len(TITLES))]
    found = {(row.name, row.source): row for row in rows}
    for series in SERIES[CODED]:
        name = series.format(4)
        if not name.endswith("+rans"):
            continue
        cells = (f"{row.bits:.3f} | {row.r:.4f}" for row in (found[name, source] for source in SOURCES))
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def four_bits(rows: list[Measured]) -> str:
    """A table in Markdown: all between 4 and 4.9 bits whose bits the weights do not decide, by R on Student-t."""
    names = dict.fromkeys(row.name for row in rows if 4 <= row.bits < _FIVE and not row.name.endswith("+rans"))
    found = {(row.name, row.source): row for row in rows}
    lines = [
        f"| format | stored bits | {' | '.join(f'R, {title}' for title in TITLES.values())} |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(names, key=lambda name: (found[name, "student_t:5"].r, name)):
        errors = " | ".join(f"{found[name, source].r:.4f}" for source in SOURCES)
        lines.append(f"| `{name}` | {found[name, 'normal'].bits:.3f} | {errors} |")
    return "\n".join(lines) + "\n"


def model_table(models: list[Model]) -> str:
    """A table in Markdown: the bundled model in formats of four bits an element, by its KL divergence."""
    lines = ["| format | stored bits | KL, nats per token | standard error |", "|---|---|---|---|"]
    lines += [
        f"| `{one.format}` | {one.bits:.3f} | {one.kl:.4f} | {one.stderr:.4f} |"
        for one in sorted(models, key=lambda one: one.kl)
    ]
    return "\n".join(lines) + "\n"


def page_with(page: str, rows: list[Measured], limits: list[Limit], models: list[Model]) -> str:
    """The page with its tables as the numbers have them."""
    tables = {
        "frontier": frontier(rows, limits),
        "grids": grids(rows, limits),
        "coded": coded(rows),
        "four bits": four_bits(rows),
        "model": model_table(models),
    }
    return with_tables(page, tables)


def _axis(field: str, domain: list[float], title: str, axis: Json) -> Json:
    return {"field": field, "type": "quantitative", "scale": {"domain": domain}, "axis": axis, "title": title}


def _layer(kind: str, mark: Json, encoding: Json) -> Json:
    clipped = mark if mark["type"] == "text" else mark | {"clip": True}
    return {"transform": [{"filter": f"datum.kind == '{kind}'"}], "mark": clipped, "encoding": encoding}


def _names(side: str, place: Json, named: Json, colour: Json) -> list[Json]:
    """Names before a white edge, so that they can be read across lines and points."""
    edge = {"stroke": "white", "strokeWidth": 3, "strokeJoin": "round"}
    return [
        _layer(side, {"type": "text"} | place | edge, named),
        _layer(side, {"type": "text"} | place, named | colour),
    ]


def _dash() -> Json:
    """Which limit is dashed."""
    return {"field": "limit", "scale": {"domain": list(_LIMIT_LABELS), "range": [[1, 0], [5, 4]]}, "legend": None}


def _marks(rows: list[Measured], limits: list[Limit]) -> Iterator[Json]:
    """What is drawn, in order."""
    for one in limits:
        about = {"title": TITLES[one.source], "bits": one.bits, "gap": rounded(max(gap(one, limits), 0.0))}
        yield about | {"kind": "limit", "limit": one.limit}
        if one.bits == _LABELLED_BITS:
            yield about | {"kind": "limit name", "name": _LIMIT_LABELS[one.limit]}
    lines = {series[0] for series in SERIES.values() if "{}" in series[0]}
    for row in rows:
        about = {"title": TITLES[row.source], "bits": row.bits, "gap": rounded(gap(row, limits))}
        if gap(row, limits) > _MOST:
            continue
        coloured = about | {"group": row.group}
        yield coloured | {"kind": "point"}
        if row.series in lines:
            yield coloured | {"kind": "line", "series": row.series}
        yield from (
            coloured | {"kind": side, "name": names[row.name]} for side, names in _LABELS.items() if row.name in names
        )


def main(arguments: list[str]) -> None:
    """Measure if asked to, then draw and write the tables."""
    if "--measure" in arguments:
        NUMBERS.write_text(json_lines(measure()), "utf-8")
        MODEL_NUMBERS.write_text(json_lines(measure_models()), "utf-8")
    rows, limits = read(NUMBERS.read_text("utf-8"))
    models = read_models(MODEL_NUMBERS.read_text("utf-8"))
    PICTURE.write_text(svg(chart(rows, limits)), "utf-8")
    PAGE.write_text(page_with(PAGE.read_text("utf-8"), rows, limits, models), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
