"""The table of whole models is a function of the numbers, nothing is missing in it, and the pages quote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.recipe.recipe import presets
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import parse
from models import BUNDLED
from tests.docs.scripts import script

SCRIPT = script("../benchmarks/rounding_kl.py")
KNOWN: dict[str, dict[str, Any]] = SCRIPT.by_key(SCRIPT.NUMBERS.read_text("utf-8"))
CASES = list(SCRIPT.cases(SCRIPT.ROWS, SCRIPT.ALLOCATIONS, SCRIPT.BITS))
ROW = SCRIPT.ROWS[0]


def line(row: Any = ROW, allocation: str = "fisher", bits: float = 3.0, **measured: Any) -> dict[str, Any]:
    named = {"row": row.title, "rounding": row.rounding, "format": row.format}
    return named | {"allocation": allocation, "asked_bits": bits} | measured


def known(*lines: dict[str, Any]) -> Any:
    return SCRIPT.by_key("".join(json.dumps(one) + "\n" for one in lines))


def test_the_tables_of_the_pages_are_those_of_the_numbers() -> None:
    assert f"<!-- whole models -->\n{SCRIPT.table(KNOWN)}<!-- /whole models -->" in SCRIPT.PAGE.read_text("utf-8")
    best = f"<!-- best roundings -->\n{SCRIPT.best_table(KNOWN)}<!-- /best roundings -->"
    assert best in SCRIPT.README.read_text("utf-8")


def test_every_case_was_measured() -> None:
    assert [case for case in CASES if case[0].key(*case[1:]) not in KNOWN] == []


def test_what_was_stored_is_within_what_was_asked_for() -> None:
    original = (BUNDLED / "model.safetensors").stat().st_size
    measured = [one for one in KNOWN.values() if "infeasible" not in one]
    assert measured
    for one in measured:
        assert 0 < one["bits_per_param"] <= one["asked_bits"]
        assert one["size_bytes"] < original
        assert one["kl_mean"] > 0


def test_cases_differ_from_the_preset_in_four_values_only() -> None:
    for row, allocation, bits in CASES:
        recipe = SCRIPT.recipe_of(row, allocation, bits).canonical()
        preset = presets()[SCRIPT.PRESET].canonical()
        differing = {key for key in recipe if recipe[key] != preset[key]}
        assert differing <= {"rounding", "format", "allocation", "target"}
        RoundingSpec.model_validate(row.rounding).stored_format(parse(row.format))


def test_numbers_are_told_apart_by_what_made_them() -> None:
    row = SCRIPT.Row("name", {"name": "gptq", "paths": 4}, "grid3@tensor")
    assert row.key("fisher", 3) == SCRIPT.Row("other name", {"paths": 4, "name": "gptq"}, "grid3@tensor").key(
        "fisher", 3.0
    )
    others = (SCRIPT.Row("name", {"name": "gptq"}, "grid3@tensor"), SCRIPT.Row("name", row.rounding, "grid3@channel"))
    keys = {
        row.key("fisher", 3),
        row.key("fisher", 4),
        row.key("uniform", 3),
        *(one.key("fisher", 3) for one in others),
    }
    assert len(keys) == 5
    assert list(known(line(row, "uniform", 2.5))) == [row.key("uniform", 2.5)]


def test_a_line_that_was_broken_off_does_not_count() -> None:
    whole = json.dumps(line()) + "\n"
    assert SCRIPT.complete_lines(whole + whole[:20]) == whole
    assert SCRIPT.complete_lines(whole[:20]) == ""
    assert SCRIPT.complete_lines("") == ""


def test_measuring_goes_on_where_it_was_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def measure(_bench: Any, row: Any, allocation: str, bits: float) -> dict[str, Any]:
        done.append(row.title)
        return line(row, allocation, bits, kl_mean=0.5)

    monkeypatch.setattr(SCRIPT.Bench, "line", measure)
    out = tmp_path / "numbers.jsonl"
    first = json.dumps(line(SCRIPT.ROWS[1], kl_mean=0.25)) + "\n"
    out.write_text(first + '{"row": "near', "utf-8")
    SCRIPT.measure(SCRIPT.cases(SCRIPT.ROWS[:3], ("fisher",), (3.0,)), out)
    assert done == [SCRIPT.ROWS[0].title, SCRIPT.ROWS[2].title]
    lines = out.read_text("utf-8").splitlines()
    assert lines[0] + "\n" == first
    assert [json.loads(one)["row"] for one in lines[1:]] == done


def test_a_cell_says_what_was_stored_and_what_cannot_be() -> None:
    assert SCRIPT.cell(line(kl_mean=0.0123456, bits_per_param=2.995)) == "0.0123"
    assert SCRIPT.cell(line(kl_mean=0.0123456, bits_per_param=2.889)) == "0.0123 at 2.89"
    assert SCRIPT.cell(line(infeasible="too few bits")) == "—"
    assert SCRIPT.cell(None) == ""


def test_the_table_has_the_reason_of_every_dash() -> None:
    lines = [line(kl_mean=0.5, bits_per_param=3.0), line(bits=2.0, infeasible="2 bits cannot be met")]
    assert SCRIPT.table(known(*lines)).splitlines()[2:] == [
        f"| {ROW.title} | `{ROW.format}` | fisher | — |  | 0.5 |  |",
        "",
        f"— `{ROW.format}`: 2 bits cannot be met.",
    ]


def test_the_readme_quotes_the_least_divergence_at_every_size() -> None:
    divergences = dict(
        zip((row.title for row in SCRIPT.ROWS), (0.5, 0.4, 0.03, 0.2, 0.7, 0.6, 0.05, 0.04), strict=False)
    )
    size: dict[str, Any] = {"bits_per_param": 2.99961, "size_bytes": 1_234_567}
    fisher = [line(row, kl_mean=divergences.get(row.title, 0.9), **size) for row in SCRIPT.ROWS]
    uniform = [one | {"allocation": "uniform", "kl_mean": one["kl_mean"] + 0.01} for one in fisher]
    rows = SCRIPT.best_table(known(*fisher, *uniform)).splitlines()[2:]
    assert rows == ["| 3.000 | 1.23 MB | 0.03 | error_diffusion, fisher | 0.7 | 0.5 |"]
    better = [one | {"kl_mean": one["kl_mean"] - 0.02} for one in uniform]
    rows = SCRIPT.best_table(known(*fisher, *better)).splitlines()[2:]
    assert rows == ["| 3.000 | 1.23 MB | 0.02 | error_diffusion, uniform | 0.69 | 0.49 |"]


@pytest.mark.slow
def test_a_number_is_what_the_pipeline_gives_now() -> None:
    """One flipped code, which another processor may have, moves the divergence a little."""
    row = next(row for row in SCRIPT.ROWS if row.title == "gptq, grid")
    with SCRIPT.bench(lambda _fraction, _what: None) as job:
        now = job.line(row, "uniform", 3.0)
    then = KNOWN[row.key("uniform", 3.0)]
    assert now["size_bytes"] == then["size_bytes"]
    assert now["kl_mean"] == pytest.approx(then["kl_mean"], rel=0.05)
