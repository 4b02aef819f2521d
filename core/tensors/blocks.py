"""How a tensor is cut into blocks that share a scale, and into pieces that fit in little memory.

A tensor is a matrix (rows, columns) of its last dimension. Where blocks fill its rows, or where a whole row or the
whole tensor shares a scale, a piece is a run of flat elements; where rows end in a ragged block, a piece is a run of
rows. All pieces but the last hold a whole number of the packing's groups, so that they are packed one after another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from core.formats.stored import matrix_shape
from core.recipe.tensor_format import TensorFormat

PIECE = 1 << 19  # elements that are in work at once, as long as a unit is not larger


@dataclass(frozen=True)
class Piece:
    """Flat elements `start`..`stop` and the blocks `first`..`last` (exclusive) whose scales they use."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class BlockGrid:
    """`width` consecutive elements share a scale; every `columns` elements the count starts anew.

    `ragged` is the length of a row's last block, 0 when blocks fill the rows. `one_scale`: the whole tensor has one.
    """

    elements: int
    columns: int
    width: int
    one_scale: bool = False

    @classmethod
    def of(cls, fmt: TensorFormat, shape: tuple[int, ...]) -> BlockGrid:
        """The grid of a tensor of that shape."""
        rows, columns = matrix_shape(shape)
        elements = rows * columns
        if fmt.granularity == "tensor":
            return cls(elements, max(elements, 1), max(elements, 1), one_scale=True)
        width = fmt.granularity if isinstance(fmt.granularity, int) else columns
        return cls(elements, max(columns, 1), max(min(width, columns), 1))

    @property
    def ragged(self) -> int:
        return self.columns % self.width

    @property
    def blocks_per_row(self) -> int:
        return -(-self.columns // self.width)

    @property
    def blocks(self) -> int:
        """Scales of the tensor."""
        return 1 if self.one_scale else (self.elements // self.columns) * self.blocks_per_row

    @property
    def kernel_blocks(self) -> tuple[int, int]:
        """(columns, width) as compiled loops count: the count starts anew where a row ends in a short block."""
        if self.one_scale:
            return max(self.elements, 1), max(self.elements, 1)
        return (self.columns, self.width) if self.ragged else (self.width, self.width)

    def pieces(self, group: int, limit: int = PIECE) -> Iterator[Piece]:
        """The tensor in pieces of about `limit` elements, cut at multiples of `group` elements and at blocks."""
        unit = 1 if self.one_scale else self.columns if self.ragged else self.width
        step = math.lcm(unit, group)
        step *= max(1, limit // step)
        for start in range(0, self.elements, step):
            stop = min(start + step, self.elements)
            if self.one_scale:
                yield Piece(start, stop, 0, 1)
            else:
                per_unit = self.blocks_per_row if self.ragged else 1
                yield Piece(start, stop, start // unit * per_unit, stop // unit * per_unit)

    def to_blocks(self, values: torch.Tensor) -> torch.Tensor:
        """The elements of a piece as (blocks, width); short blocks are filled up with zeros."""
        if self.one_scale:
            return values.reshape(1, -1)
        if not self.ragged:
            return values.reshape(-1, self.width)
        rows = values.reshape(-1, self.columns)
        filled = torch.nn.functional.pad(rows, (0, self.width - self.ragged))
        return filled.reshape(-1, self.width)

    def from_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_blocks`: flat elements, the filling dropped."""
        if self.one_scale or not self.ragged:
            return blocks.reshape(-1)
        rows = blocks.reshape(-1, self.blocks_per_row * self.width)
        return rows[:, : self.columns].reshape(-1)

    def counts(self, blocks: int, device: torch.device) -> torch.Tensor | int:
        """How many elements each of so many blocks of whole rows has: (blocks,), or one number for all."""
        if not self.ragged:
            return self.width
        row = torch.full((self.blocks_per_row,), self.width, device=device, dtype=torch.float64)
        row[-1] = self.ragged
        return row.repeat(blocks // self.blocks_per_row)
