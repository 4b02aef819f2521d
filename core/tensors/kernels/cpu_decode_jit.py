"""The compiled loops of decoding blocks. See `cpu_jit` for the style."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from core.tensors.kernels.cpu_jit import CHUNK, Codes, Floats, Starts, Whole, compiled, inlined

Halves = NDArray[np.int16]

FEW = 16  # values that are chosen among without a table in memory
_RUN = 64  # numbers that are made before they are rounded, blocks whose values are made together
_U = np.uint64


@compiled
def decode_steps(
    codes: Codes, starts: Starts, first: float, step: float, last: int, scales: Floats, out: Floats
) -> None:
    """fl32((first + step * code) * scale); larger codes than `last` are taken for it."""
    lowest, gap, most = np.float32(first), np.float32(step), np.uint8(last)
    for block in range(scales.size):
        for i in range(starts[block], starts[block + 1]):
            out[i] = (lowest + gap * np.float32(min(codes[i], most))) * scales[block]


@compiled
def decode_values(codes: Codes, starts: Starts, table: Floats, scales: Floats, out: Floats) -> None:
    """fl32(table[code] * scale); `table` has 256 values."""
    for block in range(scales.size):
        for i in range(starts[block], starts[block + 1]):
            out[i] = table[codes[i]] * scales[block]


@compiled
def decode_bf16(codes: Codes, starts: Starts, table: Floats, scales: Floats, out: Halves) -> None:
    """`decode_values` rounded to bf16, nearest, ties to even; NaN stays NaN."""
    patterns = np.zeros(_RUN, np.int32)
    numbers = patterns.view(np.float32)
    for block in range(scales.size):
        high = starts[block + 1]
        for start in range(starts[block], high, _U(_RUN)):
            count = min(high - start, _U(_RUN))
            for i in range(count):
                numbers[i] = table[codes[start + i]] * scales[block]
            for i in range(count):
                out[start + i] = _bf16(patterns[i])


@compiled
def decode_few_bf16(codes: Codes, starts: Starts, table: Floats, scales: Floats, out: Halves) -> None:
    """`decode_bf16` of up to 16 values: scaled and rounded once for each block, chosen by a code's bits."""
    values = np.empty(FEW * _RUN, np.int16)
    for first in range(_U(0), _U(scales.size), _U(_RUN)):
        count = min(_U(_RUN), _U(scales.size) - first)
        for k in range(_U(FEW)):
            for b in range(count):
                values[k * _U(_RUN) + b] = _bf16(np.float32(table[k] * scales[first + b]).view(np.int32))
        for b in range(count):
            low, high = starts[first + b], starts[first + b + _U(1)]
            whole = low + (high - low) // _U(CHUNK) * _U(CHUNK)
            _choose(codes, low, whole, values, b, out)
            for i in range(whole, high):
                out[i] = values[_U(min(codes[i], np.uint8(FEW - 1))) * _U(_RUN) + b]


@inlined
def _bf16(pattern: np.int32) -> np.int16:
    """A pattern of fp32 rounded; NaN loses its sign."""
    magnitude = np.int32(pattern & np.int32(0x7FFFFFFF))
    odd = np.int32(np.int32(magnitude >> np.int32(16)) & np.int32(1))
    rounded = np.int32(np.int32(magnitude + np.int32(0x7FFF) + odd) >> np.int32(16))
    signed = np.int16(rounded | np.int32(np.int32(pattern >> np.int32(16)) & np.int32(-0x8000)))
    return np.int16(0x7FC0) if magnitude > np.int32(0x7F800000) else signed


@inlined
def _choose(codes: Codes, low: Whole, high: Whole, values: Halves, b: Whole, out: Halves) -> None:
    """Whole chunks: each bit of a code halves what is left of the values, the lowest bit first."""
    v0, v1, v2, v3 = values[b], values[b + _U(_RUN)], values[b + _U(2 * _RUN)], values[b + _U(3 * _RUN)]
    v4, v5, v6 = values[b + _U(4 * _RUN)], values[b + _U(5 * _RUN)], values[b + _U(6 * _RUN)]
    v7, v8, v9 = values[b + _U(7 * _RUN)], values[b + _U(8 * _RUN)], values[b + _U(9 * _RUN)]
    v10, v11, v12 = values[b + _U(10 * _RUN)], values[b + _U(11 * _RUN)], values[b + _U(12 * _RUN)]
    v13, v14, v15 = values[b + _U(13 * _RUN)], values[b + _U(14 * _RUN)], values[b + _U(15 * _RUN)]
    for start in range(low, high, _U(CHUNK)):
        for i in range(_U(CHUNK)):
            code = np.int16(min(codes[start + i], np.uint8(FEW - 1)))
            one, two = np.int16(code & np.int16(1)) != 0, np.int16(code & np.int16(2)) != 0
            four, eight = np.int16(code & np.int16(4)) != 0, np.int16(code & np.int16(8)) != 0
            p0, p1, p2, p3 = v1 if one else v0, v3 if one else v2, v5 if one else v4, v7 if one else v6
            p4, p5, p6, p7 = v9 if one else v8, v11 if one else v10, v13 if one else v12, v15 if one else v14
            q0, q1, q2, q3 = p1 if two else p0, p3 if two else p2, p5 if two else p4, p7 if two else p6
            r0, r1 = q1 if four else q0, q3 if four else q2
            out[start + i] = r1 if eight else r0
