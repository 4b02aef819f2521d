"""The levels that a frame leaves to choose from, as the compiled loops of rounding take them.

Promise: the nearest of them are those of rounding to nearest, ties included (but under dq8, see `core.tensors.frame`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.recipe.tensor_format import TensorFormat
from core.tensors.frame import Frame
from core.tensors.indices import uses_quotients

Indices = NDArray[np.int32]
ROUNDED, EXACT, QUOTIENTS = 0, 1, 2


@dataclass(frozen=True)
class Levels:
    """The values that weights may take: those of a table times `scales`, fp32 (rows, blocks); `blocks` (columns,): the
    block of each column.

    `kind`: a limit between two values is the real product of the table's with the scale (EXACT), or that rounded to
    fp32; or quotients by the scale, rounded to fp32, are compared (`core.tensors.indices`).
    `zero`: the index under a scale of 0.
    """

    values: NDArray[np.float32]
    limits: NDArray[np.float64]
    upper_on_tie: NDArray[np.bool_]
    kind: int
    zero: int
    scales: NDArray[np.float32]
    blocks: NDArray[np.int64]

    @classmethod
    def of(cls, frame: Frame) -> Levels:
        """Those of a frame; numbers lie between them as rounding to nearest has it."""
        table = frame.table
        return cls(
            values=np.array(table.values, np.float32),
            limits=np.array(table.limits, np.float64),
            upper_on_tie=np.array(table.upper_on_tie, np.bool_),
            kind=_kind(frame.format),
            zero=table.zero,
            scales=np.ascontiguousarray(frame.scales.cpu().numpy()),
            blocks=np.arange(frame.matrix.shape[1], dtype=np.int64) // max(frame.width, 1),
        )

    @property
    def rule(self) -> tuple[Any, ...]:
        """As compiled loops take it."""
        return self.values, self.limits, self.upper_on_tie, self.kind, self.zero

    @property
    def least_squares(self) -> Levels:
        """The same with limits half-way, where the format rounds by others."""
        values = self.values.astype(np.float64)
        return replace(self, limits=(values[1:] + values[:-1]) / 2, kind=EXACT)

    def rows(self, first: int, last: int) -> Levels:
        """Those of some rows."""
        return replace(self, scales=self.scales[first:last])

    def ordered(self, columns: torch.Tensor) -> Levels:
        """With columns in another order."""
        return replace(self, blocks=self.blocks[columns.cpu().numpy()])

    def nearest(self, numbers: torch.Tensor) -> Indices:
        """Indices of the levels nearest to numbers fp64 (rows, columns)."""
        from core.rounding.diffusion_jit import nearest_places

        found = np.empty(tuple(numbers.shape), np.int32)
        nearest_places(numbers.numpy(), self.scales, self.blocks, self.rule, found)
        return found

    def decoded(self, indices: Indices) -> torch.Tensor:
        """fp64 (rows, columns)."""
        return torch.from_numpy((self.values[indices] * self.scales[:, self.blocks]).astype(np.float64))


def _kind(fmt: TensorFormat) -> int:
    if uses_quotients(fmt):
        return QUOTIENTS
    return ROUNDED if fmt.is_codebook else EXACT
