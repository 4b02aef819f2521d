"""Draws the picture of the README, and its table, from the numbers of `benchmarks/allocation_table.py`.

Reads `docs/images/allocation.jsonl`, writes `docs/images/allocation.svg` and the table between the markers
`<!-- numbers -->` in README.md. A function of the numbers: the same ones give the same bytes.

    make picture        measures anew, then draws
    python docs/draw.py draws what is there
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NUMBERS = ROOT / "docs" / "images" / "allocation.jsonl"
PICTURE = ROOT / "docs" / "images" / "allocation.svg"
ORIGINAL = ROOT / "models" / "bitmill_5m" / "model.safetensors"
README = ROOT / "README.md"
METHODS = {"uniform": "uniform", "fisher": "Fisher"}
_COLOURS = {"uniform": "#8a8a8a", "Fisher": "#0b6e4f"}
_TABLE = re.compile(r"(?<=<!-- numbers -->\n).*?(?=<!-- /numbers -->)", re.DOTALL)

Json = dict[str, Any]


def measured(text: str) -> list[Json]:
    """The plans that were measured, of the methods that are shown: {method, bits, kl, bytes, target}."""
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [
        {
            "method": METHODS[line["method"]],
            "bits": line["bits_per_param"],
            "kl": line["measured_kl"],
            "bytes": line["stored_bytes"],
            "target": line["target"],
        }
        for line in lines
        if line.get("method") in METHODS and "measured_kl" in line
    ]


def chart(rows: list[Json]) -> Json:
    """A Vega-Lite description: KL on a logarithmic axis against stored bits per parameter, sizes at the points."""
    values = [row | {"label": megabytes(row["bytes"])} for row in rows]
    x = {
        "field": "bits",
        "type": "quantitative",
        "scale": {"zero": False, "padding": 30},
        "title": "stored bits per parameter",
    }
    y = {
        "field": "kl",
        "type": "quantitative",
        "scale": {"type": "log"},
        "axis": {"format": "~g", "tickCount": 4},
        "title": "measured KL divergence, nats per token",
    }
    scale = {"domain": list(_COLOURS), "range": list(_COLOURS.values())}
    colour = {"field": "method", "type": "nominal", "title": "allocation", "scale": scale}
    line = {"mark": {"type": "line", "point": {"size": 60}}, "encoding": {"x": x, "y": y, "color": colour}}
    sizes = {
        "transform": [{"filter": "datum.method == 'Fisher'"}],
        "mark": {"type": "text", "dy": 16, "dx": -4, "fontSize": 11, "color": "#444444"},
        "encoding": {"x": x, "y": y, "text": {"field": "label", "type": "nominal"}},
    }
    config = {"font": "sans-serif", "axis": {"labelFontSize": 11, "titleFontSize": 12}, "view": {"stroke": None}}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "white",
        "padding": 12,
        "width": 560,
        "height": 260,
        "data": {"values": values},
        "layer": [line, sizes],
        "config": config,
    }


def table(rows: list[Json]) -> str:
    """The same numbers as Markdown, one line per size; the first is the original's."""
    lines = [
        "| stored bits per parameter | size | KL, uniform | KL, Fisher | Fisher / uniform |",
        "|---|---|---|---|---|",
        f"| 16, the original | {megabytes(ORIGINAL.stat().st_size)} | 0 | 0 | |",
    ]
    for target in sorted({row["target"] for row in rows}):
        at = {row["method"]: row for row in rows if row["target"] == target}
        if set(at) != set(_COLOURS):
            continue
        uniform, fisher = at["uniform"], at["Fisher"]
        lines.append(
            f"| {fisher['bits']:.3f} | {megabytes(fisher['bytes'])} | {uniform['kl']:.4f} | {fisher['kl']:.4f} "
            f"| {fisher['kl'] / uniform['kl']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def megabytes(count: int) -> str:
    """A number of bytes, in powers of 1000."""
    return f"{count / 1e6:.2f} MB"


def main() -> None:
    """Draw, and write the table."""
    import vl_convert

    rows = measured(NUMBERS.read_text("utf-8"))
    PICTURE.write_text(vl_convert.vegalite_to_svg(chart(rows)), "utf-8")
    README.write_text(_TABLE.sub(lambda _: table(rows), README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
