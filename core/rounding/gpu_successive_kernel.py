"""The GPU kernels of successive rounding: the columns of a block one after another, for a tile of rows in one program.

Rows do not depend on each other, so every lane has rows of its own, and nothing is shared but the factor. Arrays are
transposed, (places, rows), as in `successive_jit` and `diffusion_jit`, whose loops are the reference: the same
operations in the same precision, and within a block in the same order. TOGETHER columns at a time stand in registers.
They first take up what the columns before them in the block left over, which is read once for all of them, and are
then rounded one by one, each passing its error on to the others. What a block owes to places outside it is one product
of matrices, made by the caller.
"""
# Triton is a language of its own: constants of a kernel are spelled in capitals, and its values have no types for mypy.
# ruff: noqa: N803, PLR0917, RUF005, SIM108
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

_UNROLLED = tl.constexpr(4)  # a divisor of TOGETHER
_WHOLE = tl.constexpr(6755399441055744.0)  # 1.5 x 2^52: adding it leaves no room for fractions, ties go to even
_WHOLE_SINGLE = tl.constexpr(12582912.0)  # 1.5 x 2^23, likewise in fp32


@triton.jit(do_not_specialize=["places", "low", "high"])
def numbers_kernel(
    targets,
    factor,
    units,
    steps,
    scales,
    blocks,
    gains,
    numbers,
    taken,
    rows,
    places,
    low,
    high,
    SHRINKS: tl.constexpr,
    TOGETHER: tl.constexpr,
    IS_FULL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """z = rint(y / step L_ii) of the places `high` - 1 down to `low`: `round_numbers` of `successive_jit`.

    `units` (places,): step L_ii. `taken` (high - low, rows): less what the places are decoded as, -gamma alpha z. With
    SHRINKS `gains` are found, and one program has to hold all rows.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    for done in range(0, high - low, TOGETHER):
        tl.debug_barrier()
        first = high - 1 - done
        offsets = _offsets(first - low, -1, TOGETHER, IS_FULL)
        left = _columns(targets, factor, taken, offsets, row, inside, rows, places, low, high - 1, first, done, -1)
        cells = _scales(scales, blocks, offsets, first, row, inside, rows)
        for i in tl.static_range(TOGETHER):
            exists, at = first - i >= low, (first + offsets[i]).to(tl.int64)
            unit = tl.where(exists, tl.load(units + at), 0.0)
            number = _rounded(left[i], unit * cells[i])
            if SHRINKS:
                gain = _least_squares(number * cells[i], left[i], unit)
                tl.store(gains + at, gain, mask=exists)
            else:
                gain = tl.load(gains + at)
            value = (gain * tl.load(steps + at)).to(number.dtype)
            owed = -(value * cells[i] * number)
            left = _passed_on(left, owed, factor + at * places + first, offsets, i + 1)
            tl.store(numbers + at * rows + row, number.to(tl.int32), mask=inside & exists)
            tl.store(taken + (at - low) * rows + row, owed, mask=inside & exists)


@triton.jit(do_not_specialize=["places", "low", "high", "zero"])
def spread_kernel(
    wanted,
    weights,
    ratios,
    scales,
    blocks,
    values,
    limits,
    upper,
    indices,
    errors,
    rows,
    places,
    low,
    high,
    zero,
    HALVINGS: tl.constexpr,
    KIND: tl.constexpr,
    TOGETHER: tl.constexpr,
    IS_FULL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Levels nearest to the places `low` to `high` - 1: `spread_block` of `diffusion_jit`.

    `errors` (high - low, rows): weights less what they are decoded as. `values` (2^HALVINGS,), `limits` and `upper`
    (2^HALVINGS - 1,), KIND: "rounded", "exact" or "quotients", `zero`: the rule; limits that are not there: infinity.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    for done in range(0, high - low, TOGETHER):
        tl.debug_barrier()
        first = low + done
        offsets = _offsets(high - 1 - first, 1, TOGETHER, IS_FULL)
        left = _columns(wanted, ratios, errors, offsets, row, inside, rows, places, low, low, first, done, 1)
        cells = _scales(scales, blocks, offsets, first, row, inside, rows)
        for i in tl.static_range(TOGETHER):
            exists, at = first + i < high, (first + offsets[i]).to(tl.int64)
            level = _level(left[i], cells[i], limits, upper, zero, HALVINGS, KIND)
            decoded = (tl.load(values + level) * cells[i]).to(tl.float64)
            error = tl.load(weights + at * rows + row, mask=inside, other=0.0) - decoded
            left = _passed_on(left, error, ratios + at * places + first, offsets, i + 1)
            tl.store(indices + at * rows + row, level, mask=inside & exists)
            tl.store(errors + (at - low) * rows + row, error, mask=inside & exists)


@triton.jit
def _offsets(most, WAY: tl.constexpr, TOGETHER: tl.constexpr, IS_FULL: tl.constexpr):
    """How far TOGETHER places lie from the first one, WAY at a time; those beyond `most` are taken for that.

    IS_FULL: there are none, and places lie at distances that addresses hold without being added up.
    """
    found = ()
    for i in tl.static_range(TOGETHER):
        found = found + (WAY * i if IS_FULL else WAY * tl.minimum(i, most),)
    return found


@triton.jit
def _columns(values, matrix, errors, offsets, row, inside, rows, places, low, start, first, done, WAY: tl.constexpr):
    """The columns at `offsets` from place `first`, with the errors of the `done` places from `start` on, WAY each."""
    left = ()
    for i in tl.static_range(len(offsets)):
        at = (first + offsets[i]).to(tl.int64)
        left = left + (tl.load(values + at * rows + row, mask=inside, other=0.0),)
    for before in tl.range(0, done, loop_unroll_factor=_UNROLLED):
        place = (start + WAY * before).to(tl.int64)
        error = tl.load(errors + (place - low) * rows + row, mask=inside, other=0.0)
        left = _passed_on(left, error, matrix + place * places + first, offsets, 0)
    return left


@triton.jit
def _passed_on(left, error, line, offsets, FIRST: tl.constexpr):
    """Columns from FIRST on with the error of another, times its row of the matrix at their `offsets` from `line`."""
    owing = ()
    for i in tl.static_range(len(offsets)):
        if i >= FIRST:
            owing = owing + (left[i] + tl.load(line + offsets[i]) * error,)
        else:
            owing = owing + (left[i],)
    return owing


@triton.jit
def _scales(scales, blocks, offsets, first, row, inside, rows):
    """Those (blocks, rows) of the columns at `offsets` from place `first`."""
    found = ()
    for i in tl.static_range(len(offsets)):
        block = tl.load(blocks + first + offsets[i])
        found = found + (tl.load(scales + block * rows + row, mask=inside, other=0.0),)
    return found


@triton.jit
def _rounded(target, cell):
    """target / cell to the nearest whole number, half to even; 0 where a cell is not above 0."""
    numerator, denominator = tl.where(cell > 0.0, target, 0.0), tl.where(cell > 0.0, cell, 1.0)
    if target.dtype == tl.float32:
        quotient, shift = tl.div_rn(numerator, denominator), _WHOLE_SINGLE
    else:
        quotient, shift = numerator / denominator, _WHOLE
    return tl.where(tl.abs(quotient) < shift / 3, (quotient + shift) - shift, quotient)


@triton.jit
def _least_squares(scaled, target, unit):
    """<z, y> / unit <z, z> over all rows, summed in fp64; 0 where all numbers are."""
    along, square = tl.sum((scaled * target).to(tl.float64), 0), tl.sum((scaled * scaled).to(tl.float64), 0)
    return tl.where(square > 0.0, along / tl.where(square > 0.0, unit.to(tl.float64) * square, 1.0), 0.0)


@triton.jit
def _level(target, scale, limits, upper, zero, HALVINGS: tl.constexpr, KIND: tl.constexpr):
    """Indices of the levels nearest to fp64 targets under fp32 scales: `place_of` of `diffusion_jit`."""
    turned = tl.where(scale > 0.0, target, -target)
    size = tl.abs(scale)
    magnitude = size.to(tl.float64)
    if KIND == "quotients":
        turned = tl.div_rn(turned.to(tl.float32), tl.where(size > 0.0, size, 1.0)).to(tl.float64)
        magnitude = tl.full(turned.shape, 1.0, tl.float64)
    index = tl.zeros(turned.shape, tl.int32)
    for halving in range(HALVINGS):
        half = 1 << (HALVINGS - 1 - halving)
        middle = index + (half - 1)
        limit = tl.load(limits + middle) * magnitude
        if KIND == "rounded":
            limit = limit.to(tl.float32).to(tl.float64)
        is_above = (turned > limit) | ((turned == limit) & (tl.load(upper + middle) != 0))
        index += tl.where(is_above, half, 0)
    return tl.where(scale == 0.0, zero, index)
