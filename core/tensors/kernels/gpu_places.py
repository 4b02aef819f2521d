"""Where blocks lie in memory, for GPU kernels: a program works on a tile of blocks, or on a chunk of one long block.

Inlined into the kernels; what the numbers mean: `gpu_plan.Geometry`.
"""
# Triton is a language of its own: constants of a kernel are spelled in capitals, and its values have no types for mypy.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(program, blocks, chunks, ROWS: tl.constexpr):
    """The blocks of a program, (ROWS,), whether they exist, and which chunk of them it works on."""
    block = (program // chunks) * ROWS + tl.arange(0, ROWS)
    return block, block < blocks, program % chunks


@triton.jit
def extent_of(block, chunk, columns, width, per_row, LANES: tl.constexpr, ALIGNED: tl.constexpr, IS_FULL: tl.constexpr):
    """First flat element of a chunk of each block, int64, and how many elements of the block are left from there."""
    skipped = chunk * LANES
    if IS_FULL:
        start = block.to(tl.int64) * width + skipped
        count = tl.zeros_like(block) + (width - skipped)
    else:
        row = block // per_row
        within = (block - row * per_row) * width
        start = row.to(tl.int64) * columns + within + skipped
        count = tl.minimum(width, columns - within) - skipped
    if ALIGNED > 1:
        start = tl.multiple_of(start, ALIGNED)
        count = tl.multiple_of(count, ALIGNED)
    return start, count


@triton.jit
def inside_of(exists, count, LANES: tl.constexpr, IS_FULL: tl.constexpr):
    """(ROWS, LANES): which lanes are elements; `IS_FULL` where all of an existing block's are."""
    lane = tl.arange(0, LANES)[None, :]
    if IS_FULL:
        return exists[:, None] & (lane < LANES)
    return exists[:, None] & (lane < count[:, None])
