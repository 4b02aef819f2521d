"""An encoded tensor: packed codes, scales and what its format needs, with exact decoding from these alone.

Promise: `decode` is a function of the parts only (never of a table that a library computes again), the same on every
device and for any thread count, and `nbytes` are the bytes that are stored. Decoded value: fl32(table[code] * scale).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from core.errors import InvalidCheckpoint
from core.formats import integer
from core.formats.elements import element_table, shared_weights
from core.formats.stored import group_of, planes, scale_shape, stored_parts
from core.recipe.tensor_format import TensorFormat
from core.tensors.blocks import BlockGrid, Piece
from core.tensors.dtypes import TORCH_DTYPES
from core.tensors.packing import unpack_planes
from core.tensors.scales import decoded_scales


@dataclass(frozen=True)
class EncodedTensor:
    """`shape` and `dtype` (safetensors name) are those of the tensor before it was encoded.

    `codes`: uint8, packed (`core.formats.stored`). `scales`: as stored. `codebook`: fp32 (codes,) or None.
    """

    format: TensorFormat
    shape: tuple[int, ...]
    dtype: str
    codes: torch.Tensor
    scales: torch.Tensor
    codebook: torch.Tensor | None = None

    @classmethod
    def planned_parts(cls, fmt: TensorFormat, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The parts that a tensor of that shape will have: name -> (safetensors dtype, shape)."""
        return stored_parts(fmt, shape)

    @classmethod
    def from_parts(
        cls, fmt: TensorFormat, shape: tuple[int, ...], dtype: str, parts: Mapping[str, torch.Tensor]
    ) -> EncodedTensor:
        """The tensor that `parts` came from; InvalidCheckpoint when a part is missing or has another shape."""
        planned = stored_parts(fmt, shape)
        for name, (kind, size) in planned.items():
            found = parts.get(name)
            if found is None or found.dtype != TORCH_DTYPES[kind] or tuple(found.shape) != size:
                raise InvalidCheckpoint(f"{fmt} needs a part {name!r} of {kind} {list(size)}")
        return cls(fmt, shape, dtype, parts["codes"], parts["scales"], parts.get("codebook"))

    def parts(self) -> dict[str, torch.Tensor]:
        """What is stored, by name."""
        found = {"codes": self.codes, "scales": self.scales}
        return found if self.codebook is None else found | {"codebook": self.codebook}

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts().values())

    def decode(self) -> torch.Tensor:
        """The tensor in its shape, fp32, on the device of the parts."""
        flat = torch.empty(self.elements, dtype=torch.float32, device=self.codes.device)
        grid = self.grid
        for piece in grid.pieces(self.group):
            flat[piece.start : piece.stop] = self.decode_piece(grid, piece)
        return flat.reshape(self.shape)

    @property
    def grid(self) -> BlockGrid:
        """How the tensor is cut into blocks."""
        return BlockGrid.of(self.format, self.shape)

    @property
    def group(self) -> int:
        """Codes that are packed together: pieces begin at multiples of this."""
        return group_of(self.format.codes)

    def decode_piece(self, grid: BlockGrid, piece: Piece) -> torch.Tensor:
        """The flat elements of a piece, fp32."""
        values = grid.to_blocks(self._values(self._piece_codes(piece)))
        scales = decoded_scales(self.format, self.scales.reshape(-1)[piece.first : piece.last])
        return grid.from_blocks(values * scales[:, None])

    def _piece_codes(self, piece: Piece) -> torch.Tensor:
        count, offset, pieces = piece.stop - piece.start, 0, []
        for plane in planes(self.format.codes):
            begin = offset + piece.start // plane.group * plane.width
            pieces.append(self.codes[begin : begin + plane.nbytes(count)])
            offset += plane.nbytes(self.elements)
        return unpack_planes(pieces, self.format.codes, count)

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        """Table values of codes, fp32; codes that no table has decode to 0 (hostile bytes cannot read beyond it)."""
        if self.format.family == "int":
            return codes.float() + integer.lowest(self.format.mode, self.format.codes)
        table = self._table()
        return torch.index_select(table, 0, codes.int().clamp_(max=table.numel() - 1))

    def _table(self) -> torch.Tensor:
        """Values by stored code, fp32: the stored codebook, or a float's patterns, 0 for those that are no number."""
        if self.codebook is not None:
            return self.codebook
        table = element_table(self.format, shared_weights(self.format, self.shape))
        values = torch.tensor(table.values, dtype=torch.float32)
        patterns = torch.zeros(self.format.codes)
        patterns[float_patterns(self.format, len(table.values))] = values
        return patterns.to(self.codes.device)


def float_patterns(fmt: TensorFormat, count: int) -> torch.Tensor:
    """Bit patterns of a float's `count` values in ascending order, int64: sign bit, then magnitude."""
    order = torch.arange(count) - count // 2
    return torch.where(order < 0, (fmt.codes // 2) - order, order)


def scales_like(fmt: TensorFormat, shape: tuple[int, ...], flat: torch.Tensor) -> torch.Tensor:
    """Flat stored scales in the shape in which they are stored."""
    return flat.reshape(scale_shape(fmt, shape))
