"""The compiled kernels of the CPU give what the torch reference gives, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import NonFiniteWeights
from core.formats.elements import ElementTable, element_table, shared_weights, stored_codes
from core.formats.stored import packed_bytes
from core.recipe.tensor_format import TensorFormat, parse
from core.tensors import packing
from core.tensors.indices import nearest_indices, uses_quotients
from core.tensors.kernels import cpu, cpu_packing
from core.tensors.kernels.cpu_rule import Method, RoundingRule, rounding_rule
from core.tensors.nearest import encode_nearest
from core.tensors.passes import Compiled, Encoded, Reference
from core.tensors.scales import absmax, signed_extreme

FORMATS = [
    "int4-asym@64",
    "int4-sym@64",
    "int3@64:signmax",
    "int8@64",
    "int8-sym@64",
    "int2.58@64",
    "int6-mx@64",
    "nf4@64",
    "t5_4@64:signmax",
    "t5_3@64",
    "t7_6@64",
    "t7_7@64",
    "t7_8@64:signmax",
    "normal3-sym@64:rms",
    "normal5@64:rms",
    "float4_e2m1@64",
    "float4_e2m1@64:absmax:e4m3",
    "float4_e2m1@64:signmax",
    "float8_e4m3@64",
    "float8_e5m2@64",
    "float6_e3m2-ieee@64",
    "float5_e4m0@64",
]
IN_ONE_PASS = [
    "int4-asym@64",
    "int4-sym@32:absmax:fp32",
    "int3@64:signmax",
    "int2@24:rms",
    "int4-mx@32:absmax:e8m0",
    "int3-mx@32:rms:e8m0",
    "nf4@64:absmax:fp32",
    "bof4-s@64",
    "t5_4@64:signmax",
    "normal3-sym@64:rms",
    "normal4@channel:rms:fp32",
    "t7_3.58@10",
    "t7_5@64:absmax:e8m0",
    "float4_e2m1@32:absmax:e8m0",
    "float4_e2m1@16:absmax:e8m0-even",
    "float4_e2m1@16:absmax:e8m0-ceil",
    "float3_e1m1@7",
]
IN_TWO = [
    "int8@64",
    "int4@64:absmax:fp16",
    "int4@tensor",
    "nf4@64:absmax:dq8",
    "int4@32:search",
    "float4_e2m1@16:absmax:e4m3",
    "t7_8@64",
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PATTERNS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
RADICES = [2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 20, 23, 24, 32, 48, 64, 96, 128, 192, 200, 255, 256]
GRIDS = [(256, 64), (64, 16), (1, 1), (7, 3), (33, 32), (5, 64), (100, 33)]  # columns, width


@dataclass(frozen=True)
class Case:
    """A format with its table, and the rule that rounds to it."""

    fmt: TensorFormat
    table: ElementTable
    rule: RoundingRule


@cache
def case(text: str) -> Case:
    fmt = parse(text)
    table = element_table(fmt, 64)
    stored = stored_codes(fmt, len(table.values))
    ties = table if fmt.is_codebook else replace(table, upper_on_tie=reference_ties(fmt, table))
    rule = rounding_rule(ties, exact=not fmt.is_codebook, stored=stored, quotients=uses_quotients(fmt))
    return Case(fmt, table, rule)


def reference_ties(fmt: TensorFormat, table: ElementTable) -> tuple[bool, ...]:
    limits = torch.tensor([table.limits], dtype=torch.float32)
    found = nearest_indices(limits, torch.ones(1), fmt, table)[0].tolist()
    return tuple(index > low for low, index in enumerate(found))


def blocks_of(piece: torch.Tensor, columns: int, width: int) -> list[torch.Tensor]:
    return [block for row in torch.split(piece.float(), columns) for block in torch.split(row, width)]


def reference_codes(case: Case, piece: torch.Tensor, scales: torch.Tensor, columns: int, width: int) -> torch.Tensor:
    blocks = blocks_of(piece, columns, width)
    length = max((block.numel() for block in blocks), default=0)
    padded = torch.stack([torch.nn.functional.pad(block, (0, length - block.numel())) for block in blocks])
    indices = nearest_indices(padded, scales, case.fmt, case.table)
    found = torch.cat([row[: block.numel()] for row, block in zip(indices, blocks, strict=True)]).long()
    stored = stored_codes(case.fmt, len(case.table.values))
    return found if stored is None else torch.tensor(stored)[found]


def drawn(count: int, dtype: torch.dtype, seed: int, kind: str = "normal") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "normal":
        return torch.randn(count, generator=generator).to(dtype)
    bits = torch.iinfo(PATTERNS[dtype])
    patterns = torch.randint(bits.min, bits.max + 1, (count,), generator=generator).to(PATTERNS[dtype])
    values = patterns.view(dtype)
    return torch.where(torch.isfinite(values.float()), values, torch.zeros((), dtype=dtype))


def scales_for(case: Case, piece: torch.Tensor, columns: int, width: int) -> torch.Tensor:
    found = cpu.statistics(piece, columns, width, "signmax" if case.fmt.base_statistic == "signmax" else "absmax")
    end = case.table.signmax_end if case.fmt.base_statistic == "signmax" else case.table.values[-1]
    return (found.extreme / end).bfloat16().float().clamp(-3e38, 3e38)


def check_codes(case: Case, piece: torch.Tensor, scales: torch.Tensor, columns: int, width: int) -> None:
    got = cpu.encode_codes(piece, 0, piece.numel(), scales, case.rule, columns, width)
    assert got.dtype == torch.uint8
    assert got.tolist() == reference_codes(case, piece, scales, columns, width).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", FORMATS)
def test_codes_are_those_of_the_reference(text: str, dtype: torch.dtype) -> None:
    for seed, (columns, width) in enumerate(GRIDS):
        piece = drawn(columns * 3, dtype, seed)
        check_codes(case(text), piece, scales_for(case(text), piece, columns, width), columns, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", FORMATS)
def test_any_finite_pattern_and_scale_is_rounded_as_the_reference_rounds_it(text: str, dtype: torch.dtype) -> None:
    piece = drawn(64 * 40, dtype, 1, "patterns")
    scales = drawn(40, torch.float32, 2, "patterns")
    scales[:10] = drawn(10, torch.bfloat16, 3).float()
    scales[10] = 0.0
    scales[11] = 1e-38
    check_codes(case(text), piece, scales if case(text).fmt.base_statistic == "signmax" else scales.abs(), 64, 64)


@pytest.mark.parametrize("text", ["nf4@64", "t7_7@64", "t7_8@64:signmax"])
def test_limits_that_underflow_are_compared_as_the_rule_of_codebooks_says(text: str) -> None:
    piece = torch.arange(-300, 301).float() * 2.0**-149
    for scale in (2.0**-149, 3 * 2.0**-149, 100 * 2.0**-149, 1e-39):
        limits = (torch.tensor(case(text).table.limits, dtype=torch.float64) * scale).float()
        got = cpu.encode_codes(piece, 0, 601, torch.tensor([scale]), case(text).rule, 601, 601)
        assert got.tolist() == (piece[:, None] > limits).sum(dim=1).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", FORMATS)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_numbers_on_and_beside_a_limit_are_rounded_as_the_reference_rounds_them(
    text: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    limits = torch.tensor(case(text).table.limits, dtype=torch.float64)
    power = data.draw(st.integers(-4, 4))
    factor = data.draw(st.sampled_from([1.0, 1.5, 1.0078125, 0.7001953125, 1 / 3]))
    scale = torch.tensor(factor * 2.0**power, dtype=torch.float32)
    on = (limits * scale.double()).float().to(dtype)
    patterns = on.view(PATTERNS[dtype])
    piece = torch.cat((on, (patterns + 1).view(dtype), (patterns - 1).view(dtype), -on, on * 0, -(on * 0)))
    piece = torch.where(piece.float().abs() < 1e4, piece, torch.ones((), dtype=dtype))  # -1 of pattern 0 is NaN
    sign = -1 if case(text).fmt.base_statistic == "signmax" and data.draw(st.booleans()) else 1
    check_codes(case(text), piece, scale.reshape(1) * sign, piece.numel(), piece.numel())


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("int4@64", Method.COUNT),
        ("int8-sym@64", Method.GRID),
        ("int6-mx@64", Method.GRID),
        ("nf4@64", Method.COUNT),
        ("t7_8@64", Method.GUIDE),
        ("float4_e2m1@64", Method.COUNT),
        ("float4_e2m1@16:absmax:e4m3", Method.FLOAT),
        ("float8_e4m3@64", Method.FLOAT),
    ],
)
def test_formats_are_rounded_by_the_fastest_loop_that_gives_their_codes(text: str, method: Method) -> None:
    assert case(text).rule.method is method


def test_an_exact_table_of_no_known_shape_is_counted_with_its_ties() -> None:
    table = ElementTable((-3.0, -1.0, 0.5, 2.0), (True, False, True))
    rule = rounding_rule(table, exact=True, stored=(3, 2, 1, 0))
    piece = torch.tensor([-2.0, -0.25, 1.25, 1.2499, -2.0001, 9.0])
    assert rule.method is Method.COUNT
    assert cpu.encode_codes(piece, 0, 6, torch.ones(1), rule, 6, 6).tolist() == [2, 2, 0, 1, 3, 0]


@pytest.mark.parametrize("text", ["int4-sym@64", "int8-sym@64"])
def test_between_halves_even_limits_belong_below_and_the_least_number_lies_beside_them(text: str) -> None:
    numbers = torch.tensor([0.0, -0.0, 2.0**-140, -(2.0**-140), 1.0, -1.0, 2.0, -2.0, 1.0000001, 1.9999999])
    expected = torch.tensor([-0.5, -0.5, 0.5, -0.5, 1.5, -0.5, 1.5, -2.5, 1.5, 1.5])
    values = torch.tensor(case(text).table.values)
    indices = nearest_indices(numbers[None], torch.ones(1), case(text).fmt, case(text).table)[0]
    codes = cpu.encode_codes(numbers, 0, 10, torch.ones(1), case(text).rule, 10, 10)
    assert values[indices.long()].tolist() == expected.tolist()
    assert values[codes.long()].tolist() == expected.tolist()


def awkward(dtype: torch.dtype, shape: tuple[int, ...], fmt: TensorFormat) -> torch.Tensor:
    """Rows: normal, zeros, denormals, huge numbers, equal magnitudes, limits and what lies beside them."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    rows = weight.reshape(-1, shape[-1]) if shape and weight.numel() else weight.reshape(-1, 1)
    info = torch.finfo(dtype)
    factors = (1.0, 0.0, -0.0, 9 * info.smallest_normal * info.eps, info.max / 8)[: len(rows)]
    rows[: len(factors)] *= torch.tensor(factors)[:, None]
    if len(rows) > 7:
        table = element_table(fmt, shared_weights(fmt, shape))
        near = torch.tensor(table.limits, dtype=torch.float32)[torch.arange(shape[-1]) % len(table.limits)]
        rows[5], rows[6], rows[7] = near, near * (1 + info.eps), torch.where(near > 0, 1.0, -1.0)
        rows[5:7, ::7] = table.signmax_end if fmt.base_statistic == "signmax" else table.absmax_end
    return weight.to(dtype)


def in_one_pass(weight: torch.Tensor, fmt: TensorFormat) -> Encoded | None:
    shape = tuple(weight.shape)
    return Compiled(weight.reshape(-1), fmt, shape).whole(element_table(fmt, shared_weights(fmt, shape)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", IN_ONE_PASS)
def test_one_pass_gives_the_scales_and_codes_of_the_reference(
    text: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.tensors.nearest.passes_for", Reference)
    for shape in [(12, 192), (9, 47), (130, 64), (2, 20_000), (3, 2, 5), (7,), (1, 1)]:
        weight = awkward(dtype, shape, parse(text))
        found, expected = in_one_pass(weight, parse(text)), encode_nearest(weight, parse(text))
        assert found is not None
        assert torch.equal(found.codes, expected.codes)
        assert found.scales.dtype == expected.scales.dtype
        assert torch.equal(found.scales.view(torch.uint8), expected.scales.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("text", IN_TWO)
def test_what_depends_on_the_whole_tensor_or_has_too_many_values_takes_two_passes(text: str) -> None:
    assert in_one_pass(drawn(256, torch.bfloat16, 0).view(2, 128), parse(text)) is None
    assert in_one_pass(torch.zeros(3, 0), parse("int4@channel")) is None


def test_one_pass_over_many_pieces_is_the_same_on_any_number_of_threads() -> None:
    weight, threads = drawn(3 << 19, torch.bfloat16, 0).view(-1, 96), torch.get_num_threads()
    alone = in_one_pass(weight, parse("int3@96"))
    try:
        torch.set_num_threads(3)
        together = in_one_pass(weight, parse("int3@96"))
    finally:
        torch.set_num_threads(threads)
    assert alone is not None
    assert together is not None
    assert torch.equal(alone.codes, together.codes)
    assert torch.equal(alone.scales, together.scales)


@pytest.mark.parametrize("text", ["int4@64", "int3@64:signmax", "int4@64:rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pass_names_the_first_element_that_is_no_number(text: str, dtype: torch.dtype) -> None:
    weight = drawn(200 * 64, dtype, 0).view(200, 64)
    weight[150, 7], weight[199, 0] = -torch.inf, torch.nan
    with pytest.raises(NonFiniteWeights, match=r"\[150, 7\]"):
        in_one_pass(weight, parse(text))


def test_a_piece_of_a_longer_tensor_is_encoded_as_if_it_stood_alone() -> None:
    flat = drawn(1000, torch.bfloat16, 5)
    flat[500:] = torch.inf
    scales = scales_for(case("nf4@64"), flat[130:470], 34, 16)
    alone = cpu.encode_codes(flat[130:470].clone(), 0, 340, scales, case("nf4@64").rule, 34, 16)
    assert torch.equal(cpu.encode_codes(flat, 130, 470, scales, case("nf4@64").rule, 34, 16), alone)


@pytest.mark.parametrize("text", ["int4@64", "nf4@64", "t7_8@64", "float4_e2m1@64"])
def test_nothing_has_no_codes_and_no_statistic(text: str) -> None:
    nothing = torch.zeros(0, dtype=torch.bfloat16)
    assert cpu.statistics(nothing, 8, 8, "rms").extreme.numel() == 0
    assert cpu.encode_codes(nothing, 0, 0, torch.zeros(0), case(text).rule, 8, 8).numel() == 0
    cpu.decode(torch.zeros(0, dtype=torch.uint8), torch.ones(16), torch.zeros(0), 8, 8, torch.zeros(0))


@pytest.mark.parametrize("kind", ["normal", "patterns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_those_of_the_reference(dtype: torch.dtype, kind: str) -> None:
    for seed, (columns, width) in enumerate([*GRIDS, (9000, 9000)]):
        piece = drawn(columns * 3, dtype, seed, kind)
        piece[: piece.numel() // 4] = -piece[-(piece.numel() // 4) :] if piece.numel() > 3 else -0.0
        blocks = blocks_of(piece, columns, width)
        largest = torch.cat([absmax(block[None]) for block in blocks])
        signed = torch.cat([signed_extreme(block[None]) for block in blocks])
        found = cpu.statistics(piece, columns, width, "rms")
        assert torch.equal(found.extreme, largest)
        assert torch.equal(cpu.statistics(piece, columns, width, "signmax").extreme, signed)
        assert found.not_finite is None
        assert found.squares is not None
        assert found.squares.tolist() == [sum_of_pairs(block.double().square().tolist()) for block in blocks]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@given(exponents=st.lists(st.integers(-9, 9), min_size=1, max_size=130), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_squares_of_any_exponents_are_added_in_pairs(dtype: torch.dtype, exponents: list[int], seed: int) -> None:
    """At some distance of the exponents the order of the sum begins to matter."""
    piece = (drawn(len(exponents), dtype, seed).float() * torch.tensor(2.0) ** torch.tensor(exponents)).to(dtype)
    found = cpu.statistics(piece, piece.numel(), piece.numel(), "rms").squares
    assert found is not None
    assert found.item() == sum_of_pairs(piece.double().square().tolist())


def sum_of_pairs(numbers: list[float]) -> float:
    while len(numbers) > 1:
        numbers = [sum(numbers[at : at + 2]) for at in range(0, len(numbers), 2)]
    return numbers[0]


def test_the_first_of_equal_magnitudes_gives_the_sign_and_zeros_give_plus_zero() -> None:
    piece = torch.tensor([1.0, -3.0, 3.0, 2.0, 3.0, -3.0, 0.0, -0.0], dtype=torch.bfloat16)
    found = cpu.statistics(piece, 8, 2, "signmax").extreme
    assert found.tolist() == [-3.0, 3.0, 3.0, 0.0]
    assert not torch.signbit(found[3])
    assert not torch.signbit(cpu.statistics(-piece[6:], 2, 2, "absmax").extreme).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("statistic", ["absmax", "signmax", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_element_that_is_no_number_is_named(dtype: torch.dtype, statistic: str, bad: float) -> None:
    piece = drawn(100, dtype, 0)
    piece[[37, 60]] = bad
    assert cpu.statistics(piece, 50, 16, statistic).not_finite == 37


@pytest.mark.parametrize(
    "radix", [2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 20, 23, 24, 32, 48, 64, 96, 128, 192, 200, 255, 256]
)
def test_packing_is_that_of_the_reference_and_has_an_inverse(radix: int) -> None:
    for count in (0, 1, 2, 7, 8, 9, 64, 1003):
        codes = torch.from_numpy(np.random.default_rng(count).integers(0, radix, count).astype(np.uint8))
        packed = cpu_packing.pack_planes(codes, radix)
        assert [part.tolist() for part in packed] == [part.tolist() for part in packing.pack_planes(codes, radix)]
        assert sum(part.numel() for part in packed) == packed_bytes(radix, count)
        assert torch.equal(cpu_packing.unpack_planes(packed, radix, count), codes)


@pytest.mark.parametrize("radix", [3, 5, 6, 11, 12, 16, 24, 200])
def test_bytes_that_nothing_packed_unpack_as_in_the_reference(radix: int) -> None:
    count = 240
    packed = [torch.randint(0, 256, part.shape, dtype=torch.uint8) for part in pack_of_zeros(count, radix)]
    assert torch.equal(
        cpu_packing.unpack_planes(packed, radix, count), packing.unpack_planes(packed, radix, count).to(torch.uint8)
    )


def pack_of_zeros(count: int, radix: int) -> list[torch.Tensor]:
    return packing.pack_planes(torch.zeros(count, dtype=torch.uint8), radix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("values", [[-8.0 + code for code in range(16)], [-1.0, -0.3, 0.1, 1.0], [0.25] * 256, [2.0]])
def test_decoding_is_one_product_in_fp32_and_one_rounding(values: list[float], dtype: torch.dtype) -> None:
    rows, columns, width, per_row = 30, 100, 40, 3
    table, codes = torch.tensor(values), torch.randint(0, 256, (rows * columns,), dtype=torch.uint8)
    for kind in ("normal", "patterns"):
        scales = drawn(rows * per_row, torch.float32, 1, kind)
        spread = scales.view(rows, per_row).repeat_interleave(width, dim=1)[:, :columns].reshape(-1)
        expected = table[codes.long().clamp(max=len(values) - 1)] * spread
        got = torch.empty(rows * columns, dtype=dtype)
        cpu.decode(codes, table, scales, columns, width, got)
        assert torch.equal(got.view(PATTERNS[dtype]), expected.to(dtype).view(PATTERNS[dtype]))


def test_bf16_output_keeps_infinities_and_nan() -> None:
    table, scales = torch.tensor([1.0, -1.0]), torch.tensor([torch.inf, torch.nan, 3.4e38])
    got = torch.empty(6, dtype=torch.bfloat16)
    cpu.decode(torch.tensor([0, 1] * 3, dtype=torch.uint8), table, scales, 6, 2, got)
    assert got[:2].tolist() == [torch.inf, -torch.inf]
    assert torch.isnan(got[2:4]).all()
    assert got[4:].tolist() == [torch.inf, -torch.inf]


def test_pieces_come_back_in_order_from_any_number_of_threads() -> None:
    flat = drawn(64 * 64, torch.bfloat16, 0)
    scales = scales_for(case("nf4@64"), flat, 64, 64)

    def encoded(block: int) -> torch.Tensor:
        start = block * 64
        return cpu.encode_codes(flat, start, start + 64, scales[block : block + 1], case("nf4@64").rule, 64, 64)

    whole = cpu.encode_codes(flat, 0, flat.numel(), scales, case("nf4@64").rule, 64, 64)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(torch.cat(cpu.over_pieces(encoded, range(64))), whole)
    finally:
        torch.set_num_threads(threads)


def test_kernels_say_what_they_support() -> None:
    assert all(cpu.supports(dtype, 256) for dtype in DTYPES)
    assert not cpu.supports(torch.float64, 16)
    assert not cpu.supports(torch.bfloat16, 257)


def test_numba_is_imported_when_it_is_needed_and_needs_no_folder_that_it_may_write_to() -> None:
    code = """
import sys, torch
from core.recipe.tensor_format import parse
from core.tensors.nearest import encode_nearest
print("numba" in sys.modules)
from numba.core import caching

def refuse(self):
    raise PermissionError

caching._CacheLocator.ensure_cache_path = refuse
print(encode_nearest(torch.tensor([[-1.0, 1.0]]), parse("int8@2:absmax:fp32")).codes.tolist())
from core.tensors.kernels import cpu_jit
print(cpu_jit.block_absmax.stats.cache_path)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split("\n")[:3] == ["False", "[1, 255]", "None"]
