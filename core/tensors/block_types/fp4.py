"""GGUF's types with E2M1 elements: MXFP4 (32 elements, an E8M0 byte) and NVFP4 (64 elements, four UE4M3 bytes).

MXFP4 is written byte for byte as ggml does: the OCP floor rule for the scale, nearest magnitude, ties to the smaller
one, zero as code 0. NVFP4's block has no scale of the tensor: whoever wants one divides by it first. Its scales are
swept around absmax/6 for the smallest squared error.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from core.formats import floating
from core.tensors.block_types.fields import Bytes, Floats, counted, join_halves, relative_weights, split_halves

_MAGNITUDES = np.array(floating.magnitudes(2, 1, ""), dtype=np.float32)
_SIGNED = np.concatenate((_MAGNITUDES, np.float32(0) - _MAGNITUDES))
_MIDDLES = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / np.float32(2)
_EMAX, _BIAS, _SIGN = 2, 127, 8
_E4M3 = floating.magnitudes(4, 3, "")
# As the reference decoder reads a byte: bit 7 does not count, but that 0x7F is 0 and 0xFF is 480.
_UE4M3 = np.array([*_E4M3, 0.0, *_E4M3, 480.0], dtype=np.float32)
_SUB_BLOCK, _SUB_BLOCKS = 16, 4
_SWEEP = range(-4, 5)


def decode_mxfp4(data: Bytes) -> Floats:
    """2^(byte - 127) times the element; byte 255 is 2^128, so it gives infinities."""
    doubled = _SIGNED[split_halves(data[:, 1:])] * np.float32(2)
    with np.errstate(over="ignore"):
        found: Floats = np.ldexp(doubled, data[:, :1].astype(np.int32) - _BIAS - 1)
    return found


def encode_mxfp4(values: Floats) -> Bytes:
    """Blocks of 32, byte for byte as ggml; zero blocks are all zero bytes."""
    _, exponent = np.frexp(np.abs(values).max(axis=1, keepdims=True))
    byte = np.clip(exponent - 1 - _EMAX + _BIAS, 0, 2 * _BIAS).astype(np.uint8)
    byte[(values == 0).all(axis=1)] = 0
    scaled = np.ldexp(values, _BIAS - byte.astype(np.int32))
    return np.concatenate((byte, join_halves(_nearest(scaled))), axis=1)


def decode_nvfp4(data: Bytes) -> Floats:
    """Four sub-blocks of 16: bytes 0-3 their scales, then eight bytes of nibbles each."""
    scales = _UE4M3[data[:, :_SUB_BLOCKS]].reshape(-1, 1)
    codes = split_halves(np.ascontiguousarray(data[:, _SUB_BLOCKS:]).reshape(-1, _SUB_BLOCK // 2))
    return (scales * _SIGNED[codes]).reshape(len(data), -1)


def encode_nvfp4(values: Floats, importance: Floats | None) -> Bytes:
    """Blocks of 64: of nine scales around absmax/6 the first with the smallest (weighted) squared error.

    Beyond 448 * 6 = 2688 the elements saturate; below about 1e-3 the scales are subnormal.
    """
    parts = values.reshape(-1, _SUB_BLOCK)
    weights = None if importance is None else relative_weights(importance.reshape(-1, _SUB_BLOCK))
    wanted = np.abs(counted(parts, weights)).max(axis=1) / np.float32(6)
    start = np.searchsorted(_UE4M3[: len(_E4M3)], wanted)
    best = np.full(len(parts), np.inf)
    chosen = np.zeros((len(parts), 1), dtype=np.uint8)
    for step in _SWEEP:
        byte = np.clip(start + step, 1, 126).astype(np.uint8)[:, None]
        error = _weighted_error(parts, _round_trip(parts, byte), weights)
        better = error < best
        best[better], chosen[better] = error[better], byte[better]
    chosen[wanted == 0] = 0
    codes = join_halves(_nearest(_divided(parts, chosen)))
    return np.concatenate((chosen.reshape(-1, _SUB_BLOCKS), codes.reshape(len(values), -1)), axis=1)


def _round_trip(parts: Floats, byte: Bytes) -> Floats:
    return _UE4M3[byte] * _SIGNED[_nearest(_divided(parts, byte))]


def _divided(parts: Floats, byte: Bytes) -> Floats:
    scale = _UE4M3[byte]
    return np.divide(parts, scale, out=np.zeros_like(parts), where=scale > 0)


def _weighted_error(wanted: Floats, found: Floats, weights: Floats | None) -> NDArray[np.float64]:
    """Sum of squared errors of each row."""
    error = wanted.astype(np.float64) - found
    total: NDArray[np.float64] = np.einsum("ve,ve->v", error, error if weights is None else error * weights)
    return total


def _nearest(scaled: Floats) -> Bytes:
    """Codes of the nearest E2M1 values, ties to the smaller magnitude; zero and what rounds to it is code 0."""
    magnitudes = np.abs(scaled)
    codes = np.zeros(scaled.shape, dtype=np.uint8)
    for middle in _MIDDLES:
        codes += magnitudes > middle
    return codes | np.where((scaled < 0) & (codes > 0), np.uint8(_SIGN), np.uint8(0))
