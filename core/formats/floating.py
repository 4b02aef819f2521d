"""Floating-point elements with any number of exponent and mantissa bits; a code is sign, exponent, mantissa in bits.

Three conventions decide which patterns are numbers and where the exponents lie:

    ""      OCP: bias 2^(e-1) - 1. Up to four exponent bits every pattern is a number, but for E4M3, whose largest
            pattern is NaN (maximum 448); from five exponent bits on (E5M2) the top exponent holds infinity and NaN.
    "ieee"  bias 2^(e-1) - 1, the top exponent holds infinity and NaN.
    "ns"    no specials: bias 2^(e-1), every pattern is a number.

A table holds numbers only: rounding saturates, and +0 stands for both zeros.
"""

from __future__ import annotations


def magnitudes(exponent_bits: int, mantissa_bits: int, mode: str) -> tuple[float, ...]:
    """The non-negative values, ascending: index = code without its sign bit."""
    steps = 1 << mantissa_bits
    bias = (1 << (exponent_bits - 1)) - (mode != "ns")
    found = []
    for pattern in range(_patterns(exponent_bits, mantissa_bits, mode)):
        exponent, mantissa = divmod(pattern, steps)
        significand = mantissa if exponent == 0 else mantissa + steps
        found.append(significand * 2.0 ** (max(exponent, 1) - bias - mantissa_bits))
    return tuple(found)


def values(exponent_bits: int, mantissa_bits: int, mode: str) -> tuple[float, ...]:
    """All distinct values, ascending."""
    positive = magnitudes(exponent_bits, mantissa_bits, mode)
    return (*(-one for one in reversed(positive[1:])), *positive)


def largest_exponent(exponent_bits: int, mantissa_bits: int, mode: str) -> int:
    """emax: the exponent of the largest value, floor(log2) of it."""
    import math

    return math.frexp(magnitudes(exponent_bits, mantissa_bits, mode)[-1])[1] - 1


def _patterns(exponent_bits: int, mantissa_bits: int, mode: str) -> int:
    """How many patterns without sign are numbers."""
    count = 1 << (exponent_bits + mantissa_bits)
    if mode == "ieee" or (mode == "" and exponent_bits >= 5):
        return count - (1 << mantissa_bits)
    return count - 1 if (mode, exponent_bits, mantissa_bits) == ("", 4, 3) else count
