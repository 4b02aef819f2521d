"""Models of symbols: integer frequencies, where they come from, and the tables that coding and decoding take from them.

A model gives symbol i, the number low + i, the probability frequencies[i] / 2^precision. Files hold the integers, so no
two machines can disagree about them; logarithms and distribution functions only choose them, in the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidCheckpoint
from core.tensors.entropy import models_jit, tables_jit
from core.tensors.entropy.loops_jit import Longs, Table16, Table32

MOST_SYMBOLS = 4096
MOST_BUCKETS = 256  # of alias tables
PRECISIONS = (10, 15)
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
        return models_jit.kept_bits(self.frequencies, self.peak)

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
    return models_jit.normalise(np.ascontiguousarray(counts, np.int64), precision, models_jit.LOGARITHMS)


def shortened(frequencies: Longs, kept: int) -> Longs | None:
    """The same with `kept` significant bits, the most frequent taking up the rest; None where others exceed it then."""
    found = np.empty_like(frequencies)
    return found if models_jit.shorten(frequencies, kept, int(frequencies.argmax()), found) else None


def fitted_model(low: int, counts: Longs, has_escape: bool = False) -> SymbolModel:
    """The model of least total size, its own bytes counted, for counts (n,) of which at least one is positive.

    `counts` of an escape may be 0: it can occur all the same.
    """
    counts = np.ascontiguousarray(counts, np.int64)
    best = np.empty_like(counts)
    precision, _ = models_jit.best_frequencies(low, counts, has_escape, models_jit.LOGARITHMS, best)
    return SymbolModel(low, precision, best, has_escape)


def expected_bits(model: SymbolModel, counts: Longs) -> float:
    """Bits of so many of each symbol, states of 32 bits considered; escaped values not."""
    counts = np.ascontiguousarray(counts, np.int64)
    return models_jit.number_bits(counts, model.frequencies, model.precision, models_jit.LOGARITHMS)
