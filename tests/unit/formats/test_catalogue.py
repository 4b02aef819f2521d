"""`format show` and the catalogue: every family and alias, in numbers that agree with what is stored."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from core.formats.block_types import BLOCK_TYPES
from core.formats.catalogue import catalogue, describe
from core.formats.stored import packed_bits, scale_bits
from core.recipe.format_names import ALIASES, FAMILIES, SCALE_FORMATS, STATISTICS
from core.recipe.tensor_format import parse


def test_the_catalogue_has_every_family_and_alias_with_an_example_that_parses() -> None:
    entries = catalogue()
    assert {entry["name"] for entry in entries} == {*FAMILIES, *ALIASES, *BLOCK_TYPES}
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
    assert shown["element_bits"] == fmt.element_bits
    if fmt.is_grid:
        assert shown["bits_per_param"] == fmt.bits
    elif not fmt.is_block_type:
        assert shown["bits_per_param"] == packed_bits(fmt.codes) / fmt.vector + scale_bits(fmt) / int(fmt.granularity)


def test_the_catalogue_says_which_statistics_and_scale_formats_a_family_takes() -> None:
    entries = {entry["name"]: entry for entry in catalogue()}
    assert entries["int"]["statistics"] == [name for name in STATISTICS if name != "fouroversix"]
    assert entries["float"]["statistics"] == list(STATISTICS)
    assert entries["float"]["scale_formats"] == list(SCALE_FORMATS)
    assert entries["bof"]["statistics"] == ["absmax", "signmax", "search", "signmax-search"]
    assert entries["af"]["statistics"] == ["absmax", "search"]
    assert entries["higgs"]["statistics"] == ["rms"]
    assert entries["higgs"]["scale_formats"] == ["bf16", "fp16", "fp32"]
    assert "e8m0-even" not in entries["nf"]["scale_formats"]


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("t5_4@tensor:rms+outliers0.0009765625", 4 + 28 / 1024),
        ("nf4@64:dq8", 4 + (8 + 32 / 256) / 64),
        ("nvfp4", 4.5),
        ("mxint8", 8.25),
        ("q4_k", 4.5),
        ("q6_k", 6.5625),
    ],
)
def test_bits_per_parameter_count_scales_and_outliers(text: str, bits: float) -> None:
    assert describe(parse(text))["bits_per_param"] == bits


def test_what_is_fitted_is_named() -> None:
    found = {
        text: describe(parse(text)).get("fitted")
        for text in ("t_4@64", "power4@64", "float4@64", "lloyd4@64", "nf4@64")
    }
    assert found == {
        "t_4@64": "nu",
        "power4@64": "alpha",
        "float4@64": "exponent_bits",
        "lloyd4@64": "codebook",
        "nf4@64": None,
    }


def test_a_granularity_that_only_a_shape_makes_a_number_says_what_it_assumed() -> None:
    assert describe(parse("normal4@channel"))["assumed_shared"] == 4096
    assert "assumed_shared" not in describe(parse("normal4@tensor:rms"))
    assert describe(parse("int4@channel"))["bits_per_param"] == 4


def test_zero_is_a_zero_and_no_other_value_is_written_twice() -> None:
    values = describe(parse("t5_4-repeat_zero@64"))["codebook"]
    assert values.count(0.0) == 2
    assert len(set(values)) == 15
    assert not any(str(value) == "-0.0" for text in FAMILIES if text != "float" for value in values)


def test_a_grid_is_shown_with_the_step_that_normal_weights_would_have() -> None:
    shown = describe(parse("grid3.25@64:absmax:bf16+huffman"))
    assert shown["fitted"] == "step"
    assert (shown["element_bits"], shown["scale_bits"], shown["bits_per_param"]) == (3.0, 16.0, 3.25)
    steps = [high - low for low, high in pairwise(shown["codebook"])]
    assert steps == pytest.approx([0.52243324] * len(steps))
    assert 0.0 in shown["codebook"]
    assert shown["codebook"][-1] == -shown["codebook"][0] > 4 - 0.53


def test_a_grid_of_vectors_is_shown_by_its_points_as_they_are_stored() -> None:
    shown = describe(parse("higgs2.333-p3@64+outliers0.0009765625"))
    assert (shown["element_bits"], shown["scale_bits"]) == (7 / 3, 16.0)
    assert shown["bits_per_param"] == 7 / 3 + 16 / 64 + 28 / 1024
    assert {len(point) for point in shown["codebook"]} == {3}
    assert len(shown["codebook"]) == 128
    assert all(number == np.float16(number) for point in shown["codebook"] for number in point)
    assert f"{16 * 3 * 128} bits a tensor" in shown["not_counted"]


def test_what_an_entropy_code_saves_is_not_counted() -> None:
    coded, plain = (describe(parse(text)) for text in ("t7_4@64+rans", "t7_4@64"))
    assert coded["bits_per_param"] == plain["bits_per_param"]
    assert "rans" in coded["not_counted"]
