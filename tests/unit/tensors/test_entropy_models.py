"""Models of symbols: frequencies that are optimal, parametric ones that are right, and how both are stored."""

from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from core.errors import InvalidCheckpoint, InvalidFormat
from core.tensors.entropy import layout, models_jit, tables_jit
from core.tensors.entropy.families import parametric_model, probabilities
from core.tensors.entropy.layout import Plan, Reader, Segment
from core.tensors.entropy.models import SymbolModel, expected_bits, fitted_model, normalised, shortened
from core.tensors.entropy.windows import model_of_counts

COUNTS = st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any)


SIXTEEN = {
    used: [list(one) for one in product(*[range(1, 17) if there else (0,) for there in used]) if sum(one) == 16]
    for size in range(1, 5)
    for used in product((False, True), repeat=size)
}


def bits(counts: list[int], frequencies: list[int], precision: int) -> float:
    pairs = zip(counts, frequencies, strict=True)
    return sum(count * (precision - math.log2(frequency)) for count, frequency in pairs if count)


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=4).filter(any))
def test_frequencies_are_the_best_of_all(counts: list[int]) -> None:
    """Brute force over all frequencies that add up to 16."""
    best = min(bits(counts, one, 4) for one in SIXTEEN[tuple(count > 0 for count in counts)])
    found = normalised(np.array(counts), 4).tolist()
    assert sum(found) == 16
    assert [value > 0 for value in found] == [count > 0 for count in counts]
    assert bits(counts, found, 4) == pytest.approx(best, abs=1e-9)


@given(
    counts=st.lists(st.integers(0, 30) | st.integers(0, 10**6), min_size=2, max_size=300).filter(any),
    precision=st.integers(10, 15),
)
def test_no_unit_moved_between_two_of_many_symbols_makes_them_shorter(counts: list[int], precision: int) -> None:
    """Costs are convex, so that frequencies which no such move improves are the best."""
    found = normalised(np.array(counts), precision)
    used = np.array(counts) > 0
    weights, now = np.array(counts)[used], found[used].astype(np.float64)
    gains = weights * np.log2((now + 1) / now)
    losses = weights[now > 1] * np.log2(now[now > 1] / (now[now > 1] - 1))
    assert found.sum() == 1 << precision
    assert ((found > 0) == used).all()
    assert now.size == 1 or gains.max() <= losses.min() * (1 + 1e-9)


@pytest.mark.parametrize(
    ("counts", "frequencies"), [([7] * 3, [6, 5, 5]), ([9, 1, 9, 9], [5, 1, 5, 5]), ([1] * 15 + [2], [1] * 16)]
)
def test_of_equal_symbols_the_lowest_gets_what_is_left(counts: list[int], frequencies: list[int]) -> None:
    assert normalised(np.array(counts), 4).tolist() == frequencies


@given(counts=COUNTS, kept=st.integers(1, 12))
def test_shortened_frequencies_keep_the_sum_and_so_many_bits(counts: list[int], kept: int) -> None:
    exact = normalised(np.array(counts), 12)
    found = shortened(exact, kept)
    if found is not None:
        assert found.sum() == 4096
        assert ((found > 0) == (exact > 0)).all()
        assert SymbolModel(0, 12, found).kept <= kept
    if kept == 12:
        assert found is not None


@given(counts=COUNTS, low=st.integers(-(2**31), 2**31 - 50), has_escape=st.booleans())
def test_a_stored_model_is_read_back(counts: list[int], low: int, has_escape: bool) -> None:
    model = fitted_model(low, np.array(counts), has_escape)
    plan = Plan((Segment(0, 77),), 4, 12)
    stored = layout.rans_head(plan, [model], is_wide=has_escape)
    reader = Reader(np.frombuffer(bytearray(stored), np.uint8))
    reader.at = len(layout.head(layout.RANS, 77))
    found, (read,), is_wide = layout.read_plan(reader, 77)
    assert (found, is_wide, reader.at) == (plan, has_escape, len(stored))
    assert read.frequencies.tolist() == model.frequencies.tolist()
    assert (read.low, read.precision, read.has_escape) == (low, model.precision, has_escape)


@given(counts=COUNTS, low=st.integers(-(2**31), 2**31 - 50), precision=st.integers(10, 15), gap=st.integers(0, 500))
def test_a_model_is_as_long_as_the_search_takes_it_for(counts: list[int], low: int, precision: int, gap: int) -> None:
    model = SymbolModel(low, precision, normalised(np.array([*counts, *[0] * gap, *counts]), precision))
    assert models_jit.model_bytes(low, model.frequencies) == len(layout.model_bytes(model))


@given(counts=COUNTS, has_escape=st.booleans())
def test_a_fitted_model_is_the_shortest_of_all_precisions_and_bits_kept(counts: list[int], has_escape: bool) -> None:
    def total(model: SymbolModel) -> float:
        lost = 2e-4 * 4.0 ** (model.precision - 14) * sum(counts)
        return bits(counts, model.frequencies.tolist(), model.precision) + lost + 8 * len(layout.model_bytes(model))

    weights = np.array([*counts[:-1], max(counts[-1], has_escape)])
    least = total(fitted_model(0, np.array(counts), has_escape))
    for precision, kept in product((12, 13, 14, 15), range(2, 16)):
        frequencies = shortened(normalised(weights, precision), kept)
        assert frequencies is None or least <= total(SymbolModel(0, precision, frequencies, has_escape)) + 1e-6


@given(counts=COUNTS, precision=st.integers(10, 15), has_gap=st.booleans())
def test_every_slot_of_a_symbol_has_a_rank_of_its_own(counts: list[int], precision: int, has_gap: bool) -> None:
    padded = [*counts, *([0] * 300 if has_gap else []), 1]
    tables = SymbolModel(0, precision, normalised(np.array(padded), precision)).tables
    symbols, ranks = tables.entries >> 16, tables.entries & 0xFFFF
    slots = {(int(symbol), int(rank)) for symbol, rank in zip(symbols, ranks, strict=True)}
    assert slots == {(symbol, rank) for symbol, f in enumerate(tables.frequencies.tolist()) for rank in range(f)}
    assert tables.slots[tables.bases[symbols] + ranks].tolist() == list(range(1 << precision))


@pytest.mark.parametrize(
    ("size", "buckets"), [(1, 32), (32, 32), (33, 64), (65, 128), (129, 256), (256, 256), (257, 0)]
)
def test_the_fewest_buckets_that_hold_the_symbols_are_used(size: int, buckets: int) -> None:
    assert SymbolModel(0, 12, normalised(np.ones(size, np.int64), 12)).tables.buckets == buckets


@pytest.mark.parametrize(
    ("frequencies", "precision", "has_escape"),
    [
        ([], 12, False),
        ([4095], 12, False),
        ([4097], 12, False),
        ([-1, 4097], 12, False),
        ([4096, 0], 12, True),
        ([512], 9, False),
        ([1 << 16], 16, False),
        ([1] * 4097 + [4095], 13, False),
    ],
)
def test_impossible_models_are_refused(frequencies: list[int], precision: int, has_escape: bool) -> None:
    with pytest.raises(InvalidCheckpoint):
        SymbolModel(0, precision, np.array(frequencies, np.int64), has_escape)


@pytest.mark.parametrize(
    ("data", "seed", "digest"),
    [  # of the reference implementation
        (b"", 0, 0x02CC5D05),
        (b"", 0x9E3779B1, 0x36B78AE7),
        (b"a", 0, 0x550D7456),
        (b"abc", 0, 0x32D153FF),
        (b"Nobody inspects the spammish repetition", 0, 0xE2293B2F),
    ],
)
def test_checksums_are_xxh32(data: bytes, seed: int, digest: int) -> None:
    assert layout.checksum(data, seed) == digest


DENSITIES = {
    "normal": stats.norm.pdf,
    "laplace": lambda x: stats.laplace.pdf(x, scale=1 / math.sqrt(2)),
    "t": lambda x: stats.t.pdf(x, 5, scale=math.sqrt(3 / 5)),
}


@pytest.mark.parametrize("family", DENSITIES)
@pytest.mark.parametrize("std", [0.3, 1.0, 6.0])
def test_probabilities_are_integrals_of_the_density(family: str, std: float) -> None:
    numbers = np.array([0, 1, -1, 2, -3, 11])
    for number, found in zip(numbers.tolist(), probabilities(family, std, numbers).tolist(), strict=True):
        ends = sorted({(number - 0.5) / std, 0.0 if number == 0 else (number - 0.5) / std, (number + 0.5) / std})
        pieces = [integrate.quad(DENSITIES[family], a, b, epsabs=0)[0] for a, b in pairwise(ends)]
        assert found == pytest.approx(sum(pieces), rel=1e-8)


@pytest.mark.parametrize(
    ("std", "entropy"),
    [(0.25, 0.312466), (0.5, 1.241196), (1, 2.104833), (2, 3.061969), (4, 4.050843), (8, 5.048034), (16, 6.047330)],
)
def test_the_entropy_of_rounded_normal_variables(std: float, entropy: float) -> None:
    """Reference values by quadrature."""
    found = probabilities("normal", std, np.arange(-200, 201))
    found = found[found > 0]
    assert -(found * np.log2(found)).sum() == pytest.approx(entropy, abs=1e-4)


@pytest.mark.parametrize("family", DENSITIES)
@pytest.mark.parametrize("std", [0.2, 1.0, 3.7, 30.0, 400.0])
def test_a_parametric_model_is_as_near_its_family_as_frequencies_can_be(family: str, std: float) -> None:
    """A rare symbol takes at most one slot more than it should: log2(1 / (1 - n / 2^P)) bits for n symbols."""
    model = parametric_model(family, std)
    numbers = np.arange(-40_000, 40_001)
    exact = probabilities(family, std, numbers)
    inside = (numbers >= model.low) & (numbers <= model.high)
    costs = np.full(numbers.size, model.costs[-1] + 16)
    costs[inside] = model.costs[numbers[inside] - model.low]
    ideal = -(exact[exact > 0] * np.log2(exact[exact > 0])).sum()
    assert model.has_escape
    assert (exact[exact > 0] * costs[exact > 0]).sum() <= ideal - math.log2(1 - model.size / 2**model.precision) + 0.001


@pytest.mark.parametrize("family", DENSITIES)
@pytest.mark.parametrize(("std", "weight"), [(0.05, 9), (0.7, 1), (3.0, 1 << 40), (30.0, 1 << 24), (1e6, 1 << 24)])
def test_a_parametric_model_is_that_of_the_counts_of_all_numbers(family: str, std: float, weight: int) -> None:
    """Numbers left out of the sum because they are far away are none that are counted."""
    numbers = np.arange(-2047, 2048)
    counts = np.rint(probabilities(family, std, numbers) * weight).astype(np.int64)
    counts[2047] = max(counts[2047], 1)
    expected = model_of_counts(numbers[counts > 0], counts[counts > 0], max(0, weight - int(counts.sum())))
    assert layout.model_bytes(parametric_model(family, std, weight=weight)) == layout.model_bytes(expected)


@pytest.mark.parametrize(("family", "std", "nu"), [("cauchy", 1, 5), ("t", 1, 2), ("normal", 0, 5), ("t", math.inf, 5)])
def test_impossible_families_are_refused(family: str, std: float, nu: float) -> None:
    with pytest.raises(InvalidFormat):
        parametric_model(family, std, nu)


@pytest.mark.parametrize(
    ("precision", "std", "reach", "percent"),
    [
        (12, 0.93, 6, 0.0821),
        (14, 0.93, 6, 0.0174),
        (14, 1.92, 11, 0.0169),
        (14, 3.86, 22, 0.0256),
        (15, 3.86, 22, 0.0113),
    ],
)
def test_rounding_frequencies_costs_what_it_must(precision: int, std: float, reach: int, percent: float) -> None:
    """Reference: percent of the entropy at 2, 3 and 4 bits, alphabets of 13, 23 and 45 numbers."""
    exact = probabilities("normal", std, np.arange(-reach, reach + 1))
    exact /= exact.sum()
    counts = np.rint(exact * 2**40).astype(np.int64)
    used = counts > 0
    costs = precision - np.log2(normalised(counts, precision)[used])
    ideal = -(exact[used] * np.log2(exact[used])).sum()
    assert 100 * ((exact[used] * costs).sum() / ideal - 1) == pytest.approx(percent, rel=0.05)


def test_a_model_of_few_numbers_is_short_and_one_of_many_is_exact() -> None:
    shape = np.array([1, 12, 90, 300, 500, 300, 90, 12, 1])
    few, many = model_of_counts(np.arange(9), shape), model_of_counts(np.arange(9), shape << 20)
    assert len(layout.model_bytes(few)) < len(layout.model_bytes(many)) <= 24
    assert expected_bits(many, shape) < expected_bits(few, shape)


@pytest.mark.parametrize(
    ("values", "counts", "rest", "ends", "has_escape"),
    [
        ([0, 1, 2], [5, 9, 5], None, (0, 2), False),
        ([0, 1, 2], [5, 9, 5], 0, (0, 2), True),  # it was asked for
        ([0, 1, 2, 30_000], [5000, 9000, 5000, 1], None, (0, 2), True),  # far away
        (list(range(4096)), [1000] * 4096, None, (0, 4095), False),  # as many as there may be
        (list(range(4097)), [1000] * 4097, None, (0, 4094), True),
    ],
)
def test_numbers_get_symbols_where_that_is_shorter(
    values: list[int], counts: list[int], rest: int | None, ends: tuple[int, int], has_escape: bool
) -> None:
    model = model_of_counts(np.array(values), np.array(counts), rest)
    assert (model.low, model.high) == ends
    assert model.has_escape == has_escape


@given(data=st.binary(max_size=40), size=st.integers(1, 60), peak=st.integers(0, 59), kept=st.integers(1, 15))
def test_frequencies_read_from_any_bytes_are_a_model_or_nothing(data: bytes, size: int, peak: int, kept: int) -> None:
    found = np.zeros(size, np.int64)
    at = tables_jit.read_frequencies(np.frombuffer(bytearray(data), np.uint8), 0, min(peak, size - 1), 12, kept, found)
    assert at == -1 or (found.sum() == 4096 and found.min() >= 0 and at <= len(data))
