"""Recipes as text from anyone: what is read, what is refused, and single values set by dotted names."""

from __future__ import annotations

import contextlib
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRecipe
from core.recipe.document import MAX_BYTES, parse_document, plain_mapping, read_document, with_settings


def test_yaml_and_json_say_the_same() -> None:
    yaml_text = "target: {bits_per_param: 3.5}  # a comment\nformat: t7_4@64:signmax\ncalibration: false\n"
    json_text = '{"target": {"bits_per_param": 3.5}, "format": "t7_4@64:signmax", "calibration": false}'
    assert parse_document(yaml_text) == parse_document(json_text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: 1\nseed: 2\n", "'seed' stands twice"),
        ('{"seed": 1, "seed": 2}', "'seed' stands twice"),
        ("target: {kl: 1, kl: 2}", "'kl' stands twice"),
        ("a: &x {b: 1}\nc: *x\n", "anchors and aliases"),
        ("a: &x 1\n", "anchors and aliases"),
        ("a: !!python/object/apply:os.system ['true']", "python/object"),
        ("a: !unknown 1", "unknown"),
        ("target: {kl: .nan}", "not a finite number"),
        ("target: {kl: -.inf}", "not a finite number"),
        ('{"seed": NaN}', "NaN is not a number"),
        ('{"seed": 1e999}', "not a finite number"),
        ("seed: 2020-01-01", "a date is not a value"),
        ("1: 2", "the key '1' is not text"),
        ("? [a, b]\n: 1", "not text"),
        ("- 1\n- 2", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("just words", "a recipe is a mapping"),
        ("a: [", "not YAML or JSON"),
        ('{"a": ', "not YAML or JSON"),
        ("a: 1\n--- \nb: 2", "not YAML or JSON"),
        ("a: " + "[" * 40 + "]" * 40, "nested too deeply"),
        ("a: " + "[" * 20000, "not YAML or JSON"),
        ('{"a":' * 20000, "not YAML or JSON"),
        ("seed: " + "9" * 5000, "not YAML or JSON"),
        ("a: \x00", "not YAML or JSON"),
        ("#" * (MAX_BYTES + 1), "larger than"),
    ],
)
def test_what_is_not_plainly_a_recipe_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidRecipe, match=reason) as refused:
        parse_document(text, "mine.yaml")
    assert refused.value.errors


@given(st.text(max_size=80))
def test_any_text_is_a_mapping_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidRecipe):
        assert isinstance(parse_document(text), dict)


def test_a_file_is_named_in_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRecipe, match=r"cannot be read") as refused:
        read_document(path)
    assert refused.value.where == str(path)
    for absent in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(InvalidRecipe, match="no such recipe file"):
            read_document(absent)


def test_values_that_json_does_not_have_are_refused_with_their_path() -> None:
    with pytest.raises(InvalidRecipe, match="a date") as refused:
        plain_mapping({"overrides": [{"match": date(2020, 1, 1)}]})
    assert refused.value.where == "overrides.0.match"
    for key in (1, 0, None, "\0", "\ud800"):
        with pytest.raises(InvalidRecipe, match="not text"):
            plain_mapping({"target": {key: 2}})


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "\udfff*"])
def test_text_that_a_database_cannot_hold_is_refused(text: str) -> None:
    with pytest.raises(InvalidRecipe, match="half a surrogate pair") as refused:
        plain_mapping({"groups": [[text]]})
    assert refused.value.where == "groups.0.0"
    assert plain_mapping({"a": "\U0001f600é"}) == {"a": "\U0001f600é"}


def test_dotted_names_set_single_values() -> None:
    base = {"calibration": {"text": "builtin", "sequences": 4}, "seed": 0}
    assert with_settings(base, {"calibration.sequences": 8, "seed": 3}) == {
        "calibration": {"text": "builtin", "sequences": 8},
        "seed": 3,
    }
    assert base["calibration"] == {"text": "builtin", "sequences": 4}


def test_a_target_that_is_set_replaces_the_other_kinds() -> None:
    assert with_settings({"target": {"kl": 0.1}}, {"target.size_bytes": 5}) == {"target": {"size_bytes": 5}}
    assert with_settings({}, {"target.kl": 1, "target.size_bytes": 5}) == {"target": {"kl": 1, "size_bytes": 5}}


@pytest.mark.parametrize(
    ("before", "name", "after"),
    [
        ({"allocation": "fisher"}, "allocation.min_bits", {"allocation": {"name": "fisher", "min_bits": 3}}),
        ({"evaluation": False}, "evaluation.sequences", {"evaluation": {"sequences": 3}}),
        ({}, "gate.max_kl", {"gate": {"max_kl": 3}}),
        ({"gate": None}, "gate.max_kl", {"gate": {"max_kl": 3}}),
        ({"gate": {"max_kl": 1}}, "gate", {"gate": 3}),
    ],
)
def test_a_name_goes_through_what_stands_for_a_mapping(
    before: dict[str, Any], name: str, after: dict[str, Any]
) -> None:
    assert with_settings(before, {name: 3}) == after


def test_lists_can_only_be_set_as_a_whole() -> None:
    assert with_settings({"exports": ["a"]}, {"exports": ["b"]}) == {"exports": ["b"]}
    with pytest.raises(InvalidRecipe, match="as a whole"):
        with_settings({"overrides": [{"match": "a"}]}, {"overrides.0.match": "b"})
