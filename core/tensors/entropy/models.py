"""Models of symbols: integer frequencies, where they come from, and the tables that coding and decoding take from them.

A model gives symbol i, the number low + i, the probability frequencies[i] / 2^precision. Files hold the integers, so no
two machines can disagree about them; logarithms and distribution functions only choose them, in the encoder.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidCheckpoint
from core.tensors.entropy import tables_jit
from core.tensors.entropy.loops_jit import Longs, Table16, Table32

MOST_SYMBOLS = 4096
MOST_BUCKETS = 256  # of alias tables
PRECISIONS = (10, 15)
CHOSEN_PRECISIONS = (12, 13, 14, 15)  # that the encoder tries
_RENORMALISATION = 2e-4  # bits a symbol that states of 32 bits lose at precision 14; four times as much at 15
Doubles = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SymbolModel:
    """Frequencies int64 (n,) that add up to 2^precision; InvalidCheckpoint where they cannot be a model.

    With `has_escape` the last symbol stands for all numbers that are no other symbol.
    """

    low: int
    precision: int
    frequencies: Longs
    has_escape: bool = False

    def __post_init__(self) -> None:
        self.check_precision(self.precision)
        if not 1 <= self.size <= MOST_SYMBOLS:
            raise InvalidCheckpoint(f"a model of {self.size} symbols", hint=f"1 to {MOST_SYMBOLS}")
        if self.frequencies.min() < 0 or self.frequencies.sum() != 1 << self.precision:
            raise InvalidCheckpoint("frequencies of a model that do not add up")
        if self.has_escape and self.frequencies[-1] == 0:
            raise InvalidCheckpoint("an escape that cannot occur")

    @staticmethod
    def check_precision(precision: int) -> None:
        if not PRECISIONS[0] <= precision <= PRECISIONS[1]:
            raise InvalidCheckpoint(f"frequencies of {precision} bits")

    @property
    def size(self) -> int:
        return int(self.frequencies.size)

    @property
    def values(self) -> int:
        """Symbols that are numbers."""
        return self.size - self.has_escape

    @property
    def high(self) -> int:
        """The largest number that is a symbol."""
        return self.low + self.values - 1

    @cached_property
    def peak(self) -> int:
        """The most frequent symbol, the lowest of equals: what steps are filled up with."""
        return int(self.frequencies.argmax())

    @cached_property
    def kept(self) -> int:
        """Significant bits of the frequency, but the peak's, that has most of them; at least 1."""
        others = np.delete(self.frequencies, self.peak)
        others = others[others > 0]
        if others.size == 0:
            return 1
        odd = others // (others & -others)
        return int(odd.max()).bit_length()

    @cached_property
    def costs(self) -> Doubles:
        """Bits of each symbol, infinite where it cannot occur."""
        with np.errstate(divide="ignore"):
            return self.precision - np.log2(self.frequencies)

    @cached_property
    def tables(self) -> Tables:
        return Tables(self)


class Tables:
    """What the loops look up; `buckets` is 0 for models without alias tables."""

    def __init__(self, model: SymbolModel) -> None:
        size, slots = model.size, 1 << model.precision
        self.buckets = max(32, 1 << (size - 1).bit_length()) if size <= MOST_BUCKETS else 0
        self.alias: Table16 = np.zeros((5, self.buckets), np.uint16)
        self.entries: Table32 = np.empty(slots, np.uint32)
        if self.buckets:
            tables_jit.alias_table(model.frequencies, model.precision, self.alias)
            tables_jit.alias_entries(self.alias, self.entries)
        else:
            tables_jit.direct_entries(model.frequencies, self.entries)
        self.frequencies: Table32 = model.frequencies.astype(np.uint32)
        self.dtype = np.dtype(np.uint8 if self.buckets else np.uint16)  # of symbols

    @cached_property
    def bases(self) -> Table32:
        """Where the slots of each symbol start in `slots`."""
        return (np.cumsum(self.frequencies) - self.frequencies).astype(np.uint32)

    @cached_property
    def slots(self) -> Table16:
        """slots[bases[symbol] + rank], with one number more for loads that are wider than a slot."""
        slots = np.zeros(self.entries.size + 1, np.uint16)
        tables_jit.slots_of(self.entries, self.bases, slots)
        return slots

    @cached_property
    def records(self) -> Table32:
        """frequency + (base << 16) of each symbol."""
        return np.asarray(self.frequencies | ((self.bases & 0xFFFF) << np.uint32(16)), np.uint32)

    @cached_property
    def reciprocals(self) -> NDArray[np.float32]:
        """(1 - 2^-22) / frequency: the quotient estimated by it is never too large, and by less than 1 too small.

        Its three roundings are within 2^-24 each, so the product lies between (1 - 1.75 * 2^-22) x / f and x / f, and
        x / f < 2^20 for precisions from 12 on.
        """
        return ((1 - 2.0**-22) / np.maximum(self.frequencies, 1)).astype(np.float32)

    @cached_property
    def coding(self) -> Table16:
        """(4, buckets): frequency, base, low and high half of the reciprocal; empty without buckets."""
        table = np.zeros((4, self.buckets), np.uint16)
        halves = self.reciprocals.view(np.uint32)
        parts = (self.frequencies, self.bases, halves, halves >> np.uint32(16))
        for row, part in zip(table, parts, strict=True):
            row[: part.size] = part[: self.buckets] & 0xFFFF
        return table


def normalised(counts: Longs, precision: int) -> Longs:
    """Frequencies >= 1 where counts are, which add up to 2^precision with the least sum of -counts * log2 frequency.

    Rounded down, then a unit at a time to where it gains most (or from where it loses least), then units moved while
    that gains: the cost is a sum of convex functions, so what no move improves is the optimum. Of equals the lowest.
    """
    total, slots = int(counts.sum()), 1 << precision
    frequencies = np.where(counts > 0, np.maximum(1, counts * slots // max(total, 1)), 0)
    step = 1 if frequencies.sum() < slots else -1
    current, weights = frequencies.tolist(), counts.tolist()

    def cost(symbol: int) -> float:
        now = current[symbol]
        return weights[symbol] * math.log2(now / (now + step)) if now + step > 0 else math.inf

    heap = [(cost(symbol), symbol) for symbol in np.flatnonzero(counts).tolist()]
    heapq.heapify(heap)
    for _ in range(abs(slots - int(frequencies.sum()))):
        symbol = heap[0][1]
        current[symbol] += step
        heapq.heapreplace(heap, (cost(symbol), symbol))
    return _exchanged(counts, np.array(current, np.int64))


def _exchanged(counts: Longs, frequencies: Longs) -> Longs:
    """Units moved from where they are missed least to where they gain most, while that is more."""
    used = np.flatnonzero(counts)
    weights, now = counts[used].astype(np.float64), frequencies[used].astype(np.float64)
    while used.size > 1:
        gains = weights * np.log2((now + 1) / now)
        losses = np.where(now > 1, weights * np.log2(now / np.maximum(now - 1, 1)), math.inf)
        to, source = int(gains.argmax()), int(losses.argmin())
        if gains[to] <= losses[source] * (1 + 1e-12):
            break
        now[to] += 1
        now[source] -= 1
    found = np.zeros_like(frequencies)
    found[used] = now.astype(np.int64)
    return found


def shortened(frequencies: Longs, kept: int) -> Longs | None:
    """The same with `kept` significant bits, the most frequent taking up the rest; None where others exceed it then."""
    peak = int(frequencies.argmax())
    lengths = np.floor(np.log2(np.maximum(frequencies, 1))).astype(np.int64) + 1
    unit = np.int64(1) << np.maximum(lengths - kept, 0)
    rounded: Longs = (frequencies + unit // 2) // unit * unit
    rounded[peak] = 0
    rest = int(frequencies.sum()) - int(rounded.sum())
    if rest < max(1, int(rounded.max())):
        return None
    rounded[peak] = rest
    return rounded


def fitted_model(low: int, counts: Longs, has_escape: bool = False) -> SymbolModel:
    """The model of least total size, its own bytes counted, for counts (n,) of which at least one is positive.

    `counts` of an escape may be 0: it can occur all the same.
    """
    from core.tensors.entropy.layout import model_bytes

    weights = np.maximum(counts, np.arange(counts.size) == counts.size - 1) if has_escape else counts
    best, least = None, math.inf
    for precision in CHOSEN_PRECISIONS:
        if np.count_nonzero(weights) > 1 << precision:
            continue
        exact = normalised(weights, precision)
        for kept in range(2, precision + 1):
            frequencies = shortened(exact, kept)
            if frequencies is None:
                continue
            model = SymbolModel(low, precision, frequencies, has_escape)
            bits = expected_bits(model, counts) + 8 * len(model_bytes(model))
            if bits < least:
                best, least = model, bits
    assert best is not None  # noqa: S101 - with all bits kept there is always one
    return best


def expected_bits(model: SymbolModel, counts: Longs) -> float:
    """Bits of so many of each symbol, states of 32 bits considered; escaped values not."""
    used = counts > 0
    ideal = float(np.dot(counts[used], model.costs[used]))
    return ideal + float(counts.sum()) * _RENORMALISATION * 4.0 ** (model.precision - 14)
