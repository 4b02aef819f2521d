"""GPU kernels that encode: a block's statistic and stored scale, the nearest value of every weight, packed codes.

Bit for bit what `core.tensors.nearest` makes, in one pass over the weights; only a sum of squares is added up in
another order (fp64, so that a scale differs where the sum lies within 2^-50 of a rounding boundary of the scale).
A thread works on PARTS runs of RUN weights that follow each other in one block, so that what it computes once per block
serves all of them and their codes leave in one store: a tile of (ROWS, LANE * PARTS) weights is PARTS of (ROWS, LANE),
part p with the p-th run of each thread.
"""
# Triton is a language of its own: constants of a kernel are spelled in capitals, and its values have no types for mypy.
# ruff: noqa: N803, N806, PLR0917, RUF005
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from core.tensors.kernels.gpu_nearest import nearest, prepared
from core.tensors.kernels.gpu_numbers import INFINITY, MAGNITUDE, decoded_scale, load_weights, number, pattern
from core.tensors.kernels.gpu_numbers import stored_scale as rounded_scale
from core.tensors.kernels.gpu_places import extent_of, tile_of

RUN = tl.constexpr(8)  # 16 bytes of bf16


@triton.jit
def encode_kernel(
    weights,
    limits,
    upper,
    codes,
    scales,
    damaged,
    blocks,
    columns,
    width,
    per_row,
    end,
    largest,
    rise,
    offset,
    ROWS: tl.constexpr,
    LANE: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    IS_FULL: tl.constexpr,
    IN_WORDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    STATISTIC: tl.constexpr,
    SCALES: tl.constexpr,
    RULE: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    SIGNED: tl.constexpr,
    ZERO: tl.constexpr,
    MIDDLE: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Weights -> packed codes and stored scales, `damaged` set where a weight is not finite; blocks of one tile."""
    block, exists, chunk = tile_of(tl.program_id(0), blocks, 1, ROWS)
    start, count = extent_of(block, chunk, columns, width, per_row, LANE * PARTS, ALIGNED, IS_FULL)
    parts = _parts(weights, start, count, exists, LANE, PARTS, IS_FULL, WEIGHTS)
    top, extreme, squares = _statistic(parts, LANE, PARTS, STATISTIC)
    scale = _store_scales(extreme, squares, count, end, largest, rise, offset, scales, block, exists, STATISTIC, SCALES)
    tl.atomic_or(damaged + block * 0, 1, mask=exists & (top >= INFINITY))
    s, kept = prepared(scale, limits, upper, RULE, BITS, ZERO)
    words = ()
    for part in tl.static_range(PARTS):
        index = nearest(parts[part], scale, s, kept, limits, upper, RULE, IS_EVEN, BITS, COUNT, SIGNED, ZERO)
        code = _stored_code(index, MIDDLE, FIRST, BITS)
        if IN_WORDS:
            words = words + (_words(code, BITS),)
        else:
            _store_bytes(code, codes, start, count, exists, part, PARTS, BITS)
    if IN_WORDS:
        _store_words(words, codes, start, count, exists, PARTS, IS_FULL)


@triton.jit
def scales_kernel(
    weights,
    scales,
    factors,
    damaged,
    blocks,
    columns,
    width,
    per_row,
    chunks,
    end,
    largest,
    rise,
    offset,
    LANE: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    STATISTIC: tl.constexpr,
    SCALES: tl.constexpr,
):
    """The stored scales of long blocks and, in fp32, what they decode to; a program walks along one block."""
    block = tl.program_id(0) + tl.arange(0, 1)
    exists = block < blocks
    top = tl.zeros((1,), tl.int32)
    extreme = tl.zeros((1,), tl.int32)
    squares = tl.zeros((1,), tl.float64)
    for chunk in range(chunks):
        start, count = extent_of(block, chunk, columns, width, per_row, LANE * PARTS, ALIGNED, False)
        parts = _parts(weights, start, count, exists, LANE, PARTS, False, WEIGHTS)
        top_here, extreme_here, squares_here = _statistic(parts, LANE, PARTS, STATISTIC)
        takes_it = (top_here > top) | (chunk == 0)
        extreme = tl.where(takes_it, extreme_here, extreme)
        top = tl.where(takes_it, top_here, top)
        squares += squares_here
    _, count = extent_of(block, 0, columns, width, per_row, LANE * PARTS, ALIGNED, False)
    found = _store_scales(extreme, squares, count, end, largest, rise, offset, scales, block, exists, STATISTIC, SCALES)
    tl.store(factors + block, found, mask=exists)
    tl.atomic_or(damaged + block * 0, 1, mask=exists & (top >= INFINITY))


@triton.jit
def codes_kernel(
    weights,
    factors,
    limits,
    upper,
    codes,
    blocks,
    columns,
    width,
    per_row,
    chunks,
    ROWS: tl.constexpr,
    LANE: tl.constexpr,
    PARTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    IS_FULL: tl.constexpr,
    IN_WORDS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    RULE: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    SIGNED: tl.constexpr,
    ZERO: tl.constexpr,
    MIDDLE: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Weights and the fp32 scales of their blocks -> packed codes."""
    block, exists, chunk = tile_of(tl.program_id(0), blocks, chunks, ROWS)
    start, count = extent_of(block, chunk, columns, width, per_row, LANE * PARTS, ALIGNED, IS_FULL)
    parts = _parts(weights, start, count, exists, LANE, PARTS, IS_FULL, WEIGHTS)
    scale = tl.load(factors + block, mask=exists, other=0.0)
    s, kept = prepared(scale, limits, upper, RULE, BITS, ZERO)
    words = ()
    for part in tl.static_range(PARTS):
        index = nearest(parts[part], scale, s, kept, limits, upper, RULE, IS_EVEN, BITS, COUNT, SIGNED, ZERO)
        code = _stored_code(index, MIDDLE, FIRST, BITS)
        if IN_WORDS:
            words = words + (_words(code, BITS),)
        else:
            _store_bytes(code, codes, start, count, exists, part, PARTS, BITS)
    if IN_WORDS:
        _store_words(words, codes, start, count, exists, PARTS, IS_FULL)


@triton.jit
def _parts(
    weights,
    start,
    count,
    exists,
    LANE: tl.constexpr,
    PARTS: tl.constexpr,
    IS_FULL: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """The weights of a tile in fp32, PARTS of (ROWS, LANE), all loads before the first use."""
    parts = ()
    for part in tl.static_range(PARTS):
        lane = _lanes(LANE, part, PARTS)
        inside = exists[:, None] & (lane < LANE * PARTS)
        if not IS_FULL:
            inside = inside & (lane < count[:, None])
        parts = parts + (load_weights(weights, start[:, None] + lane, inside, WEIGHTS),)
    return parts


@triton.jit
def _lanes(LANE: tl.constexpr, part: tl.constexpr, PARTS: tl.constexpr):
    """(1, LANE): which elements of a tile's row a part holds."""
    lane = tl.arange(0, LANE)[None, :]
    return lane // RUN * (RUN * PARTS) + part * RUN + lane % RUN


@triton.jit
def _statistic(parts, LANE: tl.constexpr, PARTS: tl.constexpr, STATISTIC: tl.constexpr):
    """Of each row: the pattern of its largest magnitude, that with the sign of the first one of equals, the squares."""
    size = pattern(parts[0]) & MAGNITUDE
    place = _lanes(LANE, 0, PARTS) * 2 + (pattern(parts[0]) < 0).to(tl.int32)
    squares = parts[0].to(tl.float64) * parts[0].to(tl.float64)
    for part in tl.static_range(1, PARTS):
        here = pattern(parts[part]) & MAGNITUDE
        signed = _lanes(LANE, part, PARTS) * 2 + (pattern(parts[part]) < 0).to(tl.int32)
        place = tl.where(here > size, signed, place)
        size = tl.maximum(size, here)
        squares += parts[part].to(tl.float64) * parts[part].to(tl.float64)
    top = tl.max(size, axis=1)
    extreme = top
    total = tl.zeros(top.shape, tl.float64)
    if STATISTIC == "signmax":
        extreme = top | (tl.min(tl.where(size == top[:, None], place, MAGNITUDE), axis=1) << 31)
    if STATISTIC == "rms":
        total = tl.sum(squares, axis=1)
    return top, extreme, total


@triton.jit
def _store_scales(
    extreme,
    squares,
    count,
    end,
    largest,
    rise,
    offset,
    scales,
    block,
    exists,
    STATISTIC: tl.constexpr,
    SCALES: tl.constexpr,
):
    """Round and store the scales of blocks; fp32, as they decode."""
    found = number(extreme)
    if STATISTIC == "rms":
        found = tl.sqrt(squares / count.to(tl.float64)).to(tl.float32)
    wanted = found
    if SCALES != "e8m0":
        wanted = tl.div_rn(found, tl.zeros_like(found) + end)
    stored = rounded_scale(wanted, found != 0, largest, rise, offset, SCALES)
    tl.store(scales + block, stored.to(scales.dtype.element_ty), mask=exists)
    return decoded_scale(stored, SCALES)


@triton.jit
def _stored_code(index, MIDDLE: tl.constexpr, FIRST: tl.constexpr, BITS: tl.constexpr):
    """Indices -> stored codes: a float's patterns where `MIDDLE` is the index of its zero, otherwise from `FIRST`."""
    if MIDDLE > 0:
        return tl.where(index < MIDDLE, 2 ** (BITS - 1) + MIDDLE - index, index - MIDDLE)
    return index + FIRST


@triton.jit
def _words(code, BITS: tl.constexpr):
    """The codes of each run, lowest bits first, as one number of BITS bytes."""
    runs: tl.constexpr = code.shape[1] // RUN
    digits = tl.reshape(code, (code.shape[0], runs, RUN))
    shift = (tl.arange(0, RUN) * BITS)[None, None, :]
    if BITS > 4:
        digits = digits.to(tl.int64)
    return tl.sum(digits << shift, axis=2)


@triton.jit
def _store_words(words, codes, start, count, exists, PARTS: tl.constexpr, IS_FULL: tl.constexpr):
    """Runs of all parts side by side; blocks begin and end with whole runs."""
    if PARTS == 4:
        joined = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))
    elif PARTS == 2:
        joined = tl.join(words[0], words[1])
    else:
        joined = words[0]
    runs: tl.constexpr = words[0].shape[1] * PARTS
    at = tl.arange(0, runs)[None, :]
    used = exists[:, None] & (at < runs)
    if not IS_FULL:
        used = used & (at * RUN < count[:, None])
    word = tl.reshape(joined, (words[0].shape[0], runs)).to(codes.dtype.element_ty)
    tl.store(codes + (start // RUN)[:, None] + at, word, mask=used)


@triton.jit
def _store_bytes(code, codes, start, count, exists, part: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr):
    """A part's codes byte by byte: GROUP codes are BYTES bytes, and a block begins with a whole group."""
    GROUP: tl.constexpr = 8 // (BITS & -BITS)
    BYTES: tl.constexpr = BITS // (BITS & -BITS)
    groups: tl.constexpr = code.shape[1] // GROUP
    code = tl.where(exists[:, None] & (_lanes(code.shape[1], part, PARTS) < count[:, None]), code, 0)
    digits = tl.reshape(code, (code.shape[0], groups, GROUP))
    word = tl.sum(digits.to(tl.int64) << (tl.arange(0, GROUP) * BITS)[None, None, :], axis=2)
    group = tl.arange(0, groups)[None, :]
    per_run: tl.constexpr = RUN // GROUP
    first = (group // per_run * (per_run * PARTS) + part * per_run + group % per_run) * BYTES
    for byte in tl.static_range(BYTES):
        used = exists[:, None] & (first + byte < ((count * BITS + 7) // 8)[:, None])
        place = codes + (start // GROUP * BYTES)[:, None] + first + byte
        tl.store(place, (word >> (8 * byte)).to(tl.uint8), mask=used)
