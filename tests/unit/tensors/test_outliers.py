"""Outliers: which weights they are, their positions in few bytes, and bytes that lie.

Oracles: sorting, Python's big integers, and the definitions in numpy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from core.errors import InvalidCheckpoint, InvalidFormat, NonFiniteWeights
from core.formats.sparse_index import index_bytes, outlier_count
from core.tensors.blocks import PIECE, BlockGrid
from core.tensors.outliers import (
    decode_index,
    encode_index,
    outlier_values,
    overwrite,
    quantile_of_max,
    select_by_ratio,
    select_by_threshold,
    select_opq,
    without_outliers,
)


def positions(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def weights(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, count).astype(np.float32))


@st.composite
def clustered(draw: st.DrawFn) -> tuple[list[int], int]:
    """Positions among a number of elements: any number of them, anywhere, in runs, at either end."""
    elements = draw(st.integers(0, 400) | st.integers(1, 2**40))
    if not elements:
        return [], 0
    chosen = draw(st.sets(st.integers(0, elements - 1), max_size=min(elements, 40)))
    for start in draw(st.lists(st.integers(0, elements - 1) | st.just(elements - 1), max_size=3)):
        chosen |= set(range(start, min(start + draw(st.integers(0, 80)), elements)))
    return sorted(chosen), elements


@given(case=clustered())
@settings(max_examples=300, deadline=None)
def test_positions_come_back_from_the_bytes_that_were_counted(case: tuple[list[int], int]) -> None:
    numbers, elements = case
    data = encode_index(positions(numbers), elements)
    assert data.dtype == torch.uint8
    assert data.numel() == index_bytes(elements, len(numbers))
    assert decode_index(data, elements, len(numbers)).tolist() == numbers


@pytest.mark.parametrize("elements", [1, 2, 7, 8, 64, 65])
def test_there_may_be_any_number_of_outliers_from_none_to_all(elements: int) -> None:
    generator = np.random.default_rng(elements)
    for count in range(elements + 1):
        for chosen in (generator.permutation(elements)[:count], np.arange(count), elements - 1 - np.arange(count)):
            numbers = sorted(chosen.tolist())
            assert decode_index(encode_index(positions(numbers), elements), elements, count).tolist() == numbers


def test_more_positions_than_are_in_work_at_once_come_back_too() -> None:
    generator = np.random.default_rng(1)
    numbers = torch.from_numpy(np.unique(generator.integers(0, 10**8, 100_003)))
    assert torch.equal(decode_index(encode_index(numbers, 10**8), 10**8, numbers.numel()), numbers)


@given(case=clustered())
@settings(max_examples=100, deadline=None)
def test_the_bytes_are_those_of_the_documented_layout(case: tuple[list[int], int]) -> None:
    numbers, elements = case
    count = len(numbers)
    low = max(0, math.floor(math.log2(elements / count))) if count else 0  # exact: the quotients are below 2^40
    lows = sum((number & ((1 << low) - 1)) << (low * order) for order, number in enumerate(numbers))
    highs = sum(1 << ((number >> low) + order) for order, number in enumerate(numbers))
    low_bytes = math.ceil(low * count / 8)
    expected = lows.to_bytes(low_bytes, "little")
    expected += highs.to_bytes(index_bytes(elements, count) - low_bytes, "little")
    assert bytes(encode_index(positions(numbers), elements).tolist()) == expected


def test_an_example_by_hand() -> None:
    """3 of 32: 3 low bits each (101, 010, 111), then unary: high parts 0, 1, 3 set bits 0, 2 and 5."""
    data = encode_index(positions([5, 10, 31]), 32)
    assert data.tolist() == [0b11_010_101, 0b1, 0b100101]


def test_one_in_a_power_of_two_takes_that_power_and_two_bits_more() -> None:
    for power in range(1, 20):
        count = 1 << 12
        assert index_bytes(count << power, count) * 8 == (power + 2) * count
    assert index_bytes(1 << 24, 1 << 14) * 8 == 12 * (1 << 14)
    assert index_bytes(10**12, 0) == 0


@given(elements=st.integers(1, 2**50), share=st.floats(0, 1))
def test_a_position_never_takes_more_than_the_logarithm_and_three_bits(elements: int, share: float) -> None:
    count = max(1, int(elements * share))
    ideal = count * (math.log2(elements / count) + 3) / 8
    assert index_bytes(elements, count) <= ideal * (1 + 1e-12) + 2


@given(case=clustered(), data=st.data())
@settings(max_examples=300, deadline=None)
def test_hostile_bytes_are_refused_or_are_positions_that_ascend_within_the_tensor(
    case: tuple[list[int], int], data: st.DataObject
) -> None:
    numbers, elements = case
    size = index_bytes(elements, len(numbers))
    noise = data.draw(st.binary(min_size=size, max_size=size))
    lie = torch.tensor(list(noise), dtype=torch.uint8)
    try:
        found = decode_index(lie, elements, len(numbers))
    except InvalidCheckpoint:
        return
    assert torch.equal(encode_index(found, elements), lie)
    assert found.numel() == len(numbers)
    assert all(0 <= position < elements for position in found.tolist())
    assert bool((found[1:] > found[:-1]).all())


@given(case=clustered(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_flipped_bit_never_decodes_to_the_same_positions(case: tuple[list[int], int], data: st.DataObject) -> None:
    numbers, elements = case
    encoded = encode_index(positions(numbers), elements)
    if not encoded.numel():
        return
    place = data.draw(st.integers(0, 8 * encoded.numel() - 1))
    encoded[place // 8] ^= 1 << place % 8
    with contextlib.suppress(InvalidCheckpoint):
        assert decode_index(encoded, elements, len(numbers)).tolist() != numbers


@pytest.mark.parametrize(
    ("name", "elements", "count", "data"),
    [
        ("too few bytes", 32, 3, [0, 0]),
        ("too many bytes", 32, 3, [0, 0, 0, 0]),
        ("bytes where there are no outliers", 32, 0, [0]),
        ("more outliers than elements", 2, 3, [7]),
        ("a negative number of outliers", 2, -1, []),
        ("too few ones", 32, 3, [0, 0, 0b101]),
        ("too many ones", 32, 3, [0b10001000, 0, 0b1111]),
        ("a one beyond the last possible", 32, 3, [0b10001000, 0, 0b10000011]),
        ("equal positions", 32, 3, [0b00_001_001, 0b1, 0b111]),
        ("descending positions", 32, 3, [0b00_001_010, 0b1, 0b111]),
        ("a position beyond the tensor", 30, 3, [0b11_010_101, 0b1, 0b100101]),
        ("filling that is not zero", 32, 3, [0b11_010_101, 0b11, 0b100101]),
    ],
)
def test_an_index_that_lies_is_refused(name: str, elements: int, count: int, data: list[int]) -> None:
    with pytest.raises(InvalidCheckpoint):
        decode_index(torch.tensor(data, dtype=torch.uint8), elements, count)


@pytest.mark.parametrize("numbers", [[3, 2], [2, 2], [-1, 4], [4, 10]])
def test_positions_that_could_not_come_back_are_not_encoded(numbers: list[int]) -> None:
    with pytest.raises(InvalidCheckpoint):
        encode_index(positions(numbers), 10)


def test_the_number_of_outliers_is_the_floor_of_the_ratio_as_written() -> None:
    assert outlier_count(4096 * 4096, 2**-10) == 1 << 14
    assert outlier_count(100, 0.29) == 29  # 0.29 * 100 is 28.999999999999996 in floating point
    assert [outlier_count(999, 0.001), outlier_count(1000, 0.001), outlier_count(0, 0.5)] == [0, 1, 0]
    assert [outlier_count(7, 0), outlier_count(7, 1)] == [0, 7]
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(InvalidFormat):
            outlier_count(10, ratio)


def by_sorting(flat: torch.Tensor, count: int) -> list[int]:
    order = sorted(range(flat.numel()), key=lambda place: (-abs(float(flat[place])), place))
    return sorted(order[:count])


@given(
    numbers=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1, -1])),
    ratio=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
@settings(max_examples=300, deadline=None)
def test_the_largest_are_chosen_and_of_equals_the_first(numbers: list[float], ratio: float, dtype: torch.dtype) -> None:
    flat = torch.tensor(numbers, dtype=torch.float32).to(dtype)
    flat = flat[torch.isfinite(flat)]
    chosen = select_by_ratio(flat, ratio)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == by_sorting(flat, outlier_count(flat.numel(), ratio))


def test_ties_that_reach_over_pieces_go_to_the_first_positions() -> None:
    flat = torch.zeros(2 * PIECE + 5)
    flat[PIECE - 2 : PIECE + 2] = -1
    flat[-2:] = 2
    chosen = select_by_ratio(flat, 5.5 / flat.numel())
    assert chosen.tolist() == [PIECE - 2, PIECE - 1, PIECE, 2 * PIECE + 3, 2 * PIECE + 4]


def test_a_tensor_of_many_pieces_is_chosen_from_as_a_whole() -> None:
    flat = weights(2 * PIECE + 12345)
    count = outlier_count(flat.numel(), 2**-7)
    expected = torch.sort(flat.abs(), descending=True, stable=True).indices[:count].sort().values
    assert torch.equal(select_by_ratio(flat, 2**-7), expected)
    assert torch.equal(select_by_ratio(flat.bfloat16(), 2**-7), select_by_ratio(flat.bfloat16().float(), 2**-7))


@pytest.mark.parametrize("multiple", [0.0, 1.0, 2.5, 6.0, 1e9])
def test_a_threshold_is_a_multiple_of_the_root_mean_square(multiple: float) -> None:
    flat = weights(PIECE + 1000)
    exact = flat.double().numpy()
    limit = multiple * math.sqrt(math.fsum(exact * exact) / exact.size)
    assert select_by_threshold(flat, multiple).tolist() == np.flatnonzero(np.abs(exact) > limit).tolist()


def test_a_threshold_takes_what_is_above_it_and_not_what_is_on_it() -> None:
    assert select_by_threshold(torch.tensor([3.0, -3, 3, 3]), 1).tolist() == []
    assert select_by_threshold(torch.tensor([0.0, 0, 0, -2]), 1.999).tolist() == [3]
    assert select_by_threshold(torch.zeros(4), 1).tolist() == []
    assert select_by_threshold(torch.zeros(0), 1).tolist() == []


def opq_by_definition(matrix: np.ndarray, width: int, quantile: float) -> list[int]:
    found = []
    for row, line in enumerate(matrix.astype(np.float64)):
        for start in range(0, line.size, width):
            block = line[start : start + width]
            if block.size > 1:
                limit = np.std(block, ddof=1) * stats.norm.ppf((1 + quantile ** (1 / block.size)) / 2)
                found += (row * line.size + start + np.flatnonzero(np.abs(block) > limit)).tolist()
    return found


@pytest.mark.parametrize(
    ("shape", "width"), [((40, 128), 64), ((40, 100), 64), ((33, 65), 64), ((9, 130), 130), ((50, 7), 3), ((3, 5), 1)]
)
@pytest.mark.parametrize("quantile", [0.5, 0.95])
def test_opq_measures_each_weight_by_its_own_block(shape: tuple[int, int], width: int, quantile: float) -> None:
    flat = weights(shape[0] * shape[1])
    grid = BlockGrid(flat.numel(), shape[1], width)
    chosen = select_opq(flat, grid, quantile)
    expected = opq_by_definition(flat.numpy().reshape(shape), width, quantile)
    assert chosen.tolist() == expected
    assert expected or width == 1


def test_opq_of_one_scale_measures_by_the_whole_tensor_piece_by_piece() -> None:
    flat = weights(PIECE + 777)
    grid = BlockGrid(flat.numel(), flat.numel(), flat.numel(), one_scale=True)
    expected = opq_by_definition(flat.numpy()[None], flat.numel(), 0.95)
    assert select_opq(flat, grid, 0.95).tolist() == expected


def test_a_block_of_equals_has_no_outliers_whatever_its_length() -> None:
    for columns in (1, 2, 3, 7, 64, 100):
        flat = torch.full((3 * columns,), 0.1)
        assert select_opq(flat, BlockGrid(flat.numel(), columns, 3 if columns > 3 else columns), 0.5).tolist() == []
    assert select_opq(torch.zeros(0), BlockGrid(0, 5, 5), 0.95).tolist() == []


@pytest.mark.parametrize("block", [1, 2, 64, 1000])
@pytest.mark.parametrize("quantile", [0.05, 0.95, 0.999])
def test_the_quantile_of_the_maximum_is_where_its_distribution_has_that_value(block: int, quantile: float) -> None:
    point = quantile_of_max(quantile, block)
    below, _ = integrate.quad(
        lambda m: 2 * block * stats.norm.pdf(m) * (2 * stats.norm.cdf(m) - 1) ** (block - 1), 0, point, epsabs=1e-12
    )
    assert below == pytest.approx(quantile, abs=1e-9)


@pytest.mark.parametrize("quantile", [0.0, 1.0, -1.0, math.nan])
def test_a_quantile_lies_between_zero_and_one(quantile: float) -> None:
    with pytest.raises(InvalidFormat):
        quantile_of_max(quantile, 64)


def test_values_are_stored_as_the_nearest_bf16_and_stay_finite() -> None:
    flat = torch.cat((weights(5000), torch.tensor([3.4e38, -3.4e38, 1.00390625, 1.01171875, 1e-40])))
    stored = outlier_values(flat, torch.arange(flat.numel()))
    assert stored.dtype == torch.bfloat16
    expected = flat[:-5].numpy().astype(ml_dtypes.bfloat16).astype(np.float32)
    assert stored[:-5].float().numpy().tolist() == expected.tolist()
    largest = float.fromhex("0x1.fep127")
    assert stored[-5:-1].tolist() == [largest, -largest, 1.0, 1.015625]  # ties to even


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_cannot_hide_among_the_outliers(bad: float) -> None:
    flat = weights(100)
    flat[17] = bad
    with pytest.raises(NonFiniteWeights):
        outlier_values(flat, select_by_ratio(flat, 0.01))


@pytest.mark.parametrize("step", [1, 7, 64, 1000])
def test_outliers_leave_and_come_back_whole_or_piece_by_piece(step: int) -> None:
    flat = weights(300)
    before = flat.clone()
    indices = select_by_ratio(flat, 0.1)
    values = outlier_values(flat, indices)
    dense = without_outliers(flat, indices)
    pieces = [without_outliers(flat[start : start + step], indices, start) for start in range(0, 300, step)]
    assert torch.equal(flat, before)
    assert torch.equal(torch.cat(pieces), dense)
    assert set(torch.nonzero(dense != flat).flatten().tolist()) == set(indices.tolist())
    assert dense[indices].abs().sum() == 0
    restored = torch.cat([overwrite(piece, indices, values, step * order) for order, piece in enumerate(pieces)])
    assert torch.equal(restored, overwrite(dense.clone(), indices, values))
    assert torch.equal(restored[indices], values.float())
    untouched = torch.ones(300, dtype=torch.bool)
    untouched[indices] = False
    assert torch.equal(restored[untouched], flat[untouched])


def test_a_tensor_without_outliers_goes_through_every_function() -> None:
    flat, none = weights(10), select_by_ratio(weights(10), 0.01)
    assert none.dtype == torch.int64
    assert torch.equal(without_outliers(flat, none), flat)
    assert torch.equal(overwrite(flat.clone(), none, outlier_values(flat, none)), flat)


@pytest.mark.parametrize(
    "select",
    [
        lambda flat: select_by_ratio(flat, 0.01),
        lambda flat: select_by_threshold(flat, 2),
        lambda flat: select_opq(flat, BlockGrid(flat.numel(), 200, 64), 0.95),
        lambda flat: select_opq(flat, BlockGrid(flat.numel(), flat.numel(), flat.numel(), one_scale=True), 0.5),
    ],
    ids=["ratio", "threshold", "opq", "opq-tensor"],
)
def test_the_choice_does_not_depend_on_threads(select: Callable[[torch.Tensor], torch.Tensor]) -> None:
    flat = weights(1000 * 200)
    expected, before = select(flat), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(select(flat), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_device_chooses_and_codes_as_the_processor_does() -> None:
    flat = weights(PIECE + 4321)
    on_device = flat.cuda()
    grid = BlockGrid(flat.numel(), flat.numel(), 64)
    for indices, theirs in (
        (select_by_ratio(flat, 0.01), select_by_ratio(on_device, 0.01)),
        (select_by_threshold(flat, 3), select_by_threshold(on_device, 3)),
        (select_opq(flat, grid, 0.95), select_opq(on_device, grid, 0.95)),
    ):
        assert torch.equal(theirs.cpu(), indices)
        data = encode_index(theirs, flat.numel())
        assert torch.equal(data.cpu(), encode_index(indices, flat.numel()))
        assert torch.equal(decode_index(data, flat.numel(), indices.numel()).cpu(), indices)
