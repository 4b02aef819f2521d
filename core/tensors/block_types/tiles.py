"""Types of the TensorCast catalogue in real bytes: MX, MSFP with shared offset bits, scaled FP4, integers, codebooks.

For finite weights the numbers are that library's; its virtual casts go wrong for fp32's subnormals and for scales below
2^-23, which are exact here. How the bytes lie is documented at `core.formats.block_types.TileType`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from core.formats.block_types import CODEBOOK_LEVELS, TileElement, TileType, implicit_codebooks
from core.tensors.block_types.fields import (
    Bytes,
    Floats,
    float_codes,
    low_bits,
    pack_bits,
    relative_weights,
    unpack_bits,
)
from core.tensors.block_types.tile_scales import (
    Doubles,
    Exponents,
    ScaleRule,
    read_scales,
    scale_exponents,
    store_exponents,
    store_scales,
)

_TABLES, _SIGN = 16, 8


def encode_tiles(values: Floats, importance: Floats | None, kind: TileType, rule: ScaleRule) -> Bytes:
    """(blocks, elements) -> (blocks, bytes). Importance weights decide between codebooks, and nothing else."""
    if kind.element.kind == "uint":
        return _encode_affine(values, kind)
    largest = np.abs(values).reshape(len(values), kind.tiles, -1).max(axis=2)
    if kind.scale == "e8m0":
        exponents = scale_exponents(largest, kind.element, rule)
        stored = store_exponents(exponents)
        offsets = _offsets(values, exponents, kind, rule)
    else:
        stored = store_scales(largest / np.float32(kind.element.largest), kind.scale)
        offsets = np.zeros((len(values), kind.sub_tiles), dtype=np.uint8)
    scaled = _divided(values, _sub_tile_scales(stored, offsets, kind), kind)
    if kind.element.kind == "codebook":
        offsets, codes = _choose_tables(scaled, importance, kind)
    else:
        codes = _element_codes(scaled, kind.element, _step(kind)).reshape(values.shape)
    return np.concatenate((stored, *_packed_meta(offsets, kind), pack_bits(codes, kind.element.bits)), axis=1)


def decode_tiles(data: Bytes, kind: TileType) -> Floats:
    """The inverse, from any bytes; NaN and infinities only where the bytes spell them or the number is beyond fp32."""
    start = kind.scale_bytes + kind.zero_bytes
    meta = _unpacked_meta(data[:, start : start + kind.meta_bytes], kind)
    codes = unpack_bits(data[:, start + kind.meta_bytes :], kind.element.bits, kind.tiles * kind.tile)
    stored = data[:, : kind.scale_bytes]
    with np.errstate(over="ignore", invalid="ignore"):
        if kind.element.kind == "uint":
            return _decode_affine(data, codes, kind).astype(np.float32)
        parts = codes.reshape(len(data), kind.sub_tiles, -1)
        if kind.element.kind == "codebook":
            elements = _signed_codebooks(kind.element)[meta[:, :, None], parts]
            meta = np.zeros_like(meta)
        else:
            elements = _element_values(kind.element)[parts] * _step(kind)
        scales = _sub_tile_scales(stored, meta, kind)
        return (elements * scales[:, :, None]).astype(np.float32).reshape(len(data), -1)


def _encode_affine(values: Floats, kind: TileType) -> Bytes:
    """x ~ scale q - zero, or scale (q - zero) for whole zeros, with 0 inside the range; a block is one tile."""
    low = np.minimum(values.min(axis=1, keepdims=True), 0)
    high = np.maximum(values.max(axis=1, keepdims=True), 0)
    with np.errstate(over="ignore"):
        stored = store_scales((high - low) / np.float32(kind.element.largest), kind.scale)
    scale = read_scales(stored, kind.scale)
    if kind.zero == "int8":
        zero = np.clip(np.rint(_quotients(-low, scale)), 0, kind.element.largest)
        stored_zero, steps = zero.astype(np.uint8), np.rint(_quotients(values, scale)) + zero
    else:
        stored_zero = store_scales(-low, kind.zero)
        zero = read_scales(stored_zero, kind.zero).astype(np.float32)
        steps = np.rint(_quotients(values + zero, scale))
    codes = np.clip(steps, 0, kind.element.largest).astype(np.uint8)
    return np.concatenate((stored, stored_zero, pack_bits(codes, kind.element.bits)), axis=1)


def _decode_affine(data: Bytes, codes: Bytes, kind: TileType) -> Doubles:
    scale = read_scales(data[:, : kind.scale_bytes], kind.scale)
    stored_zero = data[:, kind.scale_bytes : kind.scale_bytes + kind.zero_bytes]
    if kind.zero == "int8":
        return scale * (codes - stored_zero.view(np.int8).astype(np.float64))
    return scale * codes - read_scales(stored_zero, kind.zero)


def _quotients(values: Floats, scale: Doubles) -> Floats:
    """fp32 quotients, 0 where the scale is 0."""
    divisor = scale.astype(np.float32)
    with np.errstate(over="ignore"):
        return np.divide(values, divisor, out=np.zeros_like(values), where=divisor > 0)


def _offsets(values: Floats, exponents: Exponents, kind: TileType, rule: ScaleRule) -> Bytes:
    """By how much each sub-tile's exponent can be below its tile's, as far as the offset bits reach."""
    if not kind.offset_bits:
        return np.zeros((len(values), kind.sub_tiles), dtype=np.uint8)
    largest = np.abs(values).reshape(len(values), kind.sub_tiles, -1).max(axis=2)
    below = np.repeat(exponents, kind.sub_tiles // kind.tiles, axis=1) - scale_exponents(largest, kind.element, rule)
    kept: Bytes = np.clip(below, 0, (1 << kind.offset_bits) - 1).astype(np.uint8)
    return kept


def _sub_tile_scales(stored: Bytes, offsets: Bytes, kind: TileType) -> Doubles:
    """(blocks, sub-tiles): the tile's scale, lowered by the offset."""
    tile_scales = read_scales(stored, kind.scale)
    return np.ldexp(np.repeat(tile_scales, kind.sub_tiles // kind.tiles, axis=1), -offsets.astype(np.int32))


def _divided(values: Floats, scales: Doubles, kind: TileType) -> Floats:
    """(blocks, sub-tiles, elements) in units of the scales; 0 where the scale is 0."""
    parts = values.reshape(len(values), kind.sub_tiles, -1)
    each = scales[:, :, None]
    with np.errstate(over="ignore"):
        return np.divide(parts, each, out=np.zeros(parts.shape), where=each > 0).astype(np.float32)


def _step(kind: TileType) -> float:
    """What code 1 of an integer element stands for; 1 for floats."""
    is_binary_fraction = kind.element.kind == "int" and kind.scale == "e8m0"
    return 2.0**-kind.element.fraction_bits if is_binary_fraction else 1.0


def _element_codes(scaled: Floats, element: TileElement, step: float) -> Bytes:
    """Nearest codes, ties to even, saturating; never a negative zero."""
    if element.kind == "int":
        steps = np.clip(np.rint(scaled * np.float32(1 / step)), -element.largest, element.largest)
        return low_bits(steps.astype(np.int8).view(np.uint8), element.bits)
    split = element.exponent_bits, element.mantissa_bits
    codes = float_codes(np.abs(scaled), *split, top=len(element.magnitudes) - 1)
    return codes | np.where((scaled < 0) & (codes > 0), np.uint8(1 << (element.bits - 1)), np.uint8(0))


@lru_cache(maxsize=16)
def _element_values(element: TileElement) -> Doubles:
    """What each code stands for in a tile of scale and step 1: (2^bits,)."""
    half = 1 << (element.bits - 1)
    if element.kind == "int":
        return np.concatenate((np.arange(half), np.arange(-half, 0))).astype(np.float64)
    positive = np.full(half, np.nan)
    positive[: len(element.magnitudes)] = element.magnitudes
    if half - len(element.magnitudes) == 1 << element.mantissa_bits:
        positive[len(element.magnitudes)] = np.inf
    return np.concatenate((positive, -positive))


@lru_cache(maxsize=8)
def _signed_codebooks(element: TileElement) -> Doubles:
    """(16 tables, 16 codes): bit 3 is the sign, 0 the code of zero."""
    tables = np.array(implicit_codebooks(element.exponent_bits, element.mantissa_bits))
    positive = np.concatenate((np.zeros((_TABLES, 1)), tables), axis=1)
    return np.concatenate((positive, -positive), axis=1)


def _choose_tables(scaled: Floats, importance: Floats | None, kind: TileType) -> tuple[Bytes, Bytes]:
    """For each sub-tile the table with the smallest (weighted) squared error, the first of equals, and its codes."""
    magnitudes = np.abs(scaled)
    weights = None if importance is None else relative_weights(importance.reshape(-1, scaled.shape[2]))
    tables = _signed_codebooks(kind.element)[:, : CODEBOOK_LEVELS + 1].astype(np.float32)
    best = np.full(scaled.shape[:2], np.inf, dtype=np.float32)
    chosen, codes = np.zeros(scaled.shape[:2], dtype=np.uint8), np.zeros(scaled.shape, dtype=np.uint8)
    for number, table in enumerate(tables):
        found = _nearest_level(magnitudes, table)
        error = table[found] - magnitudes
        weighted = error if weights is None else error * weights.reshape(error.shape)
        total = np.einsum("bse,bse->bs", error, weighted)
        better = total < best
        best[better], chosen[better], codes[better] = total[better], number, found[better]
    negative = np.where((scaled < 0) & (codes > 0), np.uint8(_SIGN), np.uint8(0))
    return chosen, (codes | negative).reshape(len(scaled), -1)


def _nearest_level(magnitudes: Floats, table: Floats) -> Bytes:
    """Indices of the nearest of a table's levels, ties away from zero."""
    found = np.zeros(magnitudes.shape, dtype=np.uint8)
    for middle in (table[1:] + table[:-1]) / np.float32(2):
        found += magnitudes >= middle
    return found


def _packed_meta(meta: Bytes, kind: TileType) -> tuple[Bytes, ...]:
    return (pack_bits(meta, kind.meta_bits),) if kind.meta_bits else ()


def _unpacked_meta(data: Bytes, kind: TileType) -> Bytes:
    if not kind.meta_bits:
        return np.zeros((len(data), kind.sub_tiles), dtype=np.uint8)
    return unpack_bits(data, kind.meta_bits, kind.sub_tiles)
