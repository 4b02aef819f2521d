"""Integer elements: `int<bits>-asym` from -n/2 to n/2 - 1, `int<bits>-sym` symmetric about 0 (halves for even n)."""

from __future__ import annotations


def lowest(mode: str, codes: int) -> float:
    """The value of code 0; code k is `lowest + k` (optimal formats, section 6.1)."""
    return -float(codes // 2) if mode == "asym" else -(codes - 1) / 2


def values(mode: str, codes: int) -> tuple[float, ...]:
    """All values, ascending: index = code."""
    first = lowest(mode, codes)
    return tuple(first + code for code in range(codes))
