"""The GPU kernel that decodes: packed codes, stored scales and a table of values by code -> fp32 or bf16.

Each value is fl32(table[code] * scale), and for bf16 rounded once more to nearest even: what `EncodedTensor` decodes.
"""
# Triton is a language of its own: constants of a kernel are spelled in capitals, and its values have no types for mypy.
# ruff: noqa: N803, N806, PLR0124, PLR0917
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from core.tensors.kernels.gpu_numbers import bf16_pattern, decoded_scale, pattern
from core.tensors.kernels.gpu_places import extent_of, inside_of, tile_of


@triton.jit
def decode_kernel(
    codes,
    scales,
    table,
    out,
    nbytes,
    blocks,
    columns,
    width,
    per_row,
    chunks,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
    IS_FULL: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    SCALES: tl.constexpr,
    BITS: tl.constexpr,
    OUT: tl.constexpr,
):
    """`IS_GROUPED`: every block begins with a byte, and BITS divides 8; otherwise codes may straddle two bytes."""
    block, exists, chunk = tile_of(tl.program_id(0), blocks, chunks, ROWS)
    start, count = extent_of(block, chunk, columns, width, per_row, LANES, ALIGNED, IS_FULL)
    inside = inside_of(exists, count, LANES, IS_FULL)
    place = start[:, None] + tl.arange(0, LANES)[None, :]
    if IS_GROUPED:
        code = _grouped(codes, start, count, exists, ROWS, LANES, BITS)
    else:
        code = _straddling(codes, place, inside, nbytes, BITS)
    stored = tl.load(scales + block, mask=exists, other=0).to(tl.int32)
    value = tl.load(table + code) * decoded_scale(stored, SCALES)[:, None]
    if OUT == "bf16":
        value = _bf16(value)
    tl.store(out + place, value, mask=inside)


@triton.jit
def _grouped(codes, start, count, exists, ROWS: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr):
    GROUP: tl.constexpr = 8 // BITS
    at = tl.arange(0, LANES // GROUP)[None, :]
    mask = exists[:, None] & (at * GROUP < count[:, None])
    data = tl.load(codes + (start // GROUP)[:, None] + at, mask=mask, other=0).to(tl.int32)
    shift = (tl.arange(0, GROUP) * BITS)[None, None, :]
    return tl.reshape((data[:, :, None] >> shift) & (2**BITS - 1), (ROWS, LANES))


@triton.jit
def _straddling(codes, place, inside, nbytes, BITS: tl.constexpr):
    bit = place * BITS
    byte = bit >> 3
    low = tl.load(codes + byte, mask=inside, other=0).to(tl.int32)
    high = tl.load(codes + byte + 1, mask=inside & (byte + 1 < nbytes), other=0).to(tl.int32)
    return ((low | (high << 8)) >> (bit & 7).to(tl.int32)) & (2**BITS - 1)


@triton.jit
def _bf16(value):
    """The pattern in int16; NaN stays one."""
    rounded = bf16_pattern(value) | ((pattern(value) >> 16) & 0x8000)
    return tl.where(value == value, rounded, 0x7FC0).to(tl.int16)
