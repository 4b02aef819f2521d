"""How many bytes entropy-coded formats are planned to take: a grid its rate, others what was found in the tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidFormat
from core.formats.stored import CENTROIDS, LEAST_CODED, stored_parts
from core.recipe.tensor_format import TensorFormat, parse

BYTES = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8}
SCALES = {"bf16": 16.0, "fp16": 16.0, "fp32": 32.0, "e8m0": 8.0, "e4m3": 8.0, "dq8": 8.125}
Parts = Mapping[str, tuple[str, tuple[int, ...]]]
SHAPES = st.lists(st.integers(0, 300), max_size=3).map(tuple)
LARGE = st.tuples(st.integers(100, 3000), st.integers(1000, 3000))


def nbytes(parts: Parts) -> int:
    return sum(BYTES[kind] * math.prod(size) for kind, size in parts.values())


@st.composite
def grids(draw: st.DrawFn) -> TensorFormat:
    scale = draw(st.sampled_from(sorted(SCALES)))
    block = draw(st.sampled_from([4, 7, 16, 64, 1000]) | st.none())
    granularity = draw(st.sampled_from(["tensor", "channel"])) if block is None else str(block)
    least = 0.1 + (SCALES[scale] / block if block else 0)
    option = draw(st.sampled_from(["", "+outliers0.001", "+hadamard", "+rotate", "+huffman", "+outliers0.1+rotate"]))
    return parse(f"grid{draw(st.floats(least + 1e-3, 10)):.4f}@{granularity}:{scale}{option}")


@given(fmt=grids(), shape=SHAPES | LARGE)
def test_all_parts_of_a_grid_take_its_rate_or_what_they_need_at_least(
    fmt: TensorFormat, shape: tuple[int, ...]
) -> None:
    parts = stored_parts(fmt, shape)
    others = nbytes({name: part for name, part in parts.items() if name != "codes"})
    codes = max(math.floor(fmt.element_bits * math.prod(shape) / 16), LEAST_CODED)
    assert nbytes(parts) == max(math.floor(fmt.bits * math.prod(shape) / 8), others + codes)
    assert parts["codes"][1][0] >= LEAST_CODED
    assert (parts["step"], parts["centroids"]) == (("F32", (1,)), ("F16", (CENTROIDS,)))
    assert "codebook" not in parts


@given(fmt=grids().filter(lambda fmt: not fmt.outlier_rule and fmt.bits > 0.5 + 2 * SCALES[fmt.scale_format] / 1000))
def test_long_tensors_take_the_rate_to_a_byte(fmt: TensorFormat) -> None:
    count = 4096 * 14_000
    assert nbytes(stored_parts(fmt, (4096, 14_000))) == math.floor(fmt.bits * count / 8)


def test_a_grid_needs_nothing_that_is_not_stored() -> None:
    names = {name: set(stored_parts(parse(f"grid4@{name}"), (64, 64))) for name in ("tensor", "64:e4m3", "64:dq8")}
    common = {"codes", "scales", "step", "centroids"}
    assert names == {
        "tensor": common,
        "64:e4m3": common | {"tensor_scale"},
        "64:dq8": common | {"scale_offset", "scale_absmax"},
    }


@pytest.mark.parametrize("method", ["rans", "huffman"])
@pytest.mark.parametrize("text", ["int4@64", "nf4@64:dq8", "t_4@channel+hadamard", "lloyd4@tensor"])
def test_the_codes_of_other_formats_take_what_was_found(text: str, method: str) -> None:
    plain, fmt = stored_parts(parse(text), (30, 128)), parse(f"{text}+{method}")
    with pytest.raises(InvalidFormat, match="only the data tell") as refused:
        stored_parts(fmt, (30, 128))
    assert f"+{method}x" in refused.value.hint
    given_, found = stored_parts(parse(f"{text}+{method}x77"), (30, 128)), stored_parts(fmt, (30, 128), coded=77)
    assert given_ == found == plain | {"codes": ("U8", (77,))}
    assert stored_parts(parse(f"{text}+{method}x77"), (30, 128), coded=99) == found


def test_what_was_found_of_outliers_and_codes_stands_in_one_format() -> None:
    fmt = parse("nf4@64+opq0.95x12+ransx345")
    assert stored_parts(fmt, (16, 64))["codes"] == ("U8", (345,))
    assert stored_parts(fmt, (16, 64))["outlier_values"] == ("BF16", (12,))


def test_outliers_that_the_data_tell_are_taken_from_a_grids_codes() -> None:
    fmt = parse("grid3@tensor+opq0.95")
    with pytest.raises(InvalidFormat, match="outliers"):
        stored_parts(fmt, (64, 64))
    few, many = (stored_parts(fmt, (64, 64), count) for count in (1, 50))
    assert nbytes(few) == nbytes(many) == 3 * 64 * 64 // 8
    assert few["codes"][1][0] > many["codes"][1][0] + 2 * 49
