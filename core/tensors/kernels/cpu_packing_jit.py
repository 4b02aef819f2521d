"""The compiled loops that know no blocks: packing of codes, and where a number is none. See `cpu_jit` for the style."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from core.tensors.kernels.cpu_jit import Bits, Codes, compiled, inlined

_U = np.uint64


@compiled
def first_not_finite(bits: Bits, mask: int, infinity: int) -> int:
    """Index of the first element that is NaN or infinite, or -1."""
    for i in range(bits.size):
        if (bits[i] & mask) >= infinity:
            return i
    return -1


@compiled
def replace_codes(codes: Codes, table: Codes) -> None:
    """Indices become stored codes, in place."""
    for i in range(codes.size):
        codes[i] = table[codes[i]]


@compiled
def unpack_pairs(packed: Codes, bits: int, pairs: NDArray[np.uint16]) -> None:
    """The inverse of `pack_pairs`."""
    shift, mask = np.uint16(8 - bits), np.uint16(((1 << bits) - 1) * 0x0101)
    for i in range(_U(packed.size)):
        both = np.uint16(packed[i])
        pairs[i] = np.uint16(np.uint16(both | np.uint16(both << shift)) & mask)


@compiled
def pack_bits(eights: NDArray[np.uint64], bits: int, out: Codes) -> None:
    """Eight codes below 2^bits, seen as one number, to `bits` bytes."""
    if bits == 3:
        _pack_eights(eights, 3, out)
    elif bits == 5:
        _pack_eights(eights, 5, out)
    elif bits == 6:
        _pack_eights(eights, 6, out)
    else:
        _pack_eights(eights, 7, out)


@inlined
def _pack_eights(eights: NDArray[np.uint64], bits: int, out: Codes) -> None:
    one, two, four = _U(8 - bits), _U(16 - 2 * bits), _U(32 - 4 * bits)
    for i in range(_U(eights.size)):
        word = eights[i]
        word = (word & _U(0x00FF00FF00FF00FF)) | ((word & _U(0xFF00FF00FF00FF00)) >> one)
        word = (word & _U(0x0000FFFF0000FFFF)) | ((word & _U(0xFFFF0000FFFF0000)) >> two)
        word = (word & _U(0x00000000FFFFFFFF)) | ((word & _U(0xFFFFFFFF00000000)) >> four)
        for at in range(_U(bits)):
            out[i * _U(bits) + at] = np.uint8(word >> (_U(8) * at))


@compiled
def unpack_bits(packed: Codes, bits: int, eights: NDArray[np.uint64]) -> None:
    """The inverse of `pack_bits`."""
    if bits == 3:
        _unpack_eights(packed, 3, eights)
    elif bits == 5:
        _unpack_eights(packed, 5, eights)
    elif bits == 6:
        _unpack_eights(packed, 6, eights)
    else:
        _unpack_eights(packed, 7, eights)


@inlined
def _unpack_eights(packed: Codes, bits: int, eights: NDArray[np.uint64]) -> None:
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
def add_fives(packed: Codes, digits: NDArray[np.uint64], words: NDArray[np.uint64]) -> None:
    """Codes, seen as words, += the five digits of each byte: `digits`, a byte each, in a number. Eight bytes a time."""
    for i in range(_U(words.size) // _U(5)):
        at, to = i * _U(8), i * _U(5)
        d1, d3, d4 = digits[packed[at + _U(1)]], digits[packed[at + _U(3)]], digits[packed[at + _U(4)]]
        d6 = digits[packed[at + _U(6)]]
        words[to] += digits[packed[at]] | d1 << _U(40)
        words[to + _U(1)] += d1 >> _U(24) | digits[packed[at + _U(2)]] << _U(16) | d3 << _U(56)
        words[to + _U(2)] += d3 >> _U(8) | d4 << _U(32)
        words[to + _U(3)] += d4 >> _U(32) | digits[packed[at + _U(5)]] << _U(8) | d6 << _U(48)
        words[to + _U(4)] += d6 >> _U(16) | digits[packed[at + _U(7)]] << _U(24)


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
    group, count = _U(digits.shape[1]), _U(codes.size)
    for start in range(_U(0), count, group):
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
