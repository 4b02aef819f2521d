"""An encoded tensor: packed codes, scales and what its format needs, with exact decoding from these alone.

Promise: `decode` is a function of the parts only (never of a table that a library computes again), the same on every
device and for any thread count, and `nbytes` are the bytes that are stored. Decoded value: fl32(table[code] * scale),
rotated back where the format rotates, overwritten where outliers are stored, rounded once to the dtype asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch

from core.errors import BitmillError, InvalidCheckpoint
from core.formats import integer
from core.formats.block_types import BLOCK_TYPES
from core.formats.elements import element_table, shared_weights, stored_codes
from core.formats.stored import code_count, group_of, matrix_shape, plane_places, planes, scale_shape, stored_parts
from core.recipe.tensor_format import TensorFormat
from core.tensors import outliers, rotation
from core.tensors.block_types import rows
from core.tensors.blocks import BlockGrid, Piece
from core.tensors.coded import CodedCodes, decode_tile
from core.tensors.column_scales import scales_of
from core.tensors.dtypes import TORCH_DTYPES
from core.tensors.grid import grid_values
from core.tensors.kernels import cpu, cpu_packing, gpu
from core.tensors.packing import unpack_planes
from core.tensors.row_codebooks import decode_rows, decoded_values
from core.tensors.scale_formats import decoded_scales, undo_double
from core.tensors.vector_grid import values_of

_KERNEL_CODES = 256


@dataclass(frozen=True)
class EncodedTensor:
    """`shape` and `dtype` (safetensors name) are those of the tensor before it was encoded.

    `stored`: the parts by name, as `core.formats.stored.stored_parts` describes them. `notes`: what its rounding had
    to do otherwise than asked; they are not stored with it.
    """

    format: TensorFormat
    shape: tuple[int, ...]
    dtype: str
    stored: Mapping[str, torch.Tensor]
    notes: tuple[str, ...] = ()

    @classmethod
    def planned_parts(cls, fmt: TensorFormat, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The parts that a tensor of that shape will have: name -> (safetensors dtype, shape)."""
        return stored_parts(fmt, shape)

    @classmethod
    def from_parts(
        cls, fmt: TensorFormat, shape: tuple[int, ...], dtype: str, parts: Mapping[str, torch.Tensor]
    ) -> EncodedTensor:
        """The tensor that `parts` came from; InvalidCheckpoint when a part is missing or has another shape."""
        sizes = (parts[name].numel() if name in parts else 0 for name in ("outlier_values", "codes"))
        planned = stored_parts(fmt, shape, *sizes)
        for name, (kind, size) in planned.items():
            found = parts.get(name)
            if found is None or found.dtype != TORCH_DTYPES[kind] or tuple(found.shape) != size:
                raise InvalidCheckpoint(f"{fmt} needs a part {name!r} of {kind} {list(size)}")
        return cls(fmt, shape, dtype, {name: parts[name] for name in planned})

    def with_notes(self, notes: tuple[str, ...]) -> EncodedTensor:
        """The same with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def parts(self) -> dict[str, torch.Tensor]:
        """What is stored, by name."""
        return dict(self.stored)

    @property
    def codes(self) -> torch.Tensor:
        """uint8: packed, or entropy coded."""
        return self.stored["codes"]

    @cached_property
    def coded(self) -> CodedCodes | None:
        """The codes of a format with an entropy code."""
        if self.format.entropy_code is None:
            return None
        return CodedCodes(
            self.codes, self.format.entropy_code, self.shape, None if self.format.is_grid else self.format.codes
        )

    @property
    def scales(self) -> torch.Tensor:
        """As stored."""
        return self.stored["scales"]

    @property
    def codebook(self) -> torch.Tensor | None:
        """The stored table of a codebook format: fp32; fp16 (rows, codes) where every row has its own, fp16 (codes,
        numbers of a vector) of a grid of vectors.
        """
        return self.stored.get("codebook")

    @property
    def fitted(self) -> float | None:
        """The parameter that was fitted to the tensor."""
        return float(self.stored["fitted"]) if "fitted" in self.stored else None

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.stored.values())

    @cached_property
    def scale_values(self) -> torch.Tensor:
        """The scale of every block, flat fp32."""
        if self.format.scale_format == "dq8":
            return undo_double(self.stored)
        return decoded_scales(self.format, self.scales.reshape(-1), self.stored.get("tensor_scale"))

    @cached_property
    def column_scales(self) -> torch.Tensor | None:
        """The scale of every input dimension, fp32, where the format has them."""
        return scales_of(self.stored["column_scales"]) if self.format.has_column_scales else None

    def decode(self, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor in its shape, on the device of the parts.

        `out`: flat memory of that dtype and device to decode into, for whoever has some; it costs more to get new.
        """
        found = self._decoded(dtype, out)
        if out is None or found.data_ptr() == out.data_ptr():
            return found
        return out.copy_(found.reshape(-1)).reshape(self.shape)

    def _decoded(self, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
        """Into `out` where values can be decoded one by one, into new memory otherwise."""
        if self.format.is_block_type:
            count, columns = matrix_shape(self.shape)
            blocks = self.codes.reshape(count, BLOCK_TYPES[self.format.mode].row_bytes(columns))
            found = rows.decode_rows(self.format.mode, blocks, columns).reshape(self.shape).to(self.codes.device)
            return _saturated(found, dtype)
        if dtype is not torch.float32 and self._may_exceed(dtype):
            return _saturated(self.decode(), dtype)
        flat = self._dense(dtype, out)
        if self.format.rotation is not None:
            flat = self._rotated_back(flat)
        if "outlier_index" in self.stored:
            outliers.overwrite(flat, self._outlier_places, self.stored["outlier_values"])
        return flat.reshape(self.shape)

    def _may_exceed(self, dtype: torch.dtype) -> bool:
        """Whether a value may be too large for a dtype, as it may after rotating back: decoding then saturates."""
        if not self.elements:
            return False
        largest = self.scale_values.abs().max() * self.table.abs().max()
        if self.column_scales is not None:
            largest = largest * self.column_scales.abs().max()
        return self.format.rotation is not None or float(largest) > torch.finfo(dtype).max

    def _dense(self, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
        """All elements, flat, before rotation and outliers."""
        by_rows = self.format.has_row_codebooks
        is_scalar = not by_rows and not self.format.is_vector_grid
        is_plain_on_gpu = self.codes.device.type == "cuda" and self.coded is None and is_scalar
        found = gpu.decode(self, dtype) if is_plain_on_gpu else None
        if found is not None:
            return found
        flat = torch.empty(self.elements, dtype=dtype, device=self.codes.device) if out is None else out
        if self.coded is not None and not by_rows:
            return self._decoded_tiles(self.coded, flat)
        grid = self.grid
        over = cpu.over_pieces if self._has_kernel else map
        work = over(
            lambda piece: self._decode_into(flat[piece.start : piece.stop], grid, piece), grid.pieces(self.group)
        )
        list(work)
        return flat

    def _decoded_tiles(self, coded: CodedCodes, flat: torch.Tensor) -> torch.Tensor:
        """Tile by tile, so that only as many codes as are being worked on take memory."""
        table, scales, grid = self.table, self.scale_values, self.grid
        columns = self.column_scales
        by_kernel = flat.device.type == "cuda" and columns is None
        tiles = coded.tiles(at_once=by_kernel)  # there a tile would be the work of a few warps
        cpu.over_pieces(lambda tile: decode_tile(coded, tile, table, scales, grid, flat, columns), tiles)
        return flat

    def decoded_pieces(self) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Pieces of the tensor with their flat fp32 elements; one at a time where the format allows it."""
        grid = self.grid
        is_turned = self.format.rotation is not None or self.format.has_column_scales
        plain = not self.format.is_block_type and not is_turned and "outlier_index" not in self.stored
        whole = None if plain else self.decode().reshape(-1)
        for piece in grid.pieces(self.group):
            yield piece, self.decode_piece(grid, piece) if whole is None else whole[piece.start : piece.stop]

    @property
    def grid(self) -> BlockGrid:
        """How the tensor is cut into blocks."""
        return BlockGrid.of(self.format, self.shape)

    @property
    def group(self) -> int:
        """Elements whose codes are packed together: pieces begin at multiples of this."""
        if self.format.is_block_type or self.format.entropy_code:
            return 1
        return group_of(self.format.codes) * self.format.vector

    def decode_piece(self, grid: BlockGrid, piece: Piece) -> torch.Tensor:
        """The flat elements of a piece, fp32, before rotation and outliers."""
        out = torch.empty(piece.stop - piece.start, device=self.codes.device)
        self._decode_into(out, grid, piece)
        return out

    def _decode_into(self, out: torch.Tensor, grid: BlockGrid, piece: Piece) -> None:
        codes, scales = self._piece_codes(piece), self.scale_values[piece.first : piece.last]
        if self.format.has_row_codebooks:
            decode_rows(codes, decoded_values(self.table[piece.first : piece.last], scales), grid.columns, out)
        elif self._has_kernel and out.dtype in cpu.OUTPUTS:
            cpu.decode(codes, self.table, scales, *grid.kernel_blocks, out)
        else:
            values = values_of(codes, self.table, out.numel())
            out.copy_(grid.from_blocks(grid.to_blocks(values) * scales[:, None]))

    @cached_property
    def _outlier_places(self) -> torch.Tensor:
        count = self.stored["outlier_values"].numel()
        return outliers.decode_index(self.stored["outlier_index"], self.elements, count)

    def _rotated_back(self, flat: torch.Tensor) -> torch.Tensor:
        matrix = flat.view(matrix_shape(self.shape))
        if self.format.rotation == "hadamard":
            rotation.rotate_rows_(matrix)
        else:
            rotation.RandomRotation.of(int(self.stored["seed"]), self.shape).restore_(matrix)
        return flat

    def all_codes(self) -> torch.Tensor:
        """The stored code of every element or vector, flat."""
        pieces = [self._piece_codes(piece) for piece in self.grid.pieces(self.group)]
        return torch.cat(pieces or [self.codes[:0]])

    def _piece_codes(self, piece: Piece) -> torch.Tensor:
        if self.coded is not None:
            return self.coded.indices[piece.start : piece.stop].to(self.codes.device)
        fmt, radix = self.format, self.format.codes
        count = code_count(fmt, piece.stop - piece.start)
        places = plane_places(radix, code_count(fmt, self.elements), piece.start // fmt.vector)
        sizes = [plane.nbytes(count) for plane in planes(radix)]
        pieces = [self.codes[at : at + size] for at, size in zip(places, sizes, strict=True)]
        if self.codes.device.type == "cpu" and radix <= _KERNEL_CODES:
            return cpu_packing.unpack_planes(pieces, radix, count)
        return unpack_planes(pieces, radix, count)

    @property
    def _has_kernel(self) -> bool:
        if self.format.is_vector_grid:
            return False
        if self.coded is None:
            return self.codes.device.type == "cpu" and self.format.codes <= _KERNEL_CODES
        return self.codes.device.type == "cpu" and self.coded.is_byte and self.table.numel() <= _KERNEL_CODES

    @cached_property
    def table(self) -> torch.Tensor:
        """Values by stored code, fp32: the stored codebook, or a number's patterns, 0 for those that are no number.

        Where every row has its own, (rows, codes); of a grid of vectors (codes, numbers of a vector).
        """
        if self.codebook is not None:
            return self.codebook.float()
        if self.coded is not None and self.format.is_grid:
            return self._grid_table(self.coded)
        if self.format.family == "int":
            levels = torch.arange(self.format.codes, dtype=torch.float32, device=self.codes.device)
            return (levels + integer.lowest(self.format.mode, self.format.codes)) * integer.step(
                self.format.mode, self.format.codes
            )
        fmt = self.format if self.format.fitted is None else self._resolved()
        values = element_table(fmt, shared_weights(fmt, self.shape)).values
        codes = stored_codes(fmt, len(values)) or tuple(range(len(values)))
        patterns = torch.zeros(fmt.codes)
        patterns[list(codes)] = torch.tensor(values, dtype=torch.float32)
        return patterns.to(self.codes.device)

    def _grid_table(self, coded: CodedCodes) -> torch.Tensor:
        step, centroids = self.stored["step"], self.stored["centroids"]
        if not 0 < float(step) < torch.inf or not bool((centroids.abs() <= 0.5).all()):
            raise InvalidCheckpoint(
                f"a grid with a step of {float(step):g} and centroids of {centroids.tolist()} steps"
            )
        return grid_values(step, centroids, *coded.limits)

    def _resolved(self) -> TensorFormat:
        try:
            return self.format.with_fitted(self.fitted or 0.0)
        except BitmillError as error:
            raise InvalidCheckpoint(f"{self.format} cannot have been fitted: {error.detail}") from error


def _saturated(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 values in another dtype, at the end of its range where they are beyond it."""
    if dtype is torch.float32:
        return values
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return values.clamp_(-limit, limit).to(dtype)


def scales_like(fmt: TensorFormat, shape: tuple[int, ...], flat: torch.Tensor) -> torch.Tensor:
    """Flat stored scales in the shape in which they are stored."""
    return flat.reshape(scale_shape(fmt, shape))
