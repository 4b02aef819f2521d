"""Scales of tiles: how they follow from the weights, how they are stored, what stored bytes stand for.

Decoded scales are fp64, where a scale times an element is exact. Zero tiles store zeros. Every byte is valid: E8M0's
255 reads as NaN, E5M3's top exponent as infinity or NaN, as fp16 and bf16 have them.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from core.formats.block_types import TileElement
from core.tensors.block_types.fields import Bytes, Floats, float_codes, half_bytes, halves

ScaleRule = Literal["max", "midmax"]
Exponents = NDArray[np.int32]
Doubles = NDArray[np.float64]

_BIAS, _NAN_BYTE = 127, 255
_E5M3_BIAS, _E5M3_STEPS, _E5M3_TOP = 15, 8, 30 * 8 + 7


def scale_exponents(largest: Floats, element: TileElement, rule: ScaleRule) -> Exponents:
    """Exponents of power-of-two scales for tiles of that largest magnitude.

    "max": floor(log2 largest) - emax; "midmax": one more where the largest is beyond the element's `midmax`, for floats
    of more than one exponent bit. Kept where E8M0 can store it and the largest element stays within fp32.
    """
    _, exponent = np.frexp(largest)
    power = exponent - 1 - element.largest_exponent
    if rule == "midmax" and element.kind != "int":
        power += np.ldexp(largest, -power) > element.midmax
    power[largest == 0] = -_BIAS
    kept: Exponents = np.clip(power, -_BIAS, _BIAS - element.largest_exponent)
    return kept


def store_exponents(exponents: Exponents) -> Bytes:
    """One E8M0 byte each."""
    return (exponents + _BIAS).astype(np.uint8)


def store_scales(wanted: Floats, scale: str) -> Bytes:
    """Non-negative scales (blocks, n) in e5m3, fp16 or bf16, ties to even, saturating -> bytes of each block."""
    if scale == "e5m3":
        return float_codes(wanted, 5, 3, _E5M3_TOP)
    if scale == "fp16":
        return half_bytes(wanted)
    bits = wanted.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.ascontiguousarray(rounded.astype("<u2")).view(np.uint8)


def read_scales(data: Bytes, scale: str) -> Doubles:
    """The inverse for every kind of scale: bytes of each block -> (blocks, n)."""
    if scale == "e8m0":
        found = np.ldexp(1.0, data.astype(np.int32) - _BIAS)
        return np.where(data == _NAN_BYTE, np.nan, found)
    if scale == "e5m3":
        return _E5M3[data]
    if scale == "fp16":
        return halves(data).astype(np.float64)
    words = np.ascontiguousarray(data).view("<u2").astype(np.uint32)
    return (words << 16).view(np.float32).astype(np.float64)


def _e5m3_values() -> Doubles:
    exponent, mantissa = np.divmod(np.arange(256), _E5M3_STEPS)
    significand = np.where(exponent > 0, mantissa + _E5M3_STEPS, mantissa)
    found: Doubles = np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - _E5M3_BIAS - 3)
    found[_E5M3_TOP + 1 :] = np.nan
    found[_E5M3_TOP + 1] = np.inf
    return found


_E5M3 = _e5m3_values()
