"""The part `codes` of formats with an entropy code: what is in it, and its numbers, all of them or tile by tile.

    u64 length L, then L bytes, then zeros to the end of the part
    rans: a sequence or a matrix with classes, told apart by their second byte; huffman: a Huffman code

Little endian; docs/entropy.md documents the bytes. The numbers are stored codes, or for a grid signed
multiples of its step, of the tensor as a matrix of its last dimension. A *tile* is a run of the coded order that is
decoded at once: some streams, about 2^22 numbers, so memory does not grow with the tensor (but under huffman, which
has no streams: all of its numbers are decoded first).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from core.errors import InvalidCheckpoint
from core.formats.stored import matrix_shape
from core.tensors.blocks import BlockGrid

if TYPE_CHECKING:
    from core.tensors.entropy.decoder import CodedSequence, DType
    from core.tensors.entropy.loops_jit import Bytes, Numbers

HEAD_BYTES = 8
ROWS, COLUMNS = 0, 1  # of which the coded lines are
_SPAN = 1 << 21  # of the numbers of a tensor: their values stand in a table
_TILE = 1 << 22
_ON_GPU = (torch.float32, torch.bfloat16, torch.float16)
_TOGETHER = 1 << 17  # numbers whose values are worked out at once
FORMS = (None, ROWS, COLUMNS)  # one model for all, or classes of rows or columns


def coded_bytes(codes: Numbers, method: str, form: int | None = None) -> Bytes:
    """The code of a matrix of integers, without its head."""
    from core.tensors.entropy.coder import encode
    from core.tensors.entropy.huffman import huffman_encode
    from core.tensors.entropy.matrix import encode_matrix

    if method == "huffman":
        return huffman_encode(codes)
    return encode(codes) if form is None else encode_matrix(codes, form)


def shortest_form(codes: Numbers, method: str) -> tuple[int | None, Bytes]:
    """The form in which the matrix takes least, and its code."""
    forms = (None,) if method == "huffman" or 1 in codes.shape else FORMS
    found = [(form, coded_bytes(codes, method, form)) for form in forms]
    return min(found, key=lambda one: one[1].size)


def as_part(data: Bytes, size: int | None = None) -> torch.Tensor:
    """The part that holds a code, filled up to `size` bytes where that is given."""
    head = np.frombuffer(data.size.to_bytes(HEAD_BYTES, "little"), np.uint8)
    room = 0 if size is None else size - HEAD_BYTES - data.size
    return torch.from_numpy(np.concatenate([head, data, np.zeros(room, np.uint8)]))


@dataclass(frozen=True)
class Tile:
    """Numbers `start` to `stop` - 1 of the coded order."""

    start: int
    stop: int


class CodedCodes:
    """The numbers of one tensor, still coded. InvalidCheckpoint, here or when they are read, for damaged bytes.

    They are read as *indices*, into a table of values: of a format of so many `codes` the numbers themselves, of a grid
    (None), whose numbers have signs, what they are above the least of them. Line l of the coded order is row (axis 0)
    or column `order[l]`, the l-th one without an order.
    """

    def __init__(self, part: torch.Tensor, method: str, shape: tuple[int, ...], codes: int | None) -> None:
        self.rows, self.columns = matrix_shape(shape)
        self.count = self.rows * self.columns
        self.axis, self.order = ROWS, torch.arange(self.rows)
        self.is_sorted = False  # lines, by classes
        self.sequence: CodedSequence | None = None  # none of a Huffman code
        from core.tensors.entropy.decoder import CodedSequence
        from core.tensors.entropy.huffman import huffman_decode
        from core.tensors.entropy.matrix import KINDS, CodedMatrix

        data = _unpacked(part)
        if method == "huffman":
            self._whole = huffman_decode(data, self.count, np.int32)
        elif data.size > 1 and int(data[1]) in KINDS:
            found = CodedMatrix.parse(data, (self.rows, self.columns))
            self.sequence, self.axis, self.order = found.sequence, found.axis, torch.from_numpy(found.order)
            self.is_sorted = True
        else:
            self.sequence = CodedSequence.parse(data, self.count)
        self._codes, self._is_signed = codes, codes is None

    @cached_property
    def limits(self) -> tuple[int, int]:
        """The least and the largest that a number can be, by what is stored."""
        if self.sequence is not None:
            low, high = self.sequence.limits()
        else:
            low, high = (int(self._whole.min()), int(self._whole.max())) if self.count else (0, 0)
        limits = np.iinfo(np.int32)
        is_wide = high - low >= _SPAN or low < limits.min or high > limits.max
        is_exact = self.sequence is None or self.sequence.plain is None  # the plain kind has whole powers of two
        is_beyond = self._codes is not None and (low < 0 or (is_exact and high >= max(self._codes, 1)))
        if is_wide or is_beyond:
            raise InvalidCheckpoint(f"codes from {low} to {high} that no format has")
        return low, high

    @property
    def is_byte(self) -> bool:
        """Whether indices are uint8; int32 otherwise."""
        return self.limits[1] - self.base <= np.iinfo(np.uint8).max

    @property
    def _dtype(self) -> DType:
        """The smallest that holds the numbers."""
        low, high = self.limits
        kinds: tuple[DType, ...] = (np.int8, np.uint8, np.int32)
        return next(kind for kind in kinds if np.iinfo(kind).min <= low <= high <= np.iinfo(kind).max)

    @property
    def base(self) -> int:
        """The number whose index is 0."""
        return self.limits[0] if self._is_signed else 0

    def streams(self, tile: Tile) -> range | None:
        """The rANS streams of a tile, None where the code has none."""
        if self.sequence is None or not self.sequence.places:
            return None
        return self.sequence.streams_between(tile.start, tile.stop)

    def tiles(self, *, at_once: bool = False) -> list[Tile]:
        """Runs that together are the whole coded order, each the work of one thread; `at_once`: a single one."""
        if at_once:
            return [Tile(0, self.count)] * (self.count > 0)
        if self.sequence is not None:
            return [Tile(start, stop) for start, stop in self.sequence.runs_of(_TILE)]
        return [Tile(start, min(start + _TILE, self.count)) for start in range(0, self.count, _TILE)]

    def read(self, tile: Tile) -> torch.Tensor:
        """The indices of a tile."""
        if self.sequence is None:
            return self._indices(self._whole[tile.start : tile.stop])
        out = np.empty(tile.stop - tile.start, self._dtype)
        self.sequence.decode(out, tile.start)
        return self._indices(out)

    def _indices(self, numbers: Numbers) -> torch.Tensor:
        if self.is_byte:
            return torch.from_numpy(numbers.astype(np.uint8, copy=False) - np.uint8(self.base & 0xFF))
        return torch.from_numpy(numbers.astype(np.int32, copy=False) - np.int32(self.base))

    @cached_property
    def indices(self) -> torch.Tensor:
        """All of them in the tensor's own order, flat."""
        if not self.count:
            return torch.empty(0, dtype=torch.uint8)
        found = torch.cat([self.read(tile) for tile in self.tiles()])
        lines = found.view(len(self.order), -1)
        turned = torch.empty_like(lines)
        turned[self.order] = lines
        return (turned if self.axis == ROWS else turned.T).reshape(-1)


def decode_tile(
    coded: CodedCodes,
    tile: Tile,
    table: torch.Tensor,
    scales: torch.Tensor,
    grid: BlockGrid,
    out: torch.Tensor,
    column_scales: torch.Tensor | None = None,
) -> None:
    """fl32(table[index] * scale) of a tile, rounded once, to its places in `out`, the flat tensor.

    Indices beyond the table take its last value. `scales`: of all blocks of the tensor, fp32, on the device of the
    table and `out`; each times its column's, rounded to fp32, where these are given.
    """
    is_plain = out.device.type == "cuda" and column_scales is None
    if is_plain and coded.streams(tile) is not None and out.dtype in _ON_GPU:
        decode_by_kernel(coded, tile, table, scales, grid, out)
        return
    length = coded.columns if coded.axis == ROWS else coded.rows
    indices, matrix = coded.read(tile), out.view(coded.rows, coded.columns)
    spread = _Factors(scales, grid, column_scales)
    for first, last, begin, end in _line_parts(tile, length):
        at = first * length + begin - tile.start
        part = indices[at : at + (last - first) * (end - begin)].to(out.device).int().clamp_(max=table.numel() - 1)
        values = table.index_select(0, part).view(last - first, end - begin)
        lines = coded.order[first:last].to(out.device)
        inside = torch.arange(begin, end, device=out.device)
        if coded.axis == ROWS:
            matrix[lines, begin:end] = values.mul_(spread(lines, inside)).to(out.dtype)
        else:
            matrix[begin:end, lines] = values.T.mul(spread(inside, lines)).to(out.dtype)


def decode_by_kernel(
    coded: CodedCodes, tile: Tile, table: torch.Tensor, scales: torch.Tensor, grid: BlockGrid, out: torch.Tensor
) -> None:
    """The same by the kernel for GPUs, one warp for each stream; where there is none, its door decodes on the CPU."""
    from core.tensors.kernels import gpu_entropy

    streams, order = coded.streams(tile), coded.order.int().to(out.device) if coded.is_sorted else None
    if coded.sequence is not None and streams is not None:
        where = (scales, coded.columns, grid.width, order, coded.axis)
        gpu_entropy.dequantise(coded.sequence, streams, out, table, coded.base, *where)


def _line_parts(tile: Tile, length: int) -> Iterator[tuple[int, int, int, int]]:
    """(first line, beyond the last, begin, end within lines): runs of whole lines, and the part of a line at an end."""
    at = tile.start
    while at < tile.stop:
        line, begin = divmod(at, length)
        whole = min((tile.stop - at) // length, max(1, _TOGETHER // length))
        if begin or not whole:
            end = min(length, begin + tile.stop - at)
            yield line, line + 1, begin, end
            at += end - begin
        else:
            yield line, line + whole, 0, length
            at += whole * length


class _Factors:
    """The scale of every element of some rows and columns."""

    def __init__(self, scales: torch.Tensor, grid: BlockGrid, column_scales: torch.Tensor | None) -> None:
        self._scales, self._grid, self._column_scales = scales, grid, column_scales

    def __call__(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        of_blocks = self._of_blocks(rows, columns)
        return of_blocks if self._column_scales is None else of_blocks * self._column_scales[columns]

    def _of_blocks(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        if self._grid.one_scale:
            return self._scales.view(1, 1)
        blocks = columns // self._grid.width
        return self._scales.view(-1, self._grid.blocks_per_row)[rows][:, blocks]


def _unpacked(part: torch.Tensor) -> Bytes:
    """The code in a part; InvalidCheckpoint where there is something else."""
    data = part.detach().cpu().numpy()
    size = int.from_bytes(data[:HEAD_BYTES].tobytes(), "little") if data.size >= HEAD_BYTES else data.size
    if size > data.size - HEAD_BYTES or data[HEAD_BYTES + size :].any():
        raise InvalidCheckpoint(f"{data.size} bytes that hold no entropy-coded codes")
    return data[HEAD_BYTES : HEAD_BYTES + size]
