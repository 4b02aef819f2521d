"""Searched scales: never worse than the statistic, the first of equals, the same for threads, pieces and kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.formats.elements import element_table
from core.recipe.tensor_format import parse
from core.tensors.errors import squared_error
from core.tensors.indices import nearest_indices, uses_quotients
from core.tensors.kernels import cpu_search
from core.tensors.nearest import encode_nearest
from core.tensors.scale_formats import decoded_scales, stored_scales, tensor_scale
from core.tensors.scales import extreme_of, sum_of_squares
from core.tensors.search import best_scales, block_error, candidates

PAIRS = [
    ("int4-asym@16:{}:bf16", "absmax", "search"),
    ("int4-asym@16:{}:fp16", "signmax", "signmax-search"),
    ("int4-sym@16:{}:fp32", "absmax", "search"),
    ("nf4@16:{}:bf16", "absmax", "search"),
    ("bof4-s@16:{}:bf16", "signmax", "signmax-search"),
    ("t5_4@16:{}:bf16", "rms", "rms-search"),
    ("normal6@16:{}:bf16", "absmax", "search"),
    ("float4_e2m1@16:{}:e8m0", "absmax", "search"),
    ("float6_e3m2@16:{}:e8m0-even", "absmax", "search"),
    ("int8-mx@16:{}:e8m0", "absmax", "search"),
    ("int4-sym@16:{}:e8m0", "absmax", "search"),
    ("t5_4@16:{}:e8m0", "rms", "rms-search"),
    ("float4_e2m1@16:{}:e4m3", "absmax", "search"),
    ("float4_e2m1@16:{}:e4m3", "signmax", "signmax-search"),
    ("int4-sym@16:{}:e4m3", "absmax", "search"),
]


def statistic_of(blocks: torch.Tensor, name: str, width: int) -> torch.Tensor:
    """What the encoder starts from."""
    return (sum_of_squares(blocks) / width).sqrt().float() if name == "rms" else extreme_of(blocks, name)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def errors_of(weight: torch.Tensor, text: str) -> torch.Tensor:
    """Squared error of each block of 16."""
    decoded = encode_nearest(weight, parse(text)).decode()
    return (weight.double() - decoded).square().view(-1, 16).sum(dim=1)


@pytest.mark.parametrize(("text", "plain", "search"), PAIRS)
@settings(max_examples=12)
@given(st.integers(0, 2**31), st.floats(-20, 20), st.sampled_from(["normal", "heavy", "sparse", "constant"]))
def test_a_search_is_never_worse_than_the_statistic(
    text: str, plain: str, search: str, seed: int, power: float, kind: str
) -> None:
    power = power / 16 if ":fp16" in text else power  # what scales in fp16 reach
    weight = gaussian(4, 48, seed=seed) * 2.0**power
    if kind == "heavy":
        weight = weight.pow(5)
    if kind == "sparse":
        weight *= (gaussian(4, 48, seed=seed + 1) > 1).float()
    if kind == "constant":
        weight = torch.full_like(weight, float(weight[0, 0]))
    found, reference = errors_of(weight, text.format(search)), errors_of(weight, text.format(plain))
    assert bool((found <= reference * (1 + 16 * 2.0**-52)).all())  # sums of 16 squares in another order


@pytest.mark.parametrize("text", ["float4_e2m1@32:search:e8m0", "int4-mx@32:search:e8m0"])
def test_the_first_of_equal_errors_stays(text: str) -> None:
    """1 and zeros are exact under the rule's exponent and the one above it."""
    weight = torch.tensor([[1.0] + [0.0] * 31])
    plain = encode_nearest(weight, parse(text.replace("search", "absmax")))
    searched = encode_nearest(weight, parse(text))
    assert torch.equal(searched.decode(), weight)
    assert int(searched.scales) == int(plain.scales)
    assert int(encode_nearest(torch.zeros(1, 32), parse(text)).scales) == 0


def test_candidates_are_those_of_the_definition() -> None:
    extreme = torch.tensor([1.0])

    def tried(text: str) -> list[float]:
        fmt = parse(text)
        table = element_table(fmt, 16)
        constant = tensor_scale(fmt, table, extreme[0])
        return [float(decoded_scales(fmt, one, constant)) for one in candidates(fmt, table, extreme, constant)]

    assert tried("nf4@16:search:fp32") == pytest.approx([0.7 + 0.025 * step for step in range(19)], rel=1e-6)
    assert tried("t5_4@16:rms-search:fp32") == pytest.approx([2 ** (step / 4) for step in range(-8, 9)], rel=1e-6)
    assert tried("float4_e2m1@16:search:e8m0") == [0.125, 0.25, 0.5]
    assert tried("float4_e2m1@16:fouroversix:e4m3") == pytest.approx([1 / 6, 1 / 4], rel=1e-6)
    sweep = np.array(tried("float4_e2m1@16:search:e4m3")) * 6 * 448
    assert sweep == pytest.approx([320, 352, 384, 416, 448, 448, 448, 448, 448], rel=1e-6)


def test_the_sweep_beats_four_over_six_which_beats_the_plain_scale() -> None:
    weight = gaussian(256, 1024, seed=3)
    plain, four_six, sweep = (
        squared_error(weight, encode_nearest(weight, parse(f"float4_e2m1@16:{name}:e4m3")))[0]
        for name in ("absmax", "fouroversix", "search")
    )
    assert sweep < 0.97 * four_six < 0.97 * plain


def test_four_over_six_leaves_room_for_the_maximum_at_four() -> None:
    weight = torch.full((1, 32), 0.001)
    weight[0, :16] = torch.tensor([4.0, 3.0, 2.0, 1.5] * 4)
    encoded = encode_nearest(weight, parse("float4_e2m1@16:fouroversix:e4m3"))
    assert float(encoded.scales[0, 0]) == 384
    assert encoded.decode()[0, :16].tolist() == pytest.approx(weight[0, :16].tolist(), rel=1e-6)


KERNEL_FORMATS = [
    "nf4@{}:search",
    "int3.3-sym@{}:search:fp32",
    "int4-asym@{}:signmax-search",
    "int4-sym@{}:search:e8m0",
    "int8-mx@{}:search:e8m0",
    "t5_4@{}:signmax-search:fp16",
    "t5_4@{}:rms-search",
    "normal6@{}:search",
    "normal8@{}:search",
    "float4_e2m1@{}:search:e8m0-even",
    "float8_e4m3@{}:search:e8m0",
    "float4_e2m1@{}:search:e4m3",
    "float8_e5m2@{}:signmax-search:e4m3",
    "float6_e2m3@{}:search:bf16",
    "int4-asym@{}:search:e4m3",
    "power0.7_4-power@{}:search",
]


@pytest.mark.parametrize(
    ("text", "width"),
    [
        *itertools.product(KERNEL_FORMATS, (1, 7, 16, 100)),
        *itertools.product(("nf4@{}:search", "int4-asym@{}:signmax-search", "float4_e2m1@{}:search:e4m3"), (5000,)),
    ],
)
def test_the_kernel_equals_the_reference_bit_for_bit(text: str, width: int) -> None:
    fmt = parse(text.format(width))
    table = element_table(fmt, width)
    blocks = gaussian(24, width, seed=width)
    blocks[0] = 0
    blocks[1:3] *= torch.tensor([[1e-42], [1e38]])
    blocks[3] = blocks[4].clone().round()
    blocks[5] = float(np.float32(1.5))
    blocks[6, ::2] = -0.0
    extreme = statistic_of(blocks, fmt.base_statistic, width)
    constant = tensor_scale(fmt, table, extreme[7:].abs().max())
    tried = torch.stack(list(candidates(fmt, table, extreme, constant)))
    scales = decoded_scales(fmt, tried.reshape(-1), constant).view(tried.shape)
    scales[0, 8] = 0
    blocks[9] = nearest_middles(blocks[9], table.limits, float(scales[1, 9]))
    expected = torch.stack([block_error(blocks, one, fmt, table) for one in scales])
    found = cpu_search.block_errors(blocks, scales, fmt, table, quotients=uses_quotients(fmt))
    assert torch.equal(found, expected)


def nearest_middles(block: torch.Tensor, limits: tuple[float, ...], scale: float) -> torch.Tensor:
    """Numbers on limits of the table, where ties are decided."""
    chosen = torch.tensor(limits, dtype=torch.float64)[torch.arange(len(block)) % len(limits)]
    return (chosen * scale).float()


CHOICES = [*KERNEL_FORMATS, "t7_3@{}:search", "t7_5@{}:signmax-search", "int3@{}:search", "int4@{}:search"]
CHOICES += ["int5-sym@{}:search:e4m3", "t7_4@{}:signmax-search:e4m3", "float4_e2m1@{}:fouroversix:e4m3"]


def awkward(width: int) -> torch.Tensor:
    """Blocks, 16 of each kind: from smooth to all that may go wrong in a quick look."""
    normal = gaussian(16, width, seed=width)
    return torch.cat(
        [
            normal,
            normal.pow(5),
            normal * (gaussian(16, width, seed=1) > 1),
            normal.round(),
            torch.where(normal < 0, -1.0, 1.0) * 2.0 ** torch.arange(-8.0, 8.0)[:, None],
            normal[:, :1].expand(-1, width),
            normal.bfloat16().float() * 2.0 ** torch.arange(-149, -21, 8)[:, None],
            normal * 2.0 ** torch.arange(50, 114, 4)[:, None],
            torch.zeros(16, width),
        ]
    )


@pytest.mark.parametrize(
    ("text", "width"), [*itertools.product(CHOICES, (32, 50)), *itertools.product(CHOICES[-7:], (4, 64))]
)
def test_the_choice_is_the_first_of_the_least_errors(text: str, width: int) -> None:
    fmt = parse(text.format(width))
    table = element_table(fmt, width)
    blocks = awkward(width)
    extreme = statistic_of(blocks, fmt.base_statistic, width)
    constant = tensor_scale(fmt, table, extreme[:96].abs().max())
    tried = torch.stack(list(candidates(fmt, table, extreme, constant)))
    assert_first_least(blocks, decoded_scales(fmt, tried.reshape(-1), constant).view(tried.shape), text.format(width))


def assert_first_least(blocks: torch.Tensor, scales: torch.Tensor, text: str) -> None:
    """`best_candidates` against the reference's errors."""
    fmt = parse(text)
    table = element_table(fmt, blocks.shape[1])
    expected = torch.stack([block_error(blocks, one, fmt, table) for one in scales]).argmin(dim=0)
    found = cpu_search.best_candidates(blocks, scales, fmt, table, quotients=uses_quotients(fmt))
    assert torch.equal(found, expected)


SCALES = {
    "an ulp apart": lambda base: base * (1 + torch.arange(-6, 7)[:, None] * 2.0**-23),
    "an eighth of an ulp of bf16 apart": lambda base: base * (1 + torch.arange(6, -7, -1)[:, None] * 2.0**-11),
    "each twice": lambda base: base * torch.tensor([1.5, 0.9, 1.1, 0.9, 1.1, 0.8, 1.0, 0.8, 1.0])[:, None],
    "far too large and too small": lambda base: base * 2.0 ** torch.arange(-9, 30, 3)[:, None],
    "too large": lambda base: base * 2.0 ** torch.arange(1, 6)[:, None],
    "of both signs, with zeros": lambda base: base * torch.tensor([1.0, -1.0, 0.0, 0.9, -0.9])[:, None],
    "so large that decoded values are infinite": lambda base: base * torch.tensor([7e37, 1.0, 0.9, 1.1])[:, None],
}


@pytest.mark.parametrize(
    "text", ["nf4@32:search", "t7_4@32:signmax-search:e4m3", "float4_e2m1@32:search:e4m3", "int4@32"]
)
@pytest.mark.parametrize("kind", SCALES)
def test_the_choice_is_the_first_least_whatever_the_scales_are(text: str, kind: str) -> None:
    blocks = gaussian(500, 32, seed=8)
    blocks[400:] = blocks[400:].round()
    fmt = parse(text)
    end = element_table(fmt, 32).signmax_end if fmt.base_statistic == "signmax" else 1.0
    scales = SCALES[kind](extreme_of(blocks, fmt.base_statistic) / end).float()
    assert_first_least(blocks, scales, text)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    "text", ["nf4@32:search", "t7_4@32:signmax-search:e4m3", "float4_e2m1@32:search:e4m3", "int4@32"]
)
def test_a_scale_that_clips_beats_one_that_has_no_value_near(text: str, sign: float) -> None:
    """A lone weight loses 0.6 under the first scale, all of itself under the second, whose values are 0 and above 2."""
    values = torch.tensor(element_table(parse(text), 32).values)
    end = values[-1] if sign > 0 else -values[0]
    least = values[values > 1e-6].min() if sign > 0 else -values[values < -1e-6].max()
    block = torch.zeros(1, 32)
    block[0, 5] = sign
    assert_first_least(block, torch.stack([0.4 / end, 2.1 / least])[:, None], text)
    assert_first_least(block, torch.stack([2.1 / least, 0.4 / end])[:, None], text)


@settings(max_examples=40)
@given(st.lists(st.integers(-9, 9), min_size=8, max_size=8), st.lists(st.integers(1, 40), min_size=2, max_size=12))
@pytest.mark.parametrize("text", ["int4@8:search", "float4_e2m1@8:search:e4m3"])
def test_candidates_that_tie_exactly_leave_the_first(text: str, numbers: list[int], eighths: list[int]) -> None:
    """Small integers under scales in eighths: errors are exact and many are equal."""
    scales = torch.tensor(eighths)[:, None].float() / 8
    assert_first_least(torch.tensor([numbers]).float(), scales, text)


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("nf4@64:search", 0.4),
        ("int4@64:search", 0.4),
        ("t7_4@32:signmax-search:e4m3", 0.1),
        ("float4_e2m1@16:search:e4m3", 0.1),
        ("float4_e2m1@32:search:e8m0", 0.1),
        ("t7_4@64:rms-search", 0.1),
    ],
)
def test_the_quick_look_leaves_few_errors_to_compute(text: str, most: float) -> None:
    """Exact errors per block, of up to 19 candidates."""
    fmt = parse(text)
    width = int(str(fmt.granularity))
    table = element_table(fmt, width)
    blocks = gaussian(2000, width, seed=9)
    extreme = statistic_of(blocks, fmt.base_statistic, width)
    constant = tensor_scale(fmt, table, extreme.abs().max())
    tried = torch.stack(list(candidates(fmt, table, extreme, constant)))
    scales = decoded_scales(fmt, tried.reshape(-1), constant).view(tried.shape)
    asked, _ = cpu_search.undecided(fmt, table, blocks.numpy(), scales.numpy())
    assert asked.sum() < most * len(blocks)


def test_no_error_of_a_block_of_zeros_is_computed() -> None:
    fmt = parse("nf4@64:search")
    asked, best = cpu_search.undecided(
        fmt, element_table(fmt, 64), np.zeros((40, 64), np.float32), np.zeros((19, 40), np.float32)
    )
    assert not asked.any()
    assert not best.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["nf4@64:search", "t7_4@32:signmax-search:e4m3", "int4@tensor:search"])
def test_scales_are_those_of_the_fp32_copy(text: str, dtype: torch.dtype) -> None:
    weight = gaussian(64, 512, seed=10).to(dtype)
    found, expected = (encode_nearest(one, parse(text)) for one in (weight, weight.float()))
    assert torch.equal(found.scales.view(torch.uint8), expected.scales.view(torch.uint8))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_candidates_with_e4m3_scales_are_its_nine_neighbours(sign: float) -> None:
    fmt = parse("t7_4@32:signmax-search:e4m3")
    table = element_table(fmt, 32)
    end = table.signmax_end
    grid = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    wanted = torch.cat([grid, grid * 1.01, torch.tensor([1e-9, 460.0])])
    extreme = wanted * end * sign
    tried = torch.stack(list(candidates(fmt, table, extreme, torch.ones(1)))).float()
    places = torch.stack([(grid < abs(float(one / end))).sum() for one in extreme]).clamp(max=125)
    for step in range(-4, 5):
        expected = grid[(places + step).clamp(0, 125)] * sign
        assert torch.equal(tried[step + 4], expected)


def test_the_error_of_a_block_is_that_of_its_codes() -> None:
    fmt = parse("nf4@64")
    table = element_table(fmt, 64)
    blocks = gaussian(50, 64)
    scales = blocks.abs().amax(dim=1) * 0.9
    decoded = np.array(table.values, dtype=np.float32)[nearest_indices(blocks, scales, fmt, table).numpy()]
    decoded = decoded * scales.numpy()[:, None]
    expected = ((blocks.numpy().astype(np.float64) - decoded) ** 2).sum(axis=1)
    assert block_error(blocks, scales, fmt, table).numpy() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("text", ["nf4@16:search", "float4_e2m1@16:search:e4m3", "int8@16:search"])
def test_the_choice_does_not_depend_on_pieces_or_threads(text: str) -> None:
    fmt = parse(text)
    table = element_table(fmt, 16)
    blocks = gaussian(4096, 16, seed=5)
    extreme = blocks.abs().amax(dim=1)
    constant = tensor_scale(fmt, table, extreme.max())

    def pieces(step: int) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, len(blocks), step):
            yield slice(start, start + step), blocks[start : start + step]

    found = []
    before = torch.get_num_threads()
    try:
        for threads, step in itertools.product((1, 3), (100, 5000)):
            torch.set_num_threads(threads)
            found.append(best_scales(fmt, table, extreme, constant, partial(pieces, step)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0].view(torch.uint8), other.view(torch.uint8)) for other in found)


@pytest.mark.parametrize("text", ["nf4@tensor:search", "t5_4@tensor:rms-search", "float4_e2m1@tensor:search:e8m0"])
def test_one_scale_for_a_tensor_is_searched_over_all_its_pieces(text: str) -> None:
    fmt = parse(text)
    weight = gaussian(3, 200_000, seed=6)
    table = element_table(fmt, weight.numel())
    encoded = encode_nearest(weight, fmt)
    extreme = statistic_of(weight.view(1, -1), fmt.base_statistic, weight.numel())
    tried = list(candidates(fmt, table, extreme, None))
    errors = [float(block_error(weight.view(1, -1), decoded_scales(fmt, one), fmt, table)) for one in tried]
    assert torch.equal(encoded.scales.reshape(-1), tried[errors.index(min(errors))])


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0,)])
def test_nothing_to_search(shape: tuple[int, ...]) -> None:
    for text in ("nf4@16:search", "float4_e2m1@16:search:e4m3", "nf4@tensor:search"):
        assert encode_nearest(torch.zeros(shape), parse(text)).decode().shape == shape


def test_the_statistic_is_among_the_candidates() -> None:
    for text, _, search in PAIRS:
        fmt = parse(text.format(search))
        table = element_table(fmt, 16)
        extreme = statistic_of(gaussian(200, 16, seed=11), fmt.base_statistic, 16)
        constant = tensor_scale(fmt, table, extreme.abs().max())
        plain = decoded_scales(fmt, stored_scales(fmt, table, extreme, constant), constant)
        tried = [decoded_scales(fmt, one, constant) for one in candidates(fmt, table, extreme, constant)]
        assert bool(torch.stack([one == plain for one in tried]).any(dim=0).all()), text


@pytest.mark.parametrize("columns", [65, 68, 80, 100])
@pytest.mark.parametrize("text", ["int3-sym@64:rms", "t7_3@64:rms", "int2-sym@64", "normal3@64:rms", "normal4-opt@64"])
def test_in_the_short_blocks_of_rows_only_real_weights_count(text: str, columns: int) -> None:
    """Tables without a zero decode the zeros that a short block is filled up with to something else."""
    weight = gaussian(50, columns, seed=3)
    searched = text.replace(":rms", ":rms-search") if ":rms" in text else f"{text}:search"
    short = torch.arange(columns) >= 64
    plain, best = (encode_nearest(weight, parse(one)).decode()[:, short] for one in (text, searched))
    errors = [(one.double() - weight[:, short]).square().sum(dim=1) for one in (best, plain)]
    assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all())


def test_dtypes_of_the_same_numbers_choose_the_same_scales() -> None:
    weight = gaussian(300, 1000, seed=9).to(torch.bfloat16)
    for text in ("int3.58@64:search", "t7_4@32:signmax-search:e4m3", "normal4@tensor:rms-search"):
        expected = encode_nearest(weight, parse(text))
        for dtype in (torch.float32, torch.float64):
            found = encode_nearest(weight.to(dtype), parse(text))
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.scale_values, expected.scale_values)
