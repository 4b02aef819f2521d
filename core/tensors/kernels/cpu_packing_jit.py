"""The compiled loops that know no blocks: number formats of weights, packing of codes. See `cpu_jit` for the style."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from core.tensors.kernels.cpu_jit import Codes, compiled

_U = np.uint64


@compiled
def widen(bits: NDArray[np.int16], is_half: bool, patterns: NDArray[np.int32]) -> None:
    """Finite 16-bit numbers, bf16 or fp16, as the patterns of the same numbers in fp32."""
    if is_half:
        numbers = patterns.view(np.float32)
        for i in range(bits.size):
            wide = np.int32(bits[i])
            patterns[i] = ((wide & np.int32(0x7FFF)) << np.int32(13)) | (wide & np.int32(-0x80000000))
        for i in range(bits.size):
            numbers[i] *= np.float32(2.0**112)
    else:
        for i in range(bits.size):
            patterns[i] = np.int32(bits[i]) << np.int32(16)


@compiled
def replace_codes(codes: Codes, table: Codes) -> None:
    """Indices become stored codes, in place."""
    for i in range(codes.size):
        codes[i] = table[codes[i]]


@compiled
def pack_nibbles(pairs: NDArray[np.uint16], out: Codes) -> None:
    """Two codes, seen as one number, to a byte."""
    for i in range(pairs.size):
        out[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))


@compiled
def unpack_nibbles(packed: Codes, pairs: NDArray[np.uint16]) -> None:
    """A byte to two codes."""
    for i in range(pairs.size):
        both = np.uint16(packed[i])
        pairs[i] = np.uint16(both | np.uint16(both << np.uint16(4))) & np.uint16(0x0F0F)


@compiled
def pack_bits(eights: NDArray[np.uint64], bits: int, out: Codes) -> None:
    """Eight codes below 2^bits, seen as one number, to `bits` bytes."""
    one, two, four = _U(8 - bits), _U(16 - 2 * bits), _U(32 - 4 * bits)
    for i in range(_U(eights.size)):
        word = eights[i]
        word = (word & _U(0x00FF00FF00FF00FF)) | ((word & _U(0xFF00FF00FF00FF00)) >> one)
        word = (word & _U(0x0000FFFF0000FFFF)) | ((word & _U(0xFFFF0000FFFF0000)) >> two)
        word = (word & _U(0x00000000FFFFFFFF)) | ((word & _U(0xFFFFFFFF00000000)) >> four)
        for at in range(i * _U(bits), (i + _U(1)) * _U(bits)):
            out[at] = np.uint8(word & _U(255))
            word >>= _U(8)


@compiled
def unpack_bits(packed: Codes, bits: int, eights: NDArray[np.uint64]) -> None:
    """The inverse of `pack_bits`."""
    one, two, four = _U(8 - bits), _U(16 - 2 * bits), _U(32 - 4 * bits)
    fours = _U((1 << 4 * bits) - 1)
    pairs = _U((1 << 2 * bits) - 1) * _U(0x0000000100000001)
    singles = _U((1 << bits) - 1) * _U(0x0001000100010001)
    for i in range(_U(eights.size)):
        word = _U(0)
        for at in range(_U(bits)):
            word |= _U(packed[i * _U(bits) + at]) << (_U(8) * at)
        word = (word & fours) | ((word & ~fours) << four)
        word = (word & pairs) | ((word & ~pairs) << two)
        eights[i] = (word & singles) | ((word & ~singles) << one)


@compiled
def pack_digits(codes: Codes, weighted: NDArray[np.uint64], width: int, out: Codes) -> None:
    """The sums of `weighted[place, code]` over groups of codes to `width` bytes each; the last one may be cut short."""
    group = _U(weighted.shape[0])
    count, first = _U(codes.size), _U(0)
    for start in range(_U(0), count, group):
        word = _U(0)
        for i in range(min(group, count - start)):
            word += weighted[i, codes[start + i]]
        for at in range(first, min(first + _U(width), _U(out.size))):
            out[at] = np.uint8(word & _U(255))
            word >>= _U(8)
        first += _U(width)


@compiled
def pack_fives(codes: Codes, radix: int, out: Codes) -> None:
    """Five digits to a byte, whole bytes only."""
    base, at = _U(radix), _U(0)
    for i in range(_U(codes.size) // _U(5)):
        word = _U(codes[at + _U(4)])
        word = word * base + _U(codes[at + _U(3)])
        word = word * base + _U(codes[at + _U(2)])
        word = word * base + _U(codes[at + _U(1)])
        out[i] = np.uint8(word * base + _U(codes[at]))
        at += _U(5)


@compiled
def add_bytes(packed: Codes, digits: NDArray[np.uint8], codes: Codes) -> None:
    """codes += digits[byte, place] for groups of one byte."""
    group, count, first = _U(digits.shape[1]), _U(codes.size), _U(0)
    if group == _U(5):
        for at in range(count // _U(5)):
            for i in range(_U(5)):
                codes[first + i] += digits[packed[at], i]
            first += _U(5)
    for start in range(first, count, group):
        for i in range(min(group, count - start)):
            codes[start + i] += digits[packed[start // group], i]


@compiled
def add_digits(packed: Codes, radix: int, group: int, width: int, factor: int, codes: Codes) -> None:
    """codes += factor * digit, for groups of any width."""
    for start in range(0, codes.size, group):
        first, word = start // group * width, _U(0)
        for at in range(min(first + width, packed.size) - 1, first - 1, -1):
            word = (word << _U(8)) | _U(packed[_U(at)])
        for i in range(_U(start), _U(min(start + group, codes.size))):
            higher = word // _U(radix)
            codes[i] += np.uint8(_U(factor) * (word - higher * _U(radix)))
            word = higher
