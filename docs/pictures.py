"""What the scripts that draw the documentation's pictures have in common: numbers as JSON lines, SVG, tables in pages.

All of it is a function of its arguments: the same numbers give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Json = dict[str, Any]


def rounded(value: str | float) -> str | float:
    """Numbers to seven digits."""
    return value if isinstance(value, str) else float(f"{value:.7g}")


def json_lines(rows: Iterable[DataclassInstance]) -> str:
    """A line for each row, numbers to seven digits."""
    fields = ({key: rounded(value) for key, value in asdict(row).items()} for row in rows)
    return "".join(json.dumps(line) + "\n" for line in fields)


def svg(picture: Json) -> str:
    """A picture as SVG; its clips are numbered from 1, while the library counts on through all that a process draws."""
    import vl_convert

    drawn = str(vl_convert.vegalite_to_svg(picture))
    numbers = {name: f"clip{at + 1}" for at, name in enumerate(dict.fromkeys(re.findall(r"clip\d+", drawn)))}
    return re.sub(r"clip\d+", lambda found: numbers[found[0]], drawn)


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """A page with tables between their markers, `<!-- name -->` and `<!-- /name -->`."""
    for mark, table in tables.items():
        start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
        before, _, rest = page.partition(start)
        page = before + start + table + end + rest.partition(end)[2]
    return page
