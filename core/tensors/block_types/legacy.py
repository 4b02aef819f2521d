"""GGUF's types with one fp16 scale for 32 elements: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Bytes and decoded numbers are those of the stock encoder and decoder of ggml: fp32 arithmetic, the inverse from the
scale before it is rounded to fp16. Only where the stock encoder would write infinity, fp16's largest number takes its
place and the elements are quantised with that. Offsets within a block: d 0-1, then m 2-3 (Q4_1, Q5_1), the fifth bits
(Q5), the codes.
"""

from __future__ import annotations

import numpy as np

from core.tensors.block_types.fields import (
    HALF_MAX,
    Bytes,
    Floats,
    half_bytes,
    halves,
    high_bits,
    inverse,
    join_halves,
    joined,
    low_bits,
    split_halves,
)

_FIFTH_BITS = 4


def decode_symmetric(data: Bytes, bits: int) -> Floats:
    """Q4_0, Q5_0: d (q - 2^(bits-1))."""
    codes = _codes(data[:, 2:], bits).astype(np.int8) - np.int8(1 << (bits - 1))
    return halves(data[:, :2]) * codes.astype(np.float32)


def decode_affine(data: Bytes, bits: int) -> Floats:
    """Q4_1, Q5_1: d q + m."""
    return halves(data[:, :2]) * _codes(data[:, 4:], bits).astype(np.float32) + halves(data[:, 2:4])


def decode_q8_0(data: Bytes) -> Floats:
    """Eight bits: d q."""
    return halves(data[:, :2]) * data[:, 2:].view(np.int8).astype(np.float32)


def encode_symmetric(values: Floats, bits: int) -> Bytes:
    """Q4_0, Q5_0: the element of largest magnitude, the first of equals, becomes -2^(bits-1)."""
    half = 1 << (bits - 1)
    first = np.abs(values).argmax(axis=1)[:, None]
    d = np.take_along_axis(values, first, axis=1) / np.float32(-half)
    return np.concatenate((half_bytes(d), *_quantised(values * inverse(_saturated(d)), half + 0.5, bits)), axis=1)


def encode_affine(values: Floats, bits: int) -> Bytes:
    """Q4_1, Q5_1: the smallest element becomes 0 and the largest 2^bits - 1."""
    m = _saturated(values.min(axis=1, keepdims=True))
    d = np.maximum(values.max(axis=1, keepdims=True) - m, 0) / np.float32((1 << bits) - 1)
    codes = _quantised((values - m) * inverse(_saturated(d)), 0.5, bits)
    return np.concatenate((half_bytes(d), half_bytes(m), *codes), axis=1)


def encode_q8_0(values: Floats) -> Bytes:
    """Eight bits: the largest magnitude becomes 127; ties away from zero."""
    d = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    steps = np.abs(values * inverse(_saturated(d)))
    whole = np.floor(steps)
    magnitudes = np.minimum(whole + (steps - whole >= 0.5), 127)
    codes = np.copysign(magnitudes, values).astype(np.int8)
    return np.concatenate((half_bytes(d), codes.view(np.uint8)), axis=1)


def _saturated(scale: Floats) -> Floats:
    """The scale itself, or fp16's largest number where fp16 would round it to infinity."""
    return np.where(np.abs(scale) < HALF_MAX + 16, scale, np.copysign(HALF_MAX, scale))


def _quantised(steps: Floats, offset: float, bits: int) -> tuple[Bytes, ...]:
    """Codes trunc(steps + offset), clipped, as the pieces of bytes that hold them."""
    shifted = np.clip(steps + np.float32(offset), 0, (1 << bits) - 1)
    codes = shifted.astype(np.uint8)
    if bits == 4:
        return (join_halves(codes),)
    return np.packbits(high_bits(codes, 4), axis=1, bitorder="little"), join_halves(low_bits(codes, 4))


def _codes(data: Bytes, bits: int) -> Bytes:
    """(blocks, 32) codes from fifth bits, if any, and nibbles."""
    if bits == 4:
        return split_halves(data)
    fifth = np.unpackbits(data[:, :_FIFTH_BITS], axis=1, bitorder="little")
    return joined(split_halves(data[:, _FIFTH_BITS:]), fifth, 4)
