"""Huffman codes, the measure of comparison: as short as such codes can be, and no shorter than what rANS writes."""

from __future__ import annotations

import heapq
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.errors import InvalidCheckpoint, InvalidFormat
from core.tensors.entropy.coder import encode
from core.tensors.entropy.huffman import code_lengths, huffman_decode, huffman_encode, reversed_codes

Numbers = NDArray[np.integer[Any]]


def unlimited_cost(counts: list[int]) -> int:
    """Bits of an ordinary Huffman code, by merging the two rarest again and again."""
    heap, cost = [count for count in counts if count], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    return cost


@given(counts=st.lists(st.integers(1, 500), min_size=2, max_size=30))
def test_codes_are_as_short_as_huffman_codes(counts: list[int]) -> None:
    lengths = code_lengths(np.array(counts))
    assert int(np.dot(lengths, counts)) == unlimited_cost(counts)


@given(counts=st.lists(st.integers(1, 1000), min_size=2, max_size=5), longest=st.integers(3, 4))
def test_limited_codes_are_the_best_of_all(counts: list[int], longest: int) -> None:
    """Brute force over all lengths that satisfy Kraft's inequality."""
    possible = product(range(1, longest + 1), repeat=len(counts))
    costs = [np.dot(one, counts) for one in possible if sum(2.0**-length for length in one) <= 1]
    lengths = code_lengths(np.array(counts), longest)
    assert lengths.max() <= longest
    assert np.dot(lengths, counts) == min(costs)


def test_fibonacci_counts_are_limited_to_fifteen_bits() -> None:
    counts = [1, 1]
    while len(counts) < 30:
        counts.append(counts[-1] + counts[-2])
    lengths = code_lengths(np.array(counts))
    assert lengths.max() == 15
    assert sum(2.0**-length for length in lengths) == 1


@given(counts=st.lists(st.integers(0, 90), min_size=1, max_size=40))
def test_no_code_begins_with_another(counts: list[int]) -> None:
    lengths = code_lengths(np.array(counts))
    codes = reversed_codes(lengths)
    texts = [f"{code:0{n}b}"[::-1] for code, n in zip(codes.tolist(), lengths.tolist(), strict=True) if n]
    assert [bool(n) for n in lengths] == [bool(count) for count in counts]
    assert not any(a != b and b.startswith(a) for a in texts for b in texts)
    assert len(set(texts)) == len(texts)


@given(
    low=st.integers(-(2**31), 2**31 - 5000),
    size=st.integers(1, 4096),
    count=st.integers(0, 300),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_any_integers_come_back(low: int, size: int, count: int, seed: int) -> None:
    codes = low + (np.random.default_rng(seed).random(count) ** 3 * size).astype(np.int64)
    assert np.array_equal(huffman_decode(huffman_encode(codes), count), codes)


def test_more_than_4096_values_are_refused() -> None:
    with pytest.raises(InvalidFormat, match="4097 values"):
        huffman_encode(np.array([0, 4096]))


def test_numbers_that_do_not_fit_the_type_are_refused() -> None:
    with pytest.raises(InvalidCheckpoint):
        huffman_decode(huffman_encode(np.array([0, 200])), 2, np.int8)


@pytest.mark.parametrize(("std", "loss"), [(1.9158, 0.066), (3.862, 0.042), (7.74, 0.040)])
def test_whole_bits_cost_what_they_cost_on_normal_variables(std: float, loss: float) -> None:
    """Reference: 0.066, 0.042 and 0.040 bit over the entropy at 3, 4 and 5 bits, grid centred at zero."""
    codes = np.rint(np.random.default_rng(1).standard_normal(1 << 19) * std).astype(np.int16)
    counts = np.unique(codes, return_counts=True)[1]
    entropy = -float((counts / codes.size * np.log2(counts / codes.size)).sum())
    excess = huffman_encode(codes).size * 8 / codes.size - entropy
    assert excess == pytest.approx(loss, abs=0.004)
    assert encode(codes).size * 8 / codes.size - entropy < 0.15 * excess
