"""The two passes that encoding makes over a tensor, piece by piece: statistics of blocks, and packed codes.

Three implementations of one thing: `Reference`, the readable one in torch, for any device and dtype; `Compiled`, loops
for the CPU, and `OnGpu`, kernels for CUDA devices, that give the same bits many times as fast. `passes_for` takes those
that apply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from core.errors import NonFiniteWeights
from core.formats.elements import ElementTable, stored_codes
from core.formats.stored import group_of, packed_bytes, plane_places, planes, scale_dtype
from core.recipe.tensor_format import TensorFormat
from core.tensors.blocks import PIECE, BlockGrid, Piece
from core.tensors.dtypes import TORCH_DTYPES
from core.tensors.indices import nearest_indices, uses_quotients
from core.tensors.kernels import cpu, cpu_packing, gpu
from core.tensors.kernels.cpu_rule import rounding_rule
from core.tensors.kernels.cpu_whole import OnePass, one_pass
from core.tensors.packing import pack_planes
from core.tensors.scales import extreme_of, sum_of_squares

Result = TypeVar("Result")
Statistics = tuple[torch.Tensor, torch.Tensor | None]


class Encoded(NamedTuple):
    """`codes`: packed, uint8. `scales`: as stored, flat."""

    codes: torch.Tensor
    scales: torch.Tensor


class Passes(Protocol):
    """One tensor's passes. Pieces may be asked for in any order and from several threads."""

    def whole(self, table: ElementTable) -> Encoded | None:
        """All of the tensor in one pass; None where it takes two. NonFiniteWeights for NaN or infinity."""
        ...

    def statistics(self, piece: Piece) -> Statistics:
        """Extremes of the blocks, fp32 (signed under signmax), and under rms their sums of squares, fp64.

        NonFiniteWeights for NaN or infinity in the piece.
        """
        ...

    def all_codes(self, factors: torch.Tensor, table: ElementTable) -> torch.Tensor | None:
        """Packed codes of the tensor for decoded scales `factors`; None where they are made piece by piece."""
        ...

    def codes(self, piece: Piece, factors: torch.Tensor, table: ElementTable) -> list[torch.Tensor]:
        """Packed codes of each plane for decoded scales `factors`, one per block of the piece."""
        ...

    def over(self, work: Callable[[Piece], Result], pieces: Iterable[Piece]) -> list[Result]:
        """`work` of each piece, in order."""
        ...


def passes_for(flat: torch.Tensor, fmt: TensorFormat, shape: tuple[int, ...]) -> Passes:
    """The passes over a flat tensor of that shape."""
    if flat.device.type == "cpu" and cpu.supports(flat.dtype, 0 if fmt.is_grid or fmt.is_vector_grid else fmt.codes):
        return Compiled(flat.contiguous(), fmt, shape)
    return (OnGpu if flat.device.type == "cuda" else Reference)(flat, fmt, shape)


def require_finite(weight: torch.Tensor) -> None:
    """NonFiniteWeights with the place of the first NaN or infinity."""
    flat = weight.reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        finite = torch.isfinite(flat[start : start + PIECE])
        if not bool(finite.all()):
            raise refuse_not_finite(tuple(weight.shape), start + int((~finite).to(torch.uint8).argmax()))


def refuse_not_finite(shape: tuple[int, ...], place: int) -> NonFiniteWeights:
    """The error for NaN or infinity at a flat place of a tensor."""
    index = [int(at) for at in torch.unravel_index(torch.tensor(place), shape)]
    return NonFiniteWeights(
        f"NaN or infinity among the weights, the first at {index}",
        hint="the checkpoint is damaged: copy it anew, or keep the tensor by an override",
    )


class Reference:
    """By torch's operations."""

    def __init__(self, flat: torch.Tensor, fmt: TensorFormat, shape: tuple[int, ...]) -> None:
        self.flat, self.fmt, self.shape = flat, fmt, shape
        self.grid = BlockGrid.of(fmt, shape)

    def blocks(self, piece: Piece) -> torch.Tensor:
        """(blocks, width) fp32 of a piece."""
        return self.grid.to_blocks(self.flat[piece.start : piece.stop].float())

    def whole(self, table: ElementTable) -> Encoded | None:  # noqa: ARG002 - the readable one has two passes
        return None

    def all_codes(self, factors: torch.Tensor, table: ElementTable) -> torch.Tensor | None:  # noqa: ARG002 - likewise
        return None

    def statistics(self, piece: Piece) -> Statistics:
        blocks = self.blocks(piece)
        finite = torch.isfinite(blocks)
        if not bool(finite.all()):
            place = int((~self.grid.from_blocks(finite)).to(torch.uint8).argmax())
            raise refuse_not_finite(self.shape, piece.start + place)
        squares = sum_of_squares(blocks) if self.fmt.base_statistic == "rms" else None
        return extreme_of(blocks, self.fmt.base_statistic), squares

    def codes(self, piece: Piece, factors: torch.Tensor, table: ElementTable) -> list[torch.Tensor]:
        indices = self.grid.from_blocks(nearest_indices(self.blocks(piece), factors, self.fmt, table))
        patterns = stored_codes(self.fmt, len(table.values))
        if patterns is not None:
            indices = torch.tensor(patterns, device=indices.device)[indices.long()]
        return pack_planes(indices, self.fmt.codes)

    def over(self, work: Callable[[Piece], Result], pieces: Iterable[Piece]) -> list[Result]:
        return [work(piece) for piece in pieces]


class OnGpu(Reference):
    """By kernels; by torch's operations what they do not take."""

    def whole(self, table: ElementTable) -> Encoded | None:
        found = gpu.encode(self.flat.reshape(self.shape), self.fmt, table)
        if found is None:
            return None
        if not bool(found.finite):
            require_finite(self.flat.reshape(self.shape))
        return Encoded(found.codes, found.scales.reshape(-1))

    def all_codes(self, factors: torch.Tensor, table: ElementTable) -> torch.Tensor | None:
        return gpu.encode_codes(self.flat.reshape(self.shape), self.fmt, table, factors)


class Compiled:
    """By compiled loops, on as many threads as torch has."""

    def __init__(self, flat: torch.Tensor, fmt: TensorFormat, shape: tuple[int, ...]) -> None:
        self.flat, self.fmt, self.shape = flat, fmt, shape
        self.grid = BlockGrid.of(fmt, shape)
        self.columns, self.width = self.grid.kernel_blocks

    def whole(self, table: ElementTable) -> Encoded | None:
        pass_ = one_pass(self.fmt, table, self.grid)
        if pass_ is None:
            return None
        codes = torch.from_numpy(np.empty(packed_bytes(self.fmt.codes, self.grid.elements), np.uint8))
        found = Encoded(codes, torch.empty(self.grid.blocks, dtype=TORCH_DTYPES[scale_dtype(self.fmt)]))
        self.over(lambda piece: self._place(piece, pass_, found), self.grid.pieces(group_of(self.fmt.codes)))
        return found

    def _place(self, piece: Piece, pass_: OnePass, found: Encoded) -> None:
        """Scales and codes of a piece at their places."""
        radix, count = self.fmt.codes, piece.stop - piece.start
        places = plane_places(radix, self.grid.elements, piece.start)
        bytes_ = [found.codes[at : at + plane.nbytes(count)] for at, plane in zip(places, planes(radix), strict=True)]
        scales, blocks = found.scales[piece.first : piece.last], (self.columns, self.width)
        damaged = pass_.encode(self.flat, piece.start, piece.stop, blocks, scales, bytes_)
        if damaged is not None:
            raise refuse_not_finite(self.shape, piece.start + damaged)

    def all_codes(self, factors: torch.Tensor, table: ElementTable) -> torch.Tensor | None:  # noqa: ARG002 - as the others
        return None

    def statistics(self, piece: Piece) -> Statistics:
        values, name = self.flat[piece.start : piece.stop], self.fmt.base_statistic
        found = cpu.statistics(values, self.columns, self.width, name)
        if found.not_finite is not None:
            raise refuse_not_finite(self.shape, piece.start + found.not_finite)
        return found.extreme, found.squares

    def codes(self, piece: Piece, factors: torch.Tensor, table: ElementTable) -> list[torch.Tensor]:
        fmt = self.fmt
        patterns = stored_codes(fmt, len(table.values))
        rule = rounding_rule(table, exact=not fmt.is_codebook, stored=patterns, quotients=uses_quotients(fmt))
        found = cpu.encode_codes(self.flat, piece.start, piece.stop, factors, rule, self.columns, self.width)
        return cpu_packing.pack_planes(found, fmt.codes)

    def over(self, work: Callable[[Piece], Result], pieces: Iterable[Piece]) -> list[Result]:
        return cpu.over_pieces(work, pieces)
