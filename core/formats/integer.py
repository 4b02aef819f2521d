"""Integer elements.

asym  from -n/2 to n/2 - 1
sym   symmetric about 0 (halves for even n, so without a zero)
mx    the shared-exponent integers of block floating point and OCP MX: k / 2^(b-2) for |k| < 2^(b-1), so that the
      scale's exponent is that of the block's largest magnitude; the code of -2^(b-1) is read and never written
"""

from __future__ import annotations


def lowest(mode: str, codes: int) -> float:
    """The value of stored code 0 in steps; code k is `lowest + k` steps (optimal formats, section 6.1)."""
    return -(codes - 1) / 2 if mode == "sym" else -float(codes // 2)


def step(mode: str, codes: int) -> float:
    """The distance of neighbouring values."""
    return 4 / codes if mode == "mx" else 1.0


def values(mode: str, codes: int) -> tuple[float, ...]:
    """All values that are written, ascending."""
    first, gap = lowest(mode, codes), step(mode, codes)
    return tuple((first + code) * gap for code in range(1 if mode == "mx" else 0, codes))
