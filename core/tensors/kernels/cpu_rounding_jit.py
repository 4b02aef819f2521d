"""The compiled loops that round by dividing: to evenly spaced values, floats, large tables. Style: see `cpu_jit`.

They work on finite fp32 numbers; `cpu_rule` says which loop is for what.
"""

from __future__ import annotations

import numpy as np

from core.tensors.kernels.cpu_jit import Codes, Doubles, Floats, Ints, Starts, compiled

_RUN = 64  # quotients that are made before they are rounded
_U = np.uint64


@compiled
def grid_codes(numbers: Floats, starts: Starts, scales: Floats, rule: Doubles, zero: int, codes: Codes) -> None:
    """Values a step apart: x / scale * rule[0] to the nearest, + rule[2], between rule[3] and rule[4].

    The quotient in fp64 of fp32 numbers lies on a limit only if the real one does. `rule[1]`: 0 where limits are
    halves, and even values take them; else limits are whole numbers, and even ones belong below (1) or above (-1).
    """
    factor, parity, after, least, most = rule[0], rule[1], rule[2], rule[3], rule[4]
    for block in range(scales.size):
        scale = np.float64(scales[block])
        if scale == 0:
            for i in range(starts[block], starts[block + 1]):
                codes[i] = zero
        elif parity == 0:
            for i in range(starts[block], starts[block + 1]):
                level = np.rint(np.float64(numbers[i]) / scale * factor) + after
                codes[i] = np.uint8(np.int32(min(max(level, least), most)))
        else:
            for i in range(starts[block], starts[block + 1]):
                quotient = np.float64(numbers[i]) / scale * factor
                level = np.floor(quotient)
                is_even = np.floor(level * 0.5) * 2.0 == level
                level = level + after - np.float64((level == quotient) & (is_even == (parity > 0)))
                codes[i] = np.uint8(np.int32(min(max(level, least), most)))


@compiled
def float_codes(
    numbers: Floats,
    starts: Starts,
    scales: Floats,
    single: bool,
    mantissa_bits: int,
    least: int,
    last: int,
    negative: int,
    codes: Codes,
) -> None:
    """Patterns of floats whose smallest normal number is 2^least; `last`: the largest magnitude, `negative`: the sign.

    Half to even in the patterns: those of fp64 above the smallest normal number, whole steps below it. `single`: what
    is rounded is the quotient in fp32; in fp64, it lies half-way only if the real one does.
    """
    quotients = np.empty(_RUN)
    patterns = quotients.view(np.int64)
    shift = np.int64(52 - mantissa_bits)
    base, half = np.int64(1022 + least) << 52, (np.int64(1) << (shift - 1)) - 1
    smallest, steps = 2.0**least, 2.0 ** (mantissa_bits - least)
    for block in range(scales.size):
        scale, high = np.float64(scales[block]), starts[block + 1]
        for start in range(starts[block], high, _U(_RUN)):
            count = min(high - start, _U(_RUN))
            if scale == 0:
                for i in range(count):
                    codes[start + i] = 0
                continue
            if single:
                for i in range(count):
                    quotients[i] = np.float64(abs(numbers[start + i] / scales[block]))
            else:
                for i in range(count):
                    quotients[i] = abs(np.float64(numbers[start + i]) / scale)
            for i in range(count):
                small = np.int64(np.rint(min(quotients[i], smallest) * steps))
                offset = patterns[i] - base
                large = (offset + half + ((offset >> shift) & 1)) >> shift
                pattern = min(small if quotients[i] < smallest else large, np.int64(last))
                is_below = (numbers[start + i] < 0) != (scale < 0)
                codes[start + i] = np.uint8(pattern + negative if is_below & (pattern > 0) else pattern)


@compiled
def guided_codes(
    numbers: Floats,
    starts: Starts,
    scales: Floats,
    limits: Doubles,
    guide: Ints,
    rule: Doubles,
    zero: int,
    codes: Codes,
) -> None:
    """A table says where the limits near a quotient begin, comparisons with the limits themselves find the code.

    `limits` ends with infinity. `rule`: where cell 0 starts, cells per unit, the largest number of limits near a cell.
    Where fl32(limit * scale) may be subnormal, and far from the real product, all limits are compared.
    """
    origin, most = rule[0], np.float64(guide.size - 1)
    for block in range(scales.size):
        if scales[block] == 0:
            for i in range(starts[block], starts[block + 1]):
                codes[i] = zero
            continue
        sign = np.float32(-1.0 if scales[block] < 0 else 1.0)
        scale = np.float64(abs(scales[block]))
        inverse, is_tiny = 1.0 / scale, scale < 1e-30
        cells, steps = (0.0, limits.size - 1) if is_tiny else (rule[1], np.int64(rule[2]))
        for i in range(starts[block], starts[block + 1]):
            number = sign * numbers[i]
            code = guide[_U(min(max((np.float64(number) * inverse - origin) * cells, 0.0), most))]
            for _ in range(steps):
                code += np.int32(number > np.float32(limits[_U(code)] * scale))
            codes[i] = np.uint8(code)
