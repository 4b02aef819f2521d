"""The GPU kernel that decodes rANS streams (`core.tensors.entropy.layout`): numbers, or values times scales.

A program is a warp that decodes one stream, a lane of it for each state. What a slot of a model needs stands in one
record of 8 bytes, so a step of 32 numbers reads twice: records by slot, and words by how many lanes before want one.

With INLINE the ranks of words come from a vote and two counts of bits, in PTX; without it from a cumulative sum, which
Triton's interpreter and other devices can run. Both are held equal: the tests run the second in the interpreter
against the decoder for CPUs, evaluate the text of the first instruction by instruction for lanes of all kinds against
a sum, and on a GPU compare both bit for bit. The one difference allowed is which NaN a bf16 is.

No bytes can lead a read or a write out of bounds: slots are taken modulo the length of their model's table, words at
most the one after the stream's last, and places follow from counts that the host has made.
"""
# Triton is a language of its own: constants of a kernel are spelled in capitals, and its values have no types for mypy.
# ruff: noqa: N803, PLR0124, PLR0917, SIM108
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from core.tensors.kernels.gpu_numbers import bf16_pattern, number, pattern

TOGETHER = tl.constexpr(8)  # steps between two looks at what comes next
END = tl.constexpr(65536)  # of every state
_AHEAD = tl.constexpr(256)  # words that TOGETHER steps of 32 lanes can use
_APART = tl.constexpr(8)  # words between the addresses that lanes ask for in advance: together all of _AHEAD

# $0: place of the lane's word, at most $5; $1: words used. $2: state, $3: the lanes before, $4: words used before.
VOTE = tl.constexpr("""{ .reg .pred p; .reg .b32 m, t;
setp.lt.u32 p, $2, 65536;
vote.sync.ballot.b32 m, p, 0xffffffff;
popc.b32 t, m;
add.u32 $1, t, $4;
and.b32 m, m, $3;
popc.b32 m, m;
add.u32 m, m, $4;
min.u32 $0, m, $5; }""")
# $0: the next state; $1: the state, $2: its word.
JOIN = tl.constexpr("""{ .reg .pred p; .reg .b32 t;
setp.lt.u32 p, $1, 65536;
prmt.b32 t, $2, $1, 0x5410;
selp.b32 $0, t, $1, p; }""")
_PREFETCH = tl.constexpr("prefetch.global.L1 [$1]; mov.b32 $0, 0;")


@triton.jit
def streams_kernel(
    states,
    words,
    streams,
    runs,
    records,
    out,
    ended,
    factors,
    order,
    columns,
    length,
    span,
    per_row,
    LANES: tl.constexpr,
    OUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    AXIS: tl.constexpr,
    WALKS: tl.constexpr,
    INLINE: tl.constexpr,
):
    """Streams -> `out`, and in `ended` 0 where a stream ended as it should, 1 where words were missing, 2 otherwise.

    `streams` (programs, 5), int64: where states and words begin, in theirs; words; first run and the one after the
    last. `runs` (runs, 4), int64: first number's place, numbers, where the model's records begin, its precision.
    `records`, int64 by slot: frequency + (rank << 16) + (the number or pattern of its fp32 value << 32), or for OUT
    "narrow" frequency + (the number's 16 bits << 32) + (rank << 48).

    BLOCKS: "none" for numbers; for values, "one" factor for all or which of `factors` (`_block`). AXIS: line l is row
    (0) or column (1) order[l], -1 without an order. WALKS: something asks for rows and columns, which then are counted;
    a line has at least LANES numbers.
    """
    lane = tl.arange(0, LANES)
    row = streams + 5 * tl.program_id(0)
    x = tl.load(states + tl.load(row) + lane).to(tl.uint32, bitcast=True)
    words += tl.load(row + 1)
    limit = tl.load(row + 2).to(tl.uint32)
    before = ((1 << lane) - 1).to(tl.uint32)
    used = tl.zeros((LANES,), tl.uint32)
    factor = tl.load(factors) if BLOCKS == "one" else 1.0
    grid = (factor, factors, order, columns, span, per_row)
    for run in range(tl.load(row + 3), tl.load(row + 4)):
        look = runs + 4 * run
        first, count = tl.load(look), tl.load(look + 1).to(tl.int32)
        table, precision = records + tl.load(look + 2), tl.load(look + 3).to(tl.uint32)
        line, place = _begin(first, lane, length, WALKS)
        whole = count // (TOGETHER * LANES) * (TOGETHER * LANES)
        for start in range(0, whole, TOGETHER * LANES):
            if INLINE:
                _prefetch(words, used + _AHEAD + (lane * _APART).to(tl.uint32), limit)
            for part in tl.static_range(TOGETHER):
                x, used, found = _step(x, used, words, limit, table, precision, before, OUT, INLINE)
                done = start + part * LANES
                _write(out, found, first, done, count, lane, line, place, grid, True, OUT, BLOCKS, AXIS, INLINE)
                line, place = _advance(line, place, length, LANES, WALKS)
        for done in range(whole, count, LANES):
            x, used, found = _step(x, used, words, limit, table, precision, before, OUT, INLINE)
            _write(out, found, first, done, count, lane, line, place, grid, False, OUT, BLOCKS, AXIS, INLINE)
            line, place = _advance(line, place, length, LANES, WALKS)
    wrong = tl.where(used > limit, 1, tl.where((x != END) | (used != limit), 2, 0))
    is_early = tl.max((wrong == 1).to(tl.int32), 0)
    tl.store(ended + tl.program_id(0), tl.where(is_early == 1, 1, tl.max(wrong, 0)))


@triton.jit
def _step(x, used, words, limit, table, precision, before, OUT: tl.constexpr, INLINE: tl.constexpr):
    """The states and the words used after a step, and what the slots stand for, uint32."""
    record = tl.load(table + (x & ((1 << precision) - 1)))
    low = record.to(tl.uint32)
    found = (record >> 32).to(tl.uint32)
    if OUT == "narrow":
        x = low * (x >> precision) + (found >> 16)
    else:
        x = (low & 0xFFFF) * (x >> precision) + (low >> 16)
    if INLINE:
        place, used = tl.inline_asm_elementwise(
            VOTE, "=r,=r,r,r,r,r", [x, before, used, limit], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
        )
        word = tl.load(words + place).to(tl.uint32)
        x = tl.inline_asm_elementwise(JOIN, "=r,r,r", [x, word], dtype=tl.uint32, is_pure=True, pack=1)
    else:
        needs = (x < END).to(tl.uint32)
        place = tl.minimum(used + tl.cumsum(needs, 0) - needs, limit)
        used += tl.sum(needs, 0)
        word = tl.load(words + place).to(tl.uint32)
        x = tl.where(x < END, (x << 16) | word, x)
    return x, used, found


@triton.jit
def _prefetch(words, place, limit):
    address = (words + tl.minimum(place, limit)).to(tl.uint64, bitcast=True)
    tl.inline_asm_elementwise(_PREFETCH, "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _begin(first, lane, length, WALKS: tl.constexpr):
    """Line of each lane's first number, and its place in the line, int32; 0 where nothing asks for them."""
    line, place = tl.zeros_like(lane), tl.zeros_like(lane)
    if WALKS:
        at = first + lane
        line = (at // length).to(tl.int32)
        place = (at - line.to(tl.int64) * length).to(tl.int32)
    return line, place


@triton.jit
def _advance(line, place, length, LANES: tl.constexpr, WALKS: tl.constexpr):
    """The same of the next number."""
    if WALKS:
        place += LANES
        is_next = place >= length
        place = tl.where(is_next, place - length, place)
        line += is_next.to(tl.int32)
    return line, place


@triton.jit
def _write(
    out,
    found,
    first,
    done,
    count,
    lane,
    line,
    place,
    grid,
    IS_WHOLE: tl.constexpr,
    OUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    AXIS: tl.constexpr,
    INLINE: tl.constexpr,
):
    """A step's numbers or values to where they belong."""
    factor, factors, order, columns, span, per_row = grid
    exists = (lane >= 0) if IS_WHOLE else (done + lane < count)
    if AXIS < 0:
        target = out + first + lane + done
        row, column = line, place
    else:
        named = tl.load(order + line, mask=exists, other=0)
        row, column = (named, place) if AXIS == 0 else (place, named)
        target = out + (row.to(tl.int64) * columns + column)
    if BLOCKS == "none":
        result = found.to(out.dtype.element_ty)
    else:
        if BLOCKS != "one":
            block = _block(first, done, lane, row, column, span, per_row, BLOCKS)
            factor = tl.load(factors + block, mask=exists, other=0.0)
        result = _rounded(number(found) * factor, OUT, INLINE)
    if IS_WHOLE:
        tl.store(target, result)
    else:
        tl.store(target, result, mask=exists)


@triton.jit
def _block(first, done, lane, row, column, span, per_row, BLOCKS: tl.constexpr):
    """flat: 2^span numbers that follow each other; row: a row; shift, divide: 2^span or span numbers of a row."""
    if BLOCKS == "flat":
        within = (first & ((1 << span) - 1)).to(tl.int32)
        block = (first >> span) + ((within + done + lane) >> span)
    elif BLOCKS == "row":
        block = row
    elif BLOCKS == "shift":
        block = row * per_row + (column >> span)
    else:
        block = row * per_row + column // span
    return block


@triton.jit
def _rounded(value, OUT: tl.constexpr, INLINE: tl.constexpr):
    """fp32 -> OUT, to nearest even; bf16 as its pattern in int16."""
    if OUT == "fp32":
        result = value
    elif OUT == "fp16":
        result = value.to(tl.float16)
    elif INLINE:
        result = value.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        rounded = bf16_pattern(value) | ((pattern(value) >> 16) & 0x8000)
        result = tl.where(value == value, rounded, 0x7FC0).to(tl.int16)
    return result
