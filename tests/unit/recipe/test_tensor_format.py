"""The grammar of tensor formats: one canonical text each, defaults that fit, refusals that say what works."""

from __future__ import annotations

import contextlib
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import BitmillError, InvalidFormat
from core.recipe.format_names import (
    ALIASES,
    BLOCK_NAMES,
    CODEBOOKS,
    ENTROPY_CODES,
    GRID_FAMILY,
    OPTIONS,
    OUTLIER_RULES,
    SCALE_BITS,
    SCALE_FORMATS,
    STATISTICS,
    VECTOR_FAMILY,
    VECTOR_MODES,
)
from core.recipe.recipe import load_recipe
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat, parse

CONTRACT = [
    "int4@128",
    "int4-asym@128:absmax:bf16",
    "int4-sym@64",
    "nf4@64",
    "t5_4@64:signmax",
    "normal3@tensor:rms",
    "normal4@channel",
    "normal4-sym@64",
    "normal4-asym@64",
    "laplace4-sym@64",
    "t5_4-asym@64",
    "float4_e2m1@32:absmax:e8m0",
    "float6_e2m3@32",
    "t7_3@64:signmax:bf16",
    "af4@64",
    "af4-l1@64",
    "bof4@64",
    "bof4-mae@64",
    "bof4-s@64",
    "bof4-s-mae@64",
    "sf4@64",
    "sf4-nu4@64",
    "lloyd4@64",
    "power0.7_4@channel",
    "power4@channel",
    "t5_4@tensor:rms+outliers0.001",
    "normal4@64+hadamard",
    "nvfp4",
    "mxint8",
    "q4_0",
    "q8_0",
    "grid3.0@tensor:rms+rans",
    "grid4.5@32:absmax:e4m3+huffman",
    "int4@64+huffman",
    "t7_4@64:signmax+opq0.95+rans",
    "higgs2-p2@1024+hadamard",
]


@st.composite
def options(draw: st.DrawFn) -> str:
    """An option of the grammar, numbers written in any way."""
    name = draw(st.sampled_from(OPTIONS))
    number = draw(st.floats(1e-6, 2).map(str) | st.sampled_from(["0.001", "0.950", "1e-3", "4", "0.5"]))
    found = draw(st.none() | st.integers(0, 10**12)) if name in ENTROPY_CODES else None
    return f"{name}{number}" if name in OUTLIER_RULES else name if found is None else f"{name}x{found}"


@st.composite
def formats(draw: st.DrawFn) -> TensorFormat:
    """Any format that exists: drawn field by field, without those that the class refuses."""
    family = draw(st.sampled_from(["int", "float", GRID_FAMILY, VECTOR_FAMILY, *CODEBOOKS]))
    fields: dict[str, Any] = {
        "family": family,
        "granularity": draw(st.sampled_from(["tensor", "channel"]) | st.integers(1, 1 << 20)),
        "statistic": draw(st.sampled_from(["", *STATISTICS])),
        "scale_format": draw(st.sampled_from(["", *SCALE_FORMATS])),
        "options": tuple(draw(st.lists(options(), max_size=3))),
    }
    modes = ["", "", "sym", "asym", "mx", "l1", "s", "mae", "s-mae", "mse", "opt", "weighted", "power", "nu4", "nu5.0"]
    modes += VECTOR_MODES if family == VECTOR_FAMILY else ()
    fields |= {"bits": draw(st.integers(2, 16) | st.floats(2, 8)), "mode": draw(st.sampled_from(modes))}
    if family == "float" and draw(st.booleans()):
        exponent, mantissa = draw(st.integers(2, 5)), draw(st.integers(0, 7))
        mode = draw(st.sampled_from(["", "ns", "ieee"]))
        fields |= {"bits": 1 + exponent + mantissa, "exponent_bits": exponent, "mantissa_bits": mantissa, "mode": mode}
    if family == "t":
        fields["nu"] = draw(st.none() | st.floats(2.01, 1e6))
    if family == "power":
        fields["alpha"] = draw(st.none() | st.floats(0.05, 4))
    try:
        return TensorFormat(**fields)
    except InvalidFormat:
        return TensorFormat("int", 4)


@given(formats())
def test_the_text_of_a_format_reads_back_as_the_same_format(fmt: TensorFormat) -> None:
    assert parse(str(fmt)) == fmt


@given(formats())
def test_the_text_is_canonical(fmt: TensorFormat) -> None:
    assert str(parse(f" {fmt} ")) == str(fmt)


@given(formats())
def test_every_allowed_width_is_a_format_of_the_same_kind_and_they_ascend(fmt: TensorFormat) -> None:
    widths = fmt.allowed_widths()
    assert widths
    assert list(widths) == sorted(set(widths))
    for bits in widths:
        other = fmt.with_bits(bits)
        assert (other.family, other.granularity, other.statistic) == (fmt.family, fmt.granularity, fmt.statistic)
        assert parse(str(other)) == other


@given(formats())
def test_fractional_widths_of_codebooks_have_an_even_number_of_codes(fmt: TensorFormat) -> None:
    if fmt.is_codebook:
        assert all(round(2**bits) % 2 == 0 for bits in fmt.allowed_widths())


@pytest.mark.parametrize("text", CONTRACT)
def test_the_examples_of_the_contract_are_read(text: str) -> None:
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("int4@128", "int4-asym@128:absmax:bf16"),
        ("int4@128:fp16", "int4-asym@128:absmax:fp16"),
        ("int4@128:signmax", "int4-asym@128:signmax:bf16"),
        ("nf4@64", "nf4@64:absmax:bf16"),
        ("t5_4@64", "t5_4-asym@64:absmax:bf16"),
        ("t5_4@64:signmax", "t5_4@64:signmax:bf16"),
        ("normal3@tensor:rms", "normal3-sym@tensor:rms:bf16"),
        ("normal3.58@64", "normal3.58-asym@64:absmax:bf16"),
        ("normal2.81@64", "normal2.81-sym@64:absmax:bf16"),  # 7 codes, an odd number
        ("int2.81@64", "int2.81-sym@64:absmax:bf16"),
        ("t5.0_4.0@64", "t5_4-asym@64:absmax:bf16"),
        ("float4_e2m1@32", "float4_e2m1@32:absmax:bf16"),
        ("float4@32", "float4@32:absmax:bf16"),
        ("bof4-s@64", "bof4-s@64:signmax:bf16"),
        ("bof4-s@64:search", "bof4-s@64:signmax-search:bf16"),
        ("bof4-s-mse@64", "bof4-s@64:signmax:bf16"),
        ("sf4-nu5@64", "sf4@64:absmax:bf16"),
        ("float4_e2m1@32:e8m0-floor", "float4_e2m1@32:absmax:e8m0"),
        ("mxfp4+rotate", "float4_e2m1@32:absmax:e8m0+rotate"),
        ("int4@32:e8m0-rceil", "int4-asym@32:absmax:e8m0"),
        ("int4-mx@32:e8m0-rceil", "int4-mx@32:absmax:e8m0-rceil"),
        ("power0.70_4@64", "power0.7_4@64:absmax:bf16"),
        ("nf4@64+hadamard+outliers1e-3", "nf4@64:absmax:bf16+outliers0.001+hadamard"),
        ("grid3@tensor", "grid3@tensor:rms:bf16+rans"),
        ("grid3.50@64:fp16+huffman+hadamard", "grid3.5@64:rms:fp16+hadamard+huffman"),
        ("grid3@channel:absmax+rans+outliers0.01", "grid3@channel:absmax:bf16+outliers0.01+rans"),
        ("int4@64+ransx077", "int4-asym@64:absmax:bf16+ransx77"),
        ("higgs3@1024", "higgs3-p2@1024:rms:fp16+hadamard"),
        ("higgs3.0-p1@channel:bf16+rotate", "higgs3-p1@channel:rms:bf16+rotate"),
        ("higgs2-p4@64+hadamard+outliers1e-3", "higgs2-p4@64:rms:fp16+outliers0.001+hadamard"),
    ],
)
def test_what_is_left_out_has_a_default_that_fits(short: str, full: str) -> None:
    assert str(parse(short)) == full


@pytest.mark.parametrize("name", sorted(ALIASES))
def test_an_alias_is_the_format_that_it_stands_for(name: str) -> None:
    assert parse(name) == parse(name.upper()) == parse(ALIASES[name])


def test_the_number_of_codes_follows_from_the_bits() -> None:
    assert parse("t7_4@64").codes == 16
    assert parse("t7_3.58@64").codes == 12
    assert parse("t7_3.58@64").element_bits == pytest.approx(3.584962500721156)


def test_an_asymmetric_grid_whose_codes_become_odd_becomes_symmetric_and_back() -> None:
    base = parse("normal4-asym@64")
    assert base.with_bits(2.81).mode == "sym"
    assert base.with_bits(3.58).mode == "asym"


def test_under_signmax_the_mode_follows_from_the_number_of_codes() -> None:
    odd = parse("t7_3.46@64:signmax")
    assert (odd.codes, odd.mode) == (11, "sym")
    assert odd.with_bits(4) == parse("t7_4@64:signmax")
    assert odd.with_bits(4).with_bits(3.46) == odd


def test_a_float_keeps_its_exponent_when_its_width_changes() -> None:
    assert parse("float4_e2m1@32").with_bits(6).element == "float6_e2m3"
    with pytest.raises(InvalidFormat, match="2 exponent bits has no"):
        parse("float4_e2m1@32").with_bits(4.5)


def test_widths_begin_at_three_where_clipped_block_maxima_make_two_useless() -> None:
    assert parse("t7_4@64:absmax").allowed_widths()[0] == 3
    assert parse("t7_4@64:signmax").allowed_widths()[0] == 2
    assert parse("int4@64").allowed_widths() == (2, 3, 4, 5, 6, 7, 8)


@pytest.mark.parametrize(
    ("text", "reason", "hint"),
    [
        ("int4", "no granularity", "int4@64"),
        ("int4@", "no granularity", "int4@channel"),
        ("int4@0", "no granularity '0'", "64"),
        ("int4@row", "no granularity 'row'", "channel"),
        ("int4@64:absmacks", "no statistic", "did you mean absmax"),
        ("int4@64:absmax:bf15", "no scale format", "did you mean bf16"),
        ("int4@64:absmax:bf16:more", "too many fields", "element@granularity"),
        ("normle4@64", "no element format", "did you mean normal"),
        ("mxpf4", "no format", "did you mean mxfp4"),
        ("float4.5@32", "whole widths", "float4"),
        ("float4@32:rms", "together with a scale", "rms-search"),
        ("int4_e2m1@32", "exponent and mantissa", "int4"),
        ("float4_e3m1@32", "are not 4", "float4_e2m1"),
        ("t2_4@64", "has no variance", "more than 2"),
        ("int0@64", "0 bits", "1 to 16"),
        ("int17@64", "17 bits", "1 to 16"),
        ("t5_4-asym@64:signmax", "signmax implies the mode", "no mode"),
        ("normal2.81-asym@64", "odd number of codes", "-sym"),
        ("int4-odd@64", "no mode", "-asym or -sym"),
        ("int4@64:signmax:e8m0", "e8m0 has no sign", "bf16"),
        ("nf4@64:rms", "nf is a table on", "nf4@64"),
        ("bof4-s@64:absmax", "made for the signed maximum", "signmax"),
        ("af4@64:signmax", "made for the absolute maximum", "absmax"),
        ("bof4@64:signmax", "made for the absolute maximum", "bof4-s"),
        ("nf4@64:signmax:dq8", "dq8 has no sign", "bf16"),
        ("nf4@64:e8m0-even", "needs an element with an exponent", "float4_e2m1"),
        ("float4_e2m1@64:rms:e8m0-even", "starts from the absmax", "without a rule"),
        ("int4@16:fouroversix:e4m3", "NVFP4's two scales", "float4_e2m1@16:fouroversix:e4m3"),
        ("int4@64+outliers2", "between 0 and 1", "outliers0.001"),
        ("int4@64+opq0", "between 0 and 1", "opq0.95"),
        ("int4@64+threshold0", "a positive multiple", "threshold6"),
        ("int4@64+hadamard+rotate", "more than one rotation", "hadamard or rotate"),
        ("int4@64+outliers0.1+opq0.9", "more than one rule", "opq"),
        ("int4@64+rotate+rotate", "more than one rotation", "rotate"),
        ("mxfp4+unbiased", "unbiased corrects", "bf16"),
        ("q4_k+hadamard", "takes no options", "q4_k"),
        ("nf4@64+", "no option ''", "outliers"),
        ("float4_e2m1@32:e8m0+unbiased", "unbiased corrects", "bf16"),
        ("power0_4@64", "an exponent of 0", "0.05"),
        ("power4_4@64:rms", "power is a table", "@64"),
        ("lloyd1@64", "from 3 to 4096", "lloyd4"),
        ("bof9@64", "up to 256 codes", "8 bits"),
        ("int9-mx@64", "whole widths from 2 to 8", "int4-mx"),
        ("t_4-opt@64", "a given nu", "t7_4-opt"),
        ("sf4-nu0@64", "sf has no mode", "sf4-nu4"),
        ("nf4@64:serch", "no statistic", "did you mean search"),
        ("nvfp5", "no format", "did you mean nvfp4"),
        ("int1-asym@64", "at least 4 codes", "-sym"),
        ("normal1-opt@64", "at least 4 codes", "2 bits"),
        ("int4@64:bf16:absmax", "comes before", "absmax:bf16"),
        ("int4@64:", "nothing after a colon", "absmax"),
        ("int４@64", "not a family, bits and mode", "int4"),
        ("t٧_4@64", "not a family, bits and mode", "t5_4"),
        ("int4@99999999999", "no granularity", "64"),
        ("int4@64+outlier0.01", "no option", "outliers0.001"),
        ("grid3@tensor:absmax-search", "no statistic", "absmax"),
        ("grid3@tensor:search", "search does not apply", "rms, absmax"),
        ("grid3@64:signmax", "signmax does not apply", "rms, absmax"),
        ("grid3-sym@64", "grid has no mode 'sym'", "no mode"),
        ("grid0.05@tensor", "0.05 bits", "0.1 to 10"),
        ("grid10.5@tensor", "10.5 bits", "0.1 to 10"),
        ("grid99999@tensor", "99999 bits", "0.1 to 10"),
        ("grid3@4", "of which scales take 4", "4.1 bits or more"),
        ("grid0.3@64", "of which scales take 0.25", "0.35 bits or more"),
        ("grid9@1", "of which scales take 16", "larger block"),
        ("grid3_e1m1@64", "exponent and mantissa", "grid3"),
        ("grid@64", "not a family, bits and mode", "grid3.0"),
        ("grid3@tensor+ransx77", "follow from its bits", "+rans"),
        ("grid3@tensor+huffmanx77", "follow from its bits", "+huffman"),
        ("int4@64+rans+huffman", "more than one entropy code", "rans or huffman"),
        ("int4@64+rans+ransx5", "more than one entropy code", "rans"),
        ("int13@64+huffman", "8192 codes", "12 bits, or rans"),
        ("q4_k+rans", "takes no options", "q4_k"),
        ("int4@64+rans5", "no option 'rans5'", "rans"),
        ("int4@64+ransx", "no option 'ransx'", "rans"),
        ("higgs3-p7@64", "higgs has no mode 'p7'", "-p6"),
        ("higgs@64", "not a family, bits and mode", "higgs3-p2"),
        ("higgs4-p4@64", "65536 points", "3 bits at most for p4"),
        ("higgs11-p1@64", "2048 points", "10 bits at most for p1"),
        ("higgs16-p6@64", "points", "2 bits at most for p6"),
        ("higgs0.5-p6@64", "0.5 bits", "1 to 16"),
        ("higgs3@64:absmax", "not absmax", "rms"),
        ("higgs3@64:rms-search", "not rms-search", "rms"),
        ("higgs3@64:e4m3", "with e4m3 scales", "fp16"),
        ("higgs3@64+rans", "a fixed length", "grid3@tensor"),
        ("higgs3@64+columns", "scales of columns", "grid3@tensor+columns"),
        ("higgs3@64+hadamard+rotate", "more than one rotation", "hadamard or rotate"),
        ("", "no element format", "known"),
        ("@:+", "no element format", "known"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason_and_what_works(text: str, reason: str, hint: str) -> None:
    with pytest.raises(InvalidFormat, match=reason) as refused:
        parse(text)
    assert hint in refused.value.hint


@pytest.mark.parametrize("name", [name for name in BLOCK_NAMES if name not in ALIASES])
def test_a_block_type_is_a_format_of_its_own_name(name: str) -> None:
    fmt = parse(name.upper())
    assert (str(fmt), fmt.is_block_type, fmt.allowed_widths()) == (name, True, (fmt.bits,))
    with pytest.raises(InvalidFormat, match="one width"):
        fmt.with_bits(3)


@pytest.mark.parametrize(
    ("text", "fitted", "value", "given"),
    [
        ("t_4@64", "nu", 5.5, "t5.5_4-asym@64:absmax:bf16"),
        ("power4@64", "alpha", 0.62, "power0.62_4@64:absmax:bf16"),
        ("float6@64", "exponent_bits", 3.0, "float6_e3m2@64:absmax:bf16"),
    ],
)
def test_what_is_fitted_has_a_form_in_which_it_is_given(text: str, fitted: str, value: float, given: str) -> None:
    assert parse(text).fitted == fitted
    assert str(parse(text).with_fitted(value)) == given
    with pytest.raises(InvalidFormat):
        parse(given).with_fitted(value)
    with pytest.raises(InvalidFormat):
        parse(text).with_fitted(-1.5)


@given(st.text(max_size=60))
def test_any_other_text_is_a_format_or_an_error_of_ours(text: str) -> None:
    try:
        fmt = parse(text)
    except InvalidFormat:
        return
    assert parse(str(fmt)) == fmt


@given(
    st.from_regex(
        r"(int|float|t|t5_|normal|nf|laplace|power|sf|af|bof|lloyd|grid|higgs)[0-9.]{1,9}(_e[0-9]{1,4}m[0-9]{1,4})?@[a-z0-9:+.-]{0,20}"
    )
)
def test_texts_that_are_nearly_formats_never_fail_in_another_way(text: str) -> None:
    with contextlib.suppress(InvalidFormat):
        parse(text)


def test_a_format_does_not_change() -> None:
    fmt = parse("int4@64")
    with pytest.raises(FrozenInstanceError):
        fmt.bits = 3  # type: ignore[misc]


@pytest.mark.parametrize("text", ["int4@64+threshold1e20", "t1e16_4@64", "int4@64+outliers1e-05"])
def test_numbers_of_any_size_read_back(text: str) -> None:
    assert parse(str(parse(text))) == parse(text)


def test_an_even_width_of_a_base_with_an_odd_number_of_codes_has_the_default_mode() -> None:
    assert str(parse("normal3.17@64:dq8").with_bits(4)) == "normal4-asym@64:absmax:dq8"


def test_a_recipe_does_not_say_how_many_outliers_there_are() -> None:
    with pytest.raises(BitmillError, match="stands in artefacts"):
        load_recipe({"version": 1, "target": {"bits_per_param": 4}, "format": "int4@64+opq0.95x7"})


@pytest.mark.parametrize("name", sorted(SCALE_BITS))
@pytest.mark.parametrize("block", [4, 16, 64, 1000])
def test_a_grid_of_blocks_leaves_its_codes_a_tenth_of_a_bit(block: int, name: str) -> None:
    share = SCALE_BITS[name] / block
    fmt = parse(f"grid{share + 0.101:.5f}@{block}:{name}")
    assert fmt.element_bits == pytest.approx(0.101, abs=1e-5)
    assert parse(f"grid{share + 0.101:.5f}@channel:{name}").element_bits == fmt.bits
    with pytest.raises(InvalidFormat, match="of which scales take"):
        parse(f"grid{share + 0.099:.5f}@{block}:{name}")


@given(bits=st.floats(0.1, 10))
def test_a_grid_may_have_any_rate(bits: float) -> None:
    fmt = TensorFormat("grid", bits, granularity="tensor")
    assert fmt.bits == fmt.element_bits == bits
    assert parse(str(fmt)) == fmt
    assert (fmt.is_grid, fmt.is_codebook, fmt.fitted, fmt.entropy_code) == (True, False, None, "rans")
    assert fmt.kind == "grid@tensor:rms:bf16+rans"


def test_widths_of_a_grid_are_half_steps_above_what_its_scales_take() -> None:
    assert parse("grid3@tensor").allowed_widths() == tuple(half / 2 for half in range(2, 17))
    assert parse("grid5@16").allowed_widths() == tuple(half / 2 for half in range(3, 17))
    assert parse("grid3@tensor").with_bits(7.13) == parse("grid7.13@tensor")
    with pytest.raises(InvalidFormat):
        parse("grid5@16").with_bits(1)


@pytest.mark.parametrize("mode", VECTOR_MODES)
def test_widths_of_a_grid_of_vectors_are_those_with_a_power_of_two_of_points(mode: str) -> None:
    fmt, vector = parse(f"higgs2-{mode}@64"), int(mode[1:])
    found = {fmt.with_bits(bits).codes for bits in fmt.allowed_widths()}
    assert found == {2**k for k in range(2 * vector, min(12, 8 * vector) + 1)}
    assert {fmt.with_bits(bits).vector for bits in fmt.allowed_widths()} == {vector}
    assert max(2 * codes * vector for codes in found) <= 1 << 16


def test_a_grid_of_vectors_has_a_code_for_several_weights() -> None:
    fmt = parse("higgs2.333-p3@64")
    assert (fmt.codes, fmt.vector, fmt.is_vector_grid, fmt.is_codebook, fmt.fitted) == (128, 3, True, False, None)
    assert fmt.element_bits == pytest.approx(7 / 3)
    assert parse("int4@64").vector == 1


@pytest.mark.parametrize("name", sorted({*RoundingSpec.KNOWN} - {"nearest"}))
def test_methods_that_round_weights_one_by_one_refuse_a_grid_of_vectors(name: str) -> None:
    fmt = parse("higgs3@1024")
    assert RoundingSpec(name="nearest").stored_format(fmt) == fmt
    with pytest.raises(InvalidFormat, match="several share a code") as refused:
        RoundingSpec(name=name).stored_format(fmt)
    assert "nearest" in refused.value.hint


def test_a_grid_whose_scales_take_nearly_all_has_its_own_width() -> None:
    fmt = parse("grid9@2")
    assert fmt.allowed_widths() == (9.0,)


@pytest.mark.parametrize("name", ENTROPY_CODES)
def test_the_bytes_of_codes_are_found_and_written_behind_the_option(name: str) -> None:
    fmt = parse(f"nf4@64+opq0.95+{name}")
    found = fmt.with_outliers_found(12).with_coded_bytes(345)
    assert str(found) == f"nf4@64:absmax:bf16+opq0.95x12+{name}x345"
    assert (found.entropy_code, found.coded_bytes, fmt.coded_bytes) == (name, 345, None)
    assert found.kind == fmt.kind == str(fmt)
    assert found.with_coded_bytes(7).coded_bytes == 7
    assert found.without_code == parse("nf4@64+opq0.95x12")


def test_a_grid_and_a_format_without_a_code_have_no_bytes_to_be_found() -> None:
    for fmt in (parse("grid3@tensor"), parse("int4@64")):
        assert fmt.with_coded_bytes(77) == fmt
    assert parse("int4@64").entropy_code is None
    assert parse("int4@64").without_code == parse("int4@64")


@pytest.mark.parametrize("field", ["format", "overrides"])
def test_a_recipe_does_not_say_how_many_bytes_codes_take(field: str) -> None:
    text = "int4@64+ransx77"
    given_ = text if field == "format" else [{"match": "a", "format": text}]
    with pytest.raises(BitmillError, match="stands in artefacts"):
        load_recipe({"version": 1, "target": {"bits_per_param": 4}, "format": "int4@64", field: given_})
