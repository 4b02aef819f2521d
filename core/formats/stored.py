"""How many bytes a tensor takes in a format, exactly and before anything is encoded; pure arithmetic without torch.

Codes lie in one or two planes, one after the other. A plane packs digits in groups: `group` digits d_0, d_1, ... of
radix r are one little-endian number d_0 + d_1 r + d_2 r^2 ... of `width` bytes; the last group takes only the bytes
that it needs. For powers of two that is plain bit packing, lowest bits first (4 bits: the first code is the low
nibble). For other numbers of codes n = low * high two planes of code % low and code // low often come closer to log2 n
bits than one: 12 codes are 2 bits and five ternary digits a byte, 3.6 bits. More than 256 codes: low bytes, and what is
above them. Entropy-coded codes take what they take, which only the data tell, but for a grid: all of its parts together
take exactly the bits per weight that it is named for, and its encoder sees to it that its codes fit. (Rows shorter than
the block, or many outliers, may take nearly all of that: codes get half of the element's bits at least.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import lcm, prod

from core.errors import InvalidFormat
from core.formats import sparse_index
from core.formats.block_types import BLOCK_TYPES
from core.recipe.format_names import SCALE_BITS
from core.recipe.tensor_format import TensorFormat

_MAX_WIDTH = 7  # bytes of a group: its number fits a signed 64-bit integer
_BYTE = 256

_SCALE_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "e8m0": "U8", "e4m3": "F8_E4M3", "dq8": "U8"}
_BYTES = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8}
DOUBLE_BLOCK = 256  # scales that share a scale of their own under dq8
CENTROIDS = 3
LEAST_SHARE = 0.5  # of a grid's element bits, which its codes get where short rows or outliers take more than planned
LEAST_CODED = 32  # bytes of a part of entropy-coded codes in which there is room for a single value


def scale_dtype(fmt: TensorFormat) -> str:
    """The safetensors dtype of stored scales."""
    return _SCALE_DTYPES[fmt.scale_format.partition("-")[0]]


def scale_bits(fmt: TensorFormat) -> float:
    """Bits per scale of long tensors; constants of a whole tensor are left out."""
    return SCALE_BITS[fmt.scale_format.partition("-")[0]]


@dataclass(frozen=True)
class GroupLayout:
    """`group` codes of radix `radix` in `width` bytes; radix at most 256."""

    radix: int
    group: int
    width: int

    def nbytes(self, count: int) -> int:
        """Bytes of `count` packed codes."""
        whole, rest = divmod(count, self.group)
        return whole * self.width + self.tail_bytes(rest)

    def tail_bytes(self, rest: int) -> int:
        """Bytes of a last group of `rest` codes: the least in which its largest number fits."""
        largest: int = self.radix**rest - 1
        return (largest.bit_length() + 7) // 8

    @property
    def bits(self) -> float:
        """Bits per code in whole groups."""
        return 8 * self.width / self.group


@lru_cache(maxsize=512)
def group_layout(radix: int) -> GroupLayout:
    """The layout with the fewest bits per code, and of those the smallest."""
    if radix <= 1:
        return GroupLayout(1, 1, 0)
    layouts = []
    for width in range(1, _MAX_WIDTH + 1):
        group = 1
        while radix ** (group + 1) <= _BYTE**width:
            group += 1
        if radix**group <= _BYTE**width:
            layouts.append(GroupLayout(radix, group, width))
    return min(layouts, key=lambda layout: (layout.bits, layout.width))


@lru_cache(maxsize=512)
def planes(codes: int) -> tuple[GroupLayout, ...]:
    """The layouts of a format's code planes, low digit first: those that take the fewest bits, one plane if it does."""
    if codes > _BYTE:
        return (group_layout(_BYTE), group_layout(-(-codes // _BYTE)))
    candidates = [(group_layout(codes),)] + [
        (group_layout(low), group_layout(codes // low)) for low in range(2, codes) if codes % low == 0
    ]
    return min(candidates, key=lambda found: (sum(plane.bits for plane in found), len(found), _awkwardness(found[0])))


def group_of(codes: int) -> int:
    """Codes after which every plane begins a new group: where a tensor may be cut into pieces."""
    return lcm(*(plane.group for plane in planes(codes)))


def plane_places(codes: int, count: int, start: int) -> list[int]:
    """Where among the bytes of `count` packed codes those from code `start`, a group's first, lie: plane by plane."""
    places, offset = [], 0
    for plane in planes(codes):
        places.append(offset + start // plane.group * plane.width)
        offset += plane.nbytes(count)
    return places


def _awkwardness(low: GroupLayout) -> tuple[bool, int]:
    """Powers of two first: their digits are masks and shifts."""
    return low.radix & (low.radix - 1) != 0, low.radix


def packed_bytes(codes: int, count: int) -> int:
    """Bytes of `count` codes of a format that has `codes` of them."""
    return sum(plane.nbytes(count) for plane in planes(codes))


def packed_bits(codes: int) -> float:
    """Bits per code of long tensors."""
    return sum(plane.bits for plane in planes(codes))


def code_count(fmt: TensorFormat, elements: int) -> int:
    """Codes of so many elements: as many, or one for each vector; the last one may be short."""
    return -(-elements // fmt.vector)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor as rows of its last dimension; a scalar is one row of one."""
    if not shape:
        return 1, 1
    return prod(shape[:-1]), shape[-1]


def scale_shape(fmt: TensorFormat, shape: tuple[int, ...]) -> tuple[int, ...]:
    """One scale for a tensor, one per row, or (rows, blocks of a row); a ragged last block has its own."""
    rows, columns = matrix_shape(shape)
    if fmt.granularity == "tensor":
        return (1,)
    if isinstance(fmt.granularity, int):
        return rows, -(-columns // fmt.granularity)
    return (rows,)


def stored_parts(
    fmt: TensorFormat, shape: tuple[int, ...], outliers: int | None = None, coded: int | None = None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The parts of an encoded tensor: name -> (safetensors dtype, shape). Layout version 1.

    `codes`: packed, U8, or entropy coded, or the blocks of a block type. `scales`. `tensor_scale`: what e4m3 scales are
    multiplied with. `scale_offset`, `scale_absmax`: of dq8. `codebook`: the table of a codebook element, F32, from
    which alone it is decoded; where rows have their own, F16 (rows, codes), each ascending; of a grid of vectors its
    points, F16 (codes, numbers of a vector). `fitted`: the parameter that was fitted. `step`, `centroids`: of a grid,
    its step and how far below k steps, in steps, the numbers of cell k = 1, 2, 3 or more are decoded. `outlier_values`,
    `outlier_index`: see `sparse_index`. `seed`: of a rotation. `column_scales`: of the input dimensions. `outliers`,
    `coded`: their number and the bytes of entropy-coded codes where the data decide these and the format does not tell.
    """
    if fmt.is_block_type:
        return {"codes": ("U8", (_block_bytes(fmt, shape),))}
    parts: dict[str, tuple[str, tuple[int, ...]]] = {"scales": (scale_dtype(fmt), scale_shape(fmt, shape))}
    if fmt.scale_format == "e4m3":
        parts["tensor_scale"] = ("F32", (1,))
    if fmt.scale_format == "dq8":
        parts["scale_offset"] = ("F32", (1,))
        parts["scale_absmax"] = ("F32", (-(-prod(scale_shape(fmt, shape)) // DOUBLE_BLOCK),))
    if fmt.is_codebook or fmt.is_vector_grid:
        parts["codebook"] = _codebook(fmt, matrix_shape(shape)[0])
    if fmt.is_grid:
        parts |= {"step": ("F32", (1,)), "centroids": ("F16", (CENTROIDS,))}
    if fmt.has_column_scales:
        parts["column_scales"] = ("U8", matrix_shape(shape)[1:])
    if fmt.fitted:
        parts["fitted"] = ("F64", (1,))
    if fmt.outlier_rule:
        count = outlier_count(fmt, shape, outliers)
        parts["outlier_values"] = ("BF16", (count,))
        parts["outlier_index"] = ("U8", (sparse_index.index_bytes(prod(shape), count),))
    if fmt.rotation == "rotate":
        parts["seed"] = ("I64", (1,))
    return {"codes": ("U8", (_codes_bytes(fmt, shape, parts, coded),))} | parts


def _codebook(fmt: TensorFormat, rows: int) -> tuple[str, tuple[int, ...]]:
    """Of the part `codebook`."""
    if fmt.is_vector_grid:
        return "F16", (fmt.codes, fmt.vector)
    return ("F16", (rows, fmt.codes)) if fmt.has_row_codebooks else ("F32", (fmt.table_size,))


def _codes_bytes(
    fmt: TensorFormat, shape: tuple[int, ...], others: Mapping[str, tuple[str, tuple[int, ...]]], found: int | None
) -> int:
    """Bytes of the part `codes`."""
    if fmt.is_grid:
        taken = sum(_BYTES[dtype] * prod(size) for dtype, size in others.values())
        least = max(math.floor(fmt.element_bits * LEAST_SHARE * prod(shape) / 8), LEAST_CODED)
        return max(math.floor(fmt.bits * prod(shape) / 8) - taken, least)
    if fmt.entropy_code is None:
        return packed_bytes(fmt.codes, code_count(fmt, prod(shape)))
    known = found if fmt.coded_bytes is None else fmt.coded_bytes
    if known is None:
        raise InvalidFormat(
            f"how many bytes {fmt.entropy_code} takes only the data tell",
            where=str(fmt),
            hint=f"a grid, such as grid3@tensor, or +{fmt.entropy_code}x1234",
        )
    return known


def outlier_count(fmt: TensorFormat, shape: tuple[int, ...], found: int | None = None) -> int:
    """How many outliers a tensor of that shape has; `found` where the data decide it."""
    rule, value = fmt.outlier_rule or ("outliers", 0.0)
    if rule == "outliers":
        return sparse_index.outlier_count(prod(shape), value)
    known = found if fmt.outliers_found is None else fmt.outliers_found
    if known is None:
        raise InvalidFormat(
            f"how many outliers {rule} finds only the data tell", where=str(fmt), hint="outliers0.001, or opq0.95x1234"
        )
    return known


def _block_bytes(fmt: TensorFormat, shape: tuple[int, ...]) -> int:
    """Bytes of a block type: whole blocks of every row."""
    rows, columns = matrix_shape(shape)
    kind = BLOCK_TYPES[fmt.mode]
    return rows * -(-columns // kind.elements) * kind.nbytes
