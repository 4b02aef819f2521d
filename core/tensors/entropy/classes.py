"""Models that take two bytes: a family and a standard deviation, from which integer arithmetic makes the frequencies.

Class k is a Normal or Laplace variable of standard deviation 2^(k/8), rounded to integers. Bytes depend on its
frequencies, so they are worked out with whole numbers alone, the same on every machine; docs/entropy.md has the same in
plain Python, and tests compare the two. They cost 0.0003 to 0.001 bit a number up to standard deviations of 10.

Real numbers are multiples of 2^-96, rounded down. The series of the Normal distribution has terms up to e^(x^2 / 2): of
the 96 bits, 78 are right at five standard deviations, and 24 at the ten that are the farthest it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import numpy as np

from core.errors import InvalidCheckpoint
from core.tensors.entropy.loops_jit import Longs
from core.tensors.entropy.models import Doubles, SymbolModel
from core.tensors.entropy.models_jit import LOST

CLASSES = range(-16, 57)  # k of the standard deviations 2^(k/8)
NORMAL, LAPLACE = 0, 1
STORED_BYTES = 2
_BITS = 96
_ONE = 1 << _BITS
_ROOT = 99297776152657463636918542254  # sqrt(pi / 2)
_LEAST = 3  # 2^-3 of a slot: numbers that have less are escaped, which takes 16 bits more
_TABLES = 64  # models whose tables are kept, about 100 KiB each
_WIDE = 28  # classes from here on have precision 15, as many of their symbols are rare


@dataclass(frozen=True, eq=False)
class ClassModel(SymbolModel):
    """The model of a class: of what it is, files hold `family` and `k`."""

    family: int = NORMAL
    k: int = 0


@lru_cache(maxsize=_TABLES)
def class_model(family: int, k: int) -> ClassModel:
    """The model of standard deviation 2^(k/8), with an escape; InvalidCheckpoint where there is no such class.

    Models are shared, with their tables: matrices have many of the same classes.
    """
    if family not in {NORMAL, LAPLACE} or k not in CLASSES:
        raise InvalidCheckpoint(f"entropy-coded data: class {k} of family {family}", hint="written by a later version?")
    frequencies = _frequencies(family, k)
    return ClassModel(1 - frequencies.size // 2, _precision(k), frequencies, True, family, k)


@lru_cache(maxsize=2 * len(CLASSES))
def class_number_bits(family: int, k: int) -> Doubles:
    """Bits of a number of magnitude 0, 1, ... n in a class, then of any that is escaped, without its value."""
    frequencies = _frequencies(family, k)
    lost = LOST * 4.0 ** (_precision(k) - 14)
    return np.asarray(_precision(k) + lost - np.log2(frequencies[frequencies.size // 2 - 1 :]))


def _precision(k: int) -> int:
    return 15 if k >= _WIDE else 14


@lru_cache(maxsize=2 * len(CLASSES))
def _frequencies(family: int, k: int) -> Longs:
    """Proportional to the probabilities, but at least 1, and what is left for 0: symbols -n to n, and the escape."""
    slots, one_side, beyond = 1 << _precision(k), *class_probabilities(family, k)
    shares = [*one_side[:0:-1], *one_side, beyond]
    low, high = 0, slots
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(_scaled(shares, middle)) <= slots else (low, middle - 1)
    found = _scaled(shares, low)
    found[len(one_side) - 1] += slots - sum(found)
    return np.array(found, np.int64)


def _scaled(shares: list[int], slots: int) -> list[int]:
    return [max(1, (share * slots + _ONE // 2) >> _BITS) for share in shares]


def class_probabilities(family: int, k: int) -> tuple[list[int], int]:
    """P of 0, 1, ... n, which are the symbols, and of all whose magnitude is larger; in units of 2^-96."""
    tails = _normal_tails(k) if family == NORMAL else _laplace_tails(k)
    before = next(tails)
    found = [_ONE - before]
    for tail in tails:
        share = (before - tail) // 2
        if share << _precision(k) + _LEAST < _ONE:
            break
        found.append(share)
        before = tail
    return found, before


def _normal_tails(k: int) -> Iterator[int]:
    """P(|X| > n + 1/2) of n = 0, 1, ...; the series of its integral of exp(-t^2 / 2) from 0."""
    half = _eighth_root(8 * (_BITS - 1) - k)
    at = half
    while True:
        total, term, square, n = at, at, at * at >> _BITS + 1, 0
        while term:
            n += 1
            term = (term * square >> _BITS) // n
            part = term // (2 * n + 1)
            total += -part if n % 2 else part
        yield _ONE - (total << _BITS) // _ROOT
        at += 2 * half


def _laplace_tails(k: int) -> Iterator[int]:
    """The same, exp(-(2 n + 1) x) with x = 2^(-1/2) / standard deviation."""
    tail = _exponential(_eighth_root(8 * _BITS - 4 - k))
    ratio = tail * tail >> _BITS
    while True:
        yield tail
        tail = tail * ratio >> _BITS


def _exponential(x: int) -> int:
    """exp(-x)."""
    total, term, n = _ONE, _ONE, 0
    while term:
        n += 1
        term = (term * x >> _BITS) // n
        total += -term if n % 2 else term
    return total


def _eighth_root(power: int) -> int:
    """2^(power / 8), rounded down."""
    return isqrt(isqrt(isqrt(1 << power)))
