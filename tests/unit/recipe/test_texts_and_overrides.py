"""How texts are named, and which override counts for a tensor."""

from __future__ import annotations

import pytest

from core.errors import InvalidRecipe
from core.recipe.calibration import CalibrationSpec, checkpoint_file, is_local_path
from core.recipe.override import Override
from core.recipe.recipe import first_match


@pytest.mark.parametrize(
    "text", ["builtin", "hf:Salesforce/wikitext", "hf:org/name:config", "hf:org/name:config:train", "file:data/a.txt"]
)
def test_texts_that_a_service_can_reach_are_no_local_paths(text: str) -> None:
    assert not is_local_path(CalibrationSpec(text=text).text)


@pytest.mark.parametrize("text", ["/data/a.txt", "a.txt", "./builtin", "~/a.txt", "../up/a b.txt", r"C:\data\a.txt"])
def test_everything_else_is_a_path_of_this_machine(text: str) -> None:
    assert is_local_path(CalibrationSpec(text=text).text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hf:wikitext", "not the name of a data set"),
        ("hf:org/name:a:b:c", "not the name of a data set"),
        ("hf:org/../name", "not the name of a data set"),
        ("hf:org/name?x=1", "not the name of a data set"),
        ("file:/etc/passwd", "not a relative path"),
        ("file:../a.txt", "not a relative path"),
        ("file:", "not a relative path"),
        ("https://example.org/a.txt", "no kind of text"),
        ("s3://bucket/a.txt", "no kind of text"),
        ("a\nb", "control characters"),
    ],
)
def test_texts_that_are_misspelled_are_refused_with_what_there_is(text: str, reason: str) -> None:
    with pytest.raises(InvalidRecipe, match=reason) as refused:
        CalibrationSpec(text=text)
    assert "builtin" in refused.value.hint


def test_a_text_of_the_checkpoint_is_known_by_its_path() -> None:
    assert checkpoint_file("file:data/a.txt") == "data/a.txt"
    assert checkpoint_file("builtin") is None


def test_the_first_override_that_matches_counts() -> None:
    kept, bounded = Override(match="model.*.norm.weight", keep=True), Override(match="*.weight", min_bits=3)
    assert first_match([kept, bounded], "model.0.norm.weight") is kept
    assert first_match([bounded, kept], "model.0.norm.weight") is bounded
    assert first_match([kept, bounded], "model.0.bias") is None


def test_names_match_with_their_case_and_as_a_whole() -> None:
    rule = Override(match="lm_head.[wb]*", keep=True)
    assert first_match([rule], "lm_head.weight")
    assert not first_match([rule], "LM_head.weight")
    assert not first_match([rule], "model.lm_head.weight")


def test_a_format_alone_is_exact_and_with_a_bound_a_family() -> None:
    assert Override(match="a", format="int4@64").is_exact
    assert not Override(match="a", format="int4@64", max_bits=5).is_exact
    assert not Override(match="a", keep=True).is_exact
    assert Override(match="a", format="int4@64").format == "int4-asym@64:absmax:bf16"
