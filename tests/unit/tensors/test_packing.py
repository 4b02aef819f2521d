"""Codes in bytes: exact inverses for every radix and length, in the documented order, in no more bytes than counted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.formats.stored import group_layout, packed_bits, packed_bytes, planes
from core.tensors.packing import pack, pack_planes, unpack_planes


@given(radix=st.integers(2, 5000), count=st.integers(0, 300), seed=st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_packing_loses_nothing_and_takes_the_bytes_that_are_counted(radix: int, count: int, seed: int) -> None:
    codes = torch.randint(radix, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    pieces = pack_planes(codes, radix)
    assert sum(piece.numel() for piece in pieces) == packed_bytes(radix, count)
    assert torch.equal(unpack_planes(pieces, radix, count).int(), codes)


@pytest.mark.parametrize("bits", range(1, 17))
def test_powers_of_two_take_their_bits_and_no_more(bits: int) -> None:
    assert packed_bits(2**bits) == bits
    assert packed_bytes(2**bits, 8 * 100) == 100 * bits


@pytest.mark.parametrize("radix", [3, 5, 6, 7, 10, 11, 12, 13, 15, 22, 24, 46, 90, 181])
def test_other_radices_come_close_to_the_logarithm(radix: int) -> None:
    assert math.log2(radix) <= packed_bits(radix) <= math.ceil(math.log2(radix))


@pytest.mark.parametrize("power", range(1, 7))
def test_three_times_a_power_of_two_wastes_fifteen_thousandths_of_a_bit(power: int) -> None:
    assert packed_bits(3 << power) == pytest.approx(1.6 + power)
    assert packed_bits(3 << power) < math.log2(3 << power) + 0.016


def test_the_last_group_takes_only_the_bytes_that_it_needs() -> None:
    assert group_layout(8).width == 3
    assert [packed_bytes(8, count) for count in range(1, 9)] == [1, 1, 2, 2, 2, 3, 3, 3]


def test_a_group_is_one_little_endian_number_with_the_first_code_lowest() -> None:
    assert pack(torch.tensor([1, 2, 3]), group_layout(16)).tolist() == [0x21, 0x03]
    three_bits = pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), group_layout(8))
    assert int.from_bytes(bytes(three_bits.tolist()), "little") == sum(
        code << (3 * place) for place, code in enumerate([1, 2, 3, 4, 5, 6, 7, 0])
    )
    layout = group_layout(10)
    codes = [(7 * place) % 10 for place in range(layout.group)]
    number = sum(code * 10**place for place, code in enumerate(codes))
    assert bytes(pack(torch.tensor(codes), layout).tolist()) == number.to_bytes(layout.width, "little")


def test_more_than_256_codes_are_two_planes() -> None:
    low, high = pack_planes(torch.tensor([0x123, 0x045], dtype=torch.int32), 4096)
    assert pack_planes(torch.tensor([11, 4, 3]), 12)[1].tolist() == [2 + 3 * 1]  # high digits 2, 1, 0 of radix 3
    assert low.tolist() == [0x23, 0x45]
    assert high.tolist() == [0x01]
    assert [plane.radix for plane in planes(4096)] == [256, 16]
