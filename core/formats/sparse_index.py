"""How many outliers a tensor has and how many bytes their positions take: known before anything is encoded, no torch.

The flat positions of n outliers among N elements, ascending, are an Elias-Fano code of two sections that follow each
other, each filled up with zero bits to whole bytes, bit k of a section being bit k % 8 of its byte k // 8:

* low: the `low_width` l = floor(log2(N / n)) lowest bits of each position, in order, lowest bit first;
* high: n + ((N - 1) >> l) bits, in which bit (position_i >> l) + i is 1 for the i-th position (from 0) and all others
  are 0: a unary code of the steps from one high part to the next.

That is at most l + 3 bits a position and l + 2 where N / n is a power of two (12 bits at one in 1024), against 32 or 64
of plain positions. A tensor without outliers takes no bytes. Values are no concern of this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from core.errors import InvalidCheckpoint, InvalidFormat


def outlier_count(elements: int, ratio: float) -> int:
    """floor(ratio * elements), the ratio taken as the decimal number that it is written as; ratio in [0, 1]."""
    if not 0 <= ratio <= 1:
        raise InvalidFormat(f"a share of {ratio:g} outliers", hint="between 0 and 1, for instance 0.001")
    return int(Fraction(repr(float(ratio))) * elements)


@dataclass(frozen=True)
class IndexLayout:
    """The sections of `count` positions among `elements`; InvalidCheckpoint where there cannot be so many."""

    elements: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.elements:
            raise InvalidCheckpoint(f"{self.count} outliers among {self.elements} elements")

    @property
    def low_width(self) -> int:
        """Bits of each position that are stored as they are."""
        return (self.elements // self.count).bit_length() - 1 if self.count else 0

    @property
    def low_bytes(self) -> int:
        return (self.count * self.low_width + 7) // 8

    @property
    def high_bits(self) -> int:
        """Bits of the unary section, of which `count` are 1."""
        return self.count + ((self.elements - 1) >> self.low_width) if self.count else 0

    @property
    def high_bytes(self) -> int:
        return (self.high_bits + 7) // 8


def index_bytes(elements: int, count: int) -> int:
    """Bytes of the positions of `count` outliers among `elements`."""
    layout = IndexLayout(elements, count)
    return layout.low_bytes + layout.high_bytes
