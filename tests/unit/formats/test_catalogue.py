"""`format show` and the catalogue: every family and alias, in numbers that agree with what is stored."""

from __future__ import annotations

import pytest

from core.formats.catalogue import catalogue, describe
from core.formats.stored import SCALE_BITS, packed_bits
from core.recipe.tensor_format import ALIASES, FAMILIES, parse


def test_the_catalogue_has_every_family_and_alias_with_an_example_that_parses() -> None:
    entries = catalogue()
    assert {entry["name"] for entry in entries} == {*FAMILIES, *ALIASES}
    for entry in entries:
        assert str(parse(entry["example"])) == entry["example"]
        assert entry["description"]


@pytest.mark.parametrize("entry", catalogue(), ids=lambda entry: str(entry["name"]))
def test_a_format_is_described_in_numbers(entry: dict[str, str]) -> None:
    fmt = parse(entry["example"])
    shown = describe(fmt)
    assert shown["format"] == str(fmt)
    assert shown["codebook"] == sorted(shown["codebook"])
    assert shown["block_size"] == fmt.granularity
    assert shown["bits_per_param"] == packed_bits(fmt.codes) + SCALE_BITS[fmt.scale_format] / int(fmt.granularity)
    assert shown["element_bits"] == fmt.element_bits


def test_a_granularity_that_only_a_shape_makes_a_number_says_what_it_assumed() -> None:
    assert describe(parse("normal4@channel"))["assumed_shared"] == 4096
    assert "assumed_shared" not in describe(parse("normal4@tensor:rms"))
    assert describe(parse("int4@channel"))["bits_per_param"] == 4


def test_zero_is_a_zero_and_no_other_value_is_written_twice() -> None:
    values = describe(parse("t5_4-repeat_zero@64"))["codebook"]
    assert values.count(0.0) == 2
    assert len(set(values)) == 15
    assert not any(str(value) == "-0.0" for text in FAMILIES if text != "float" for value in values)
