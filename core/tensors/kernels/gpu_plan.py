"""What a GPU kernel is given for a tensor and a format: geometry, element and launch parameters; pure, without Triton.

Also the answer to whether a format is taken at all: `refusal` names the reason why not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from core.formats.elements import ElementTable, stored_codes
from core.formats.stored import group_of
from core.recipe.tensor_format import TensorFormat
from core.tensors.blocks import BlockGrid
from core.tensors.indices import nearest_indices, uses_quotients
from core.tensors.scale_formats import end_of, stored_scales

RUN = 8  # elements of a thread in one load: 16 bytes of bf16; the tree of 16 codes stays in registers
_THREADS = 128
_WARP = 32
_FP32_BITS, _FP32_LEAST = 24, -149
# Bits of a scale's significand and the power of two of which every scale is a multiple.
_SIGNIFICANDS = {"bf16": (8, -133), "fp16": (11, -24), "fp32": (24, -149), "e8m0": (1, -127), "dq8": (24, -149)}
_LARGEST_INDEX = (1 << 31) - 1
_MANTISSA = 23
_BIAS = 127
_MOST_BITS = 8


@dataclass(frozen=True)
class Geometry:
    """How blocks are given to programs.

    A tensor is rows of `columns` elements in `per_row` blocks of `width`, `blocks` in all. A program works on `rows`
    blocks, `lanes` elements of each in `parts` runs; blocks that are longer take `chunks` programs. `aligned`: a power
    of two that divides where blocks begin and end. `is_full`: every lane of every block is an element.
    """

    blocks: int
    columns: int
    width: int
    per_row: int
    rows: int
    lanes: int
    parts: int
    chunks: int
    aligned: int
    is_full: bool

    @classmethod
    def of(cls, grid: BlockGrid, largest: int = 16_384, most_parts: int = 4) -> Geometry:
        """128 threads that take `most_parts` runs each, more threads for longer blocks, chunks beyond `largest`."""
        lanes = min(max(_power_above(grid.width), RUN), largest)
        parts = min(lanes // RUN, most_parts)
        aligned = math.gcd(grid.columns, grid.width, 2 * RUN)
        return cls(
            blocks=grid.blocks,
            columns=grid.columns,
            width=grid.width,
            per_row=grid.blocks_per_row,
            rows=max(1, _THREADS * RUN * parts // lanes),
            lanes=lanes,
            parts=parts,
            chunks=-(-grid.width // lanes),
            aligned=aligned,
            is_full=grid.width % lanes == 0 and not grid.ragged,
        )

    @classmethod
    def for_decoding(cls, grid: BlockGrid) -> Geometry:
        """A geometry where nothing is computed of whole blocks: smaller tiles."""
        return cls.of(grid, largest=2048, most_parts=2)

    @property
    def programs(self) -> int:
        """Programs of a launch in which each works on one tile."""
        return -(-self.blocks // self.rows) * self.chunks

    @property
    def warps(self) -> int:
        """Warps of a program: one run of each part for each thread."""
        return max(1, self.rows * self.lanes // (self.parts * RUN * _WARP))


@dataclass(frozen=True)
class Element:
    """A table as a kernel wants it: 2^bits - 1 limits, those beyond the last value infinite, and which way ties go.

    `rule`: how a weight compares with a limit (`gpu_nearest`). `is_even`: limits lie at equal distances and ties
    alternate. `middle`: index of a float's zero, 0 for others; `first`: stored code of index 0.
    """

    bits: int
    count: int
    limits: tuple[float, ...]
    upper_on_tie: tuple[bool, ...]
    rule: str
    is_even: bool
    zero: int
    middle: int
    first: int

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, fmt: TensorFormat, table: ElementTable) -> Element:
        """The element of a format whose codes are a power of two of at most 256."""
        bits, count = fmt.codes.bit_length() - 1, len(table.values)
        missing = (1 << bits) - count
        codes = stored_codes(fmt, count)
        return cls(
            bits=bits,
            count=count,
            limits=table.limits + (math.inf,) * missing,
            upper_on_tie=_ties(fmt, table) + (False,) * missing,
            rule=_rule(fmt, table),
            is_even=fmt.family == "int",
            zero=table.zero,
            middle=count // 2 if fmt.family == "float" else 0,
            first=codes[0] if codes and fmt.family == "int" else 0,
        )


@dataclass(frozen=True)
class ScaleRounding:
    """How a statistic becomes a stored scale: divided by `end`, then rounded (`gpu_numbers.stored_scale`)."""

    kind: str
    end: float
    largest: int
    rise: int
    offset: int

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, fmt: TensorFormat, table: ElementTable) -> ScaleRounding:
        """The rounding of a format's scales; the constants are asked of the reference."""
        if fmt.scale_format.startswith("e8m0"):
            return cls("e8m0", 1.0, 0, *_exponent_rule(fmt, table))
        most = stored_scales(fmt, table, torch.tensor([math.inf])).abs()
        pattern = int(most.view(torch.int32 if most.dtype is torch.float32 else torch.int16))
        return cls(fmt.scale_format, end_of(fmt, table), pattern, 0, 0)


def refusal(fmt: TensorFormat, grid: BlockGrid) -> str | None:
    """Why kernels do not take codes of this format and grid; None where they do."""
    if fmt.is_block_type:
        return "block types have a layout of their own"
    if fmt.codes & (fmt.codes - 1) or not 1 <= fmt.codes.bit_length() - 1 <= _MOST_BITS:
        return f"{fmt.codes} codes are not a power of two of at most 256"
    if max(grid.columns, grid.blocks) > _LARGEST_INDEX:
        return "rows or blocks are more than 32 bits can count"
    return None if grid.elements else "there is nothing to do for no elements"


def encoding_refusal(fmt: TensorFormat, grid: BlockGrid) -> str | None:
    """Why kernels do not encode: as `refusal`, and where blocks do not begin with a byte of codes."""
    group = group_of(fmt.codes)
    if reason := refusal(fmt, grid):
        return reason
    if grid.blocks_per_row > 1 and grid.width % group:
        return f"blocks of {grid.width} do not begin with whole bytes of codes"
    if grid.elements > grid.columns and grid.columns % group:
        return f"rows of {grid.columns} do not begin with whole bytes of codes"
    return None


def statistic_refusal(fmt: TensorFormat, grid: BlockGrid) -> str | None:
    """Why kernels do not choose the scales; None where they do."""
    if fmt.is_searched:
        return "scales are searched"
    if grid.one_scale:
        return "one scale for a whole tensor"
    if fmt.scale_format in ("e4m3", "dq8"):
        return f"{fmt.scale_format} scales need the whole tensor's"
    return None


def _exponent_rule(fmt: TensorFormat, table: ElementTable) -> tuple[int, int]:
    """(rise, offset) of an e8m0 rule: the exponent at 1, and where in [1, 2) it rises."""

    def exponent(mantissa: int) -> int:
        number = torch.tensor([1 + mantissa / (1 << _MANTISSA)], dtype=torch.float32)
        return int(stored_scales(fmt, table, number)[0])

    lowest = exponent(0)
    below, rise = 0, 1 << _MANTISSA
    while rise - below > 1:
        middle = (below + rise) // 2
        below, rise = (middle, rise) if exponent(middle) == lowest else (below, middle)
    return rise, lowest - _BIAS


def _rule(fmt: TensorFormat, table: ElementTable) -> str:
    if fmt.is_codebook:
        return "codebook"
    if uses_quotients(fmt):
        return "quotients"
    bits, least = _SIGNIFICANDS[fmt.scale_format.partition("-")[0]]
    ratios = [limit.as_integer_ratio() for limit in table.limits]
    longest = max(_odd_part(abs(over)).bit_length() for over, _ in ratios)
    fits = longest + bits <= _FP32_BITS and least - max(under.bit_length() - 1 for _, under in ratios) >= _FP32_LEAST
    return "product" if fits else "exact"


def _odd_part(number: int) -> int:
    return number // (number & -number) if number else 0


def _ties(fmt: TensorFormat, table: ElementTable) -> tuple[bool, ...]:
    """Which value a limit itself takes, asked of the reference for integers, which round there without a table."""
    if fmt.family != "int":
        return table.upper_on_tie
    limits = torch.tensor([table.limits], dtype=torch.float32)
    found = nearest_indices(limits, torch.ones(1), fmt, table)[0].tolist()
    return tuple(index > at for at, index in enumerate(found))


def _power_above(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
