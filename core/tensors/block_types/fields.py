"""Fields of blocks: half floats, nibbles and bit streams between columns of bytes and numbers.

Arrays have one row for each block. Every function accepts any bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

HALF_MAX = np.float32(65504)


def halves(data: Bytes) -> Floats:
    """Little-endian fp16 in (blocks, 2 n) bytes -> (blocks, n)."""
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def half_bytes(values: Floats) -> Bytes:
    """The inverse; magnitudes beyond fp16's range take its largest."""
    return np.ascontiguousarray(nearest_half(values).astype("<f2")).view(np.uint8)


def nearest_half(values: Floats) -> Floats:
    """Rounded to fp16, ties to even, saturating, as fp32."""
    return np.clip(values, -HALF_MAX, HALF_MAX).astype(np.float16).astype(np.float32)


def inverse(values: Floats) -> Floats:
    """1 / values in fp32; 0 where that is not finite, so what is divided by it comes out as 0."""
    with np.errstate(divide="ignore", over="ignore"):
        found: Floats = np.float32(1) / values
    found[~np.isfinite(found)] = 0
    return found


def low_bits(codes: Bytes, width: int) -> Bytes:
    """The lowest `width` bits of each byte."""
    return codes & np.uint8((1 << width) - 1)


def high_bits(codes: Bytes, width: int) -> Bytes:
    """What lies above the lowest `width` bits of each byte."""
    return codes >> np.uint8(width)


def joined(low: Bytes, high: Bytes, width: int) -> Bytes:
    """The inverse: `high` above `width` low bits; what does not fit a byte falls off."""
    return low | (high << np.uint8(width))


def split_halves(data: Bytes) -> Bytes:
    """Nibbles of (blocks, n): the low ones of all bytes, then the high ones -> (blocks, 2 n)."""
    return np.concatenate((low_bits(data, 4), high_bits(data, 4)), axis=1)


def join_halves(codes: Bytes) -> Bytes:
    """The inverse of `split_halves`."""
    middle = codes.shape[1] // 2
    return joined(codes[:, :middle], codes[:, middle:], 4)


def unpack_bits(data: Bytes, width: int, count: int) -> Bytes:
    """The first `count` fields of `width` <= 8 bits in each row of bytes, lowest bits first."""
    if width == 8:
        return data[:, :count]
    if width == 4:
        return np.stack((low_bits(data, 4), high_bits(data, 4)), axis=2).reshape(len(data), -1)[:, :count]
    bits = np.unpackbits(data, axis=1, bitorder="little")[:, : count * width].reshape(len(data), count, width)
    return np.packbits(bits, axis=2, bitorder="little")[:, :, 0]


def pack_bits(codes: Bytes, width: int) -> Bytes:
    """The inverse, for rows whose fields fill whole bytes."""
    if width == 8:
        return codes
    if width == 4:
        return joined(codes[:, 0::2], codes[:, 1::2], 4)
    bits = np.unpackbits(codes[:, :, None], axis=2, bitorder="little", count=width)
    return np.packbits(bits.reshape(len(codes), -1), axis=1, bitorder="little")


def float_codes(magnitudes: Floats, exponent_bits: int, mantissa_bits: int, top: int) -> Bytes:
    """Patterns (without sign) of non-negative numbers rounded to a small float, ties to even, saturating at `top`.

    The bias is 2^(exponent_bits - 1) - 1. Below the smallest normal number the pattern counts steps; above, it is the
    fp32 pattern rounded to fewer mantissa bits, where a carry runs on into the exponent as it should.
    """
    bias = (1 << (exponent_bits - 1)) - 1
    shift = 23 - mantissa_bits
    bits = magnitudes.view(np.int32)
    rounded = (bits + ((1 << (shift - 1)) - 1) + ((bits >> shift) & 1)) >> shift
    normal = rounded - ((127 - bias) << mantissa_bits)
    smallest_normal = np.float32(2.0 ** (1 - bias))
    steps = np.rint(np.minimum(magnitudes, smallest_normal) * np.float32(2.0 ** (bias - 1 + mantissa_bits)))
    codes = np.where(magnitudes < smallest_normal, steps.astype(np.int32), normal)
    return np.minimum(codes, top).astype(np.uint8)


def counted(values: Floats, weights: Floats | None) -> Floats:
    """The values, with 0 where the weight is 0: what does not count must not set a range."""
    return values if weights is None else np.where(weights > 0, values, np.float32(0))


def relative_weights(importance: Floats) -> Floats:
    """Importance weights of each row in units of the row's largest; all alike where all are 0."""
    largest = importance.max(axis=1, keepdims=True)
    return np.where(largest > 0, importance / np.where(largest > 0, largest, 1), np.float32(1)).astype(np.float32)
