"""GGUF's K types: 256 elements in 8 or 16 sub-blocks, whose scales (and minima) are quantised under fp16 numbers.

Reading is bit-identical to ggml's decoders: fp32, every product and sum rounded on its own. `k_search` finds the fields
that writing lays out. Functions take and give (blocks, bytes) and (blocks, 256). Fields at their offsets in bytes:

    Q2_K   scales 0-15 (scale low nibble, minimum high), qs 16-79, d 80-81, dmin 82-83
    Q3_K   high bits 0-31, qs 32-95, 6-bit scales 96-107, d 108-109
    Q4_K   d 0-1, dmin 2-3, 6-bit pairs 4-15, qs 16-143
    Q5_K   d 0-1, dmin 2-3, 6-bit pairs 4-15, high bits 16-47, qs 48-175
    Q6_K   ql 0-127, qh 128-191, scales 192-207 (signed), d 208-209
"""

from __future__ import annotations

import numpy as np

from core.tensors.block_types.fields import (
    Bytes,
    Floats,
    half_bytes,
    halves,
    high_bits,
    join_halves,
    joined,
    low_bits,
    split_halves,
)
from core.tensors.block_types.k_search import AFFINE, SYMMETRIC, Signed, search_affine, search_symmetric

_BLOCK = 256
_PLACES = np.array([0, 2, 4, 6], dtype=np.uint8)  # of four two-bit fields in a byte


def decode_q2_k(data: Bytes) -> Floats:
    scales = data[:, :16]
    return _affine(data[:, 80:84], low_bits(scales, 4), high_bits(scales, 4), _two_bits(data[:, 16:80]))


def decode_q3_k(data: Bytes) -> Floats:
    high = _planes(data[:, :32], 8).reshape(len(data), _BLOCK)
    codes = joined(_two_bits(data[:, 32:96]), high, 2).astype(np.int8) - np.int8(4)
    scales = _unpack_q3_scales(data[:, 96:108]).astype(np.int8) - np.int8(32)
    return _symmetric(data[:, 108:110], scales, codes)


def decode_q4_k(data: Bytes) -> Floats:
    scales, minima = _unpack_pairs(data[:, 4:16])
    return _affine(data[:, :4], scales, minima, _nibble_runs(data[:, 16:]))


def decode_q5_k(data: Bytes) -> Floats:
    scales, minima = _unpack_pairs(data[:, 4:16])
    high = _planes(data[:, 16:48], 8).reshape(len(data), _BLOCK)
    return _affine(data[:, :4], scales, minima, joined(_nibble_runs(data[:, 48:]), high, 4))


def decode_q6_k(data: Bytes) -> Floats:
    low = data[:, :128].reshape(-1, 2, 64)
    nibbles = np.concatenate((low_bits(low, 4), high_bits(low, 4)), axis=2).reshape(len(data), _BLOCK)
    codes = joined(nibbles, _two_bits(data[:, 128:192]), 4).astype(np.int8) - np.int8(32)
    return _symmetric(data[:, 208:210], data[:, 192:208].view(np.int8), codes)


def encode_q2_k(values: Floats, importance: Floats | None) -> Bytes:
    found = search_affine(values, importance, AFFINE["q2_k"])
    return np.concatenate(
        (joined(found.scales, found.minima, 4), _pack_two_bits(found.codes), half_bytes(found.heads)), axis=1
    )


def encode_q3_k(values: Floats, importance: Floats | None) -> Bytes:
    found = search_symmetric(values, importance, SYMMETRIC["q3_k"])
    codes = (found.codes + np.int8(4)).view(np.uint8)
    high = _join_planes(high_bits(codes, 2).reshape(-1, 8, 32))
    scales = _pack_q3_scales((found.scales + np.int8(32)).view(np.uint8))
    return np.concatenate((high, _pack_two_bits(low_bits(codes, 2)), scales, half_bytes(found.heads)), axis=1)


def encode_q4_k(values: Floats, importance: Floats | None) -> Bytes:
    found = search_affine(values, importance, AFFINE["q4_k"])
    pairs = _pack_pairs(found.scales, found.minima)
    return np.concatenate((half_bytes(found.heads), pairs, _pack_nibble_runs(found.codes)), axis=1)


def encode_q5_k(values: Floats, importance: Floats | None) -> Bytes:
    found = search_affine(values, importance, AFFINE["q5_k"])
    pairs = _pack_pairs(found.scales, found.minima)
    high = _join_planes(high_bits(found.codes, 4).reshape(-1, 8, 32))
    return np.concatenate((half_bytes(found.heads), pairs, high, _pack_nibble_runs(low_bits(found.codes, 4))), axis=1)


def encode_q6_k(values: Floats, importance: Floats | None) -> Bytes:
    found = search_symmetric(values, importance, SYMMETRIC["q6_k"])
    codes = (found.codes + np.int8(32)).view(np.uint8)
    nibbles = low_bits(codes, 4).reshape(-1, 2, 128)
    low = joined(nibbles[:, :, :64], nibbles[:, :, 64:], 4).reshape(-1, 128)
    return np.concatenate(
        (low, _pack_two_bits(high_bits(codes, 4)), found.scales.view(np.uint8), half_bytes(found.heads)), axis=1
    )


def _affine(heads: Bytes, scales: Bytes, minima: Bytes, codes: Bytes) -> Floats:
    """(d sc) q - (dmin mn), in that order."""
    factors = halves(heads)
    steps = factors[:, :1] * scales.astype(np.float32)
    lowered = factors[:, 1:] * minima.astype(np.float32)
    parts = codes.reshape(*scales.shape, -1).astype(np.float32)
    parts *= steps[:, :, None]
    parts -= lowered[:, :, None]
    return parts.reshape(len(heads), _BLOCK)


def _symmetric(head: Bytes, scales: Signed, codes: Signed) -> Floats:
    """(d sc) q, in that order."""
    steps = halves(head) * scales.astype(np.float32)
    parts = codes.reshape(*scales.shape, -1).astype(np.float32)
    parts *= steps[:, :, None]
    return parts.reshape(len(head), _BLOCK)


def _two_bits(data: Bytes) -> Bytes:
    """Two bits of each element in two runs of 32 bytes; a run's four planes are its four times 32 elements."""
    return low_bits(data.reshape(-1, 2, 1, 32) >> _PLACES[:, None], 2).reshape(len(data), _BLOCK)


def _pack_two_bits(codes: Bytes) -> Bytes:
    joined_runs: Bytes = np.bitwise_or.reduce(codes.reshape(-1, 2, 4, 32) << _PLACES[:, None], axis=2)
    return joined_runs.reshape(-1, 64)


def _planes(data: Bytes, count: int) -> Bytes:
    """Bit p of each byte -> (blocks, count, bytes)."""
    return low_bits(data[:, None, :] >> np.arange(count, dtype=np.uint8)[:, None], 1)


def _join_planes(planes: Bytes) -> Bytes:
    return np.packbits(planes, axis=1, bitorder="little")[:, 0]


def _nibble_runs(data: Bytes) -> Bytes:
    """Four runs of 32 bytes: the low nibbles are the run's first 32 elements, the high ones the next."""
    runs = data.reshape(-1, 4, 32)
    return np.stack((low_bits(runs, 4), high_bits(runs, 4)), axis=2).reshape(len(data), _BLOCK)


def _pack_nibble_runs(codes: Bytes) -> Bytes:
    runs = codes.reshape(-1, 4, 2, 32)
    return joined(runs[:, :, 0], runs[:, :, 1], 4).reshape(-1, _BLOCK // 2)


def _unpack_pairs(data: Bytes) -> tuple[Bytes, Bytes]:
    """Eight pairs of 6-bit scales and minima from twelve bytes."""
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    later_scales = joined(low_bits(third, 4), high_bits(first, 6), 4)
    later_minima = joined(high_bits(third, 4), high_bits(second, 6), 4)
    scales = np.concatenate((low_bits(first, 6), later_scales), axis=1)
    return scales, np.concatenate((low_bits(second, 6), later_minima), axis=1)


def _pack_pairs(scales: Bytes, minima: Bytes) -> Bytes:
    first = joined(scales[:, :4], high_bits(scales[:, 4:], 4), 6)
    second = joined(minima[:, :4], high_bits(minima[:, 4:], 4), 6)
    return np.concatenate((first, second, joined(low_bits(scales[:, 4:], 4), minima[:, 4:], 4)), axis=1)


def _unpack_q3_scales(data: Bytes) -> Bytes:
    """Sixteen 6-bit scales: four low bits in eight bytes, two high bits in the next four."""
    high = low_bits(data[:, None, 8:] >> _PLACES[:, None], 2)
    return joined(split_halves(data[:, :8]), high.reshape(-1, 16), 4)


def _pack_q3_scales(scales: Bytes) -> Bytes:
    high = np.bitwise_or.reduce(high_bits(scales, 4).reshape(-1, 4, 4) << _PLACES[:, None], axis=1)
    return np.concatenate((join_halves(low_bits(scales, 4)), high), axis=1)
