"""Signed integers as dense int32 words: the layout of compressed-tensors' "pack-quantized" checkpoints.

A value v of b bits is stored as v + 2^(b-1), field i of a row at bits i b to i b + b - 1 of the row's bit stream,
lowest bits first, and the stream is cut into little-endian 32-bit words: fields may straddle two words, rows start on a
new one, unused bits are 0. (Older readers put floor(32 / b) fields in a word, the same for b = 1, 2, 4, 8 only.)
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch

from core.errors import InvalidFormat

_WORD = 32
_MASK = (1 << _WORD) - 1


def pack_int32(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers (..., n) in [-2^(bits-1), 2^(bits-1) - 1], bits 1 to 8 -> int32 (..., ceil(n bits / 32)).

    InvalidFormat for other widths and for values that do not fit.
    """
    half = 1 << (_checked(bits) - 1)
    if values.numel() and (int(values.min()) < -half or int(values.max()) >= half):
        raise InvalidFormat(f"values outside [{-half}, {half - 1}] do not fit {bits} bits")
    fields = _grouped(values.to(torch.int64) + half, _fields_of_a_group(bits))
    words = fields.new_zeros((*fields.shape[:2], _fields_of_a_group(bits) * bits // _WORD))
    for place, word, shift in _places(bits):
        words[:, :, word] |= (fields[:, :, place] << shift) & _MASK
        if shift + bits > _WORD:
            words[:, :, word + 1] |= fields[:, :, place] >> (_WORD - shift)
    signed = words - ((words >> (_WORD - 1)) << _WORD)
    count = -(-values.shape[-1] * bits // _WORD)
    return signed.to(torch.int32).flatten(1)[:, :count].reshape(*values.shape[:-1], count)


def unpack_int32(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` values of each row of words, int8: the inverse. InvalidFormat for rows of another length."""
    if words.shape[-1] != -(-count * _checked(bits) // _WORD):
        raise InvalidFormat(f"{count} values of {bits} bits are not {words.shape[-1]} words")
    groups = _grouped(words.to(torch.int64) & _MASK, _fields_of_a_group(bits) * bits // _WORD)
    fields = groups.new_zeros((*groups.shape[:2], _fields_of_a_group(bits)))
    for place, word, shift in _places(bits):
        found = groups[:, :, word] >> shift
        if shift + bits > _WORD:
            found |= groups[:, :, word + 1] << (_WORD - shift)
        fields[:, :, place] = found & ((1 << bits) - 1)
    signed = (fields - (1 << (bits - 1))).to(torch.int8)
    return signed.flatten(1)[:, :count].reshape(*words.shape[:-1], count)


def _checked(bits: int) -> int:
    if not 1 <= bits <= 8:
        raise InvalidFormat(f"int32 words hold fields of 1 to 8 bits, not {bits}")
    return bits


def _fields_of_a_group(bits: int) -> int:
    """Fields after which one starts on a new word again."""
    return _WORD // gcd(bits, _WORD)


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """(field, word, shift) within a group."""
    return ((place, *divmod(place * bits, _WORD)) for place in range(_fields_of_a_group(bits)))


def _grouped(rows: torch.Tensor, group: int) -> torch.Tensor:
    """(..., n) -> (rows, groups, group), padded with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % group))
    return padded.reshape(rows.shape[:-1].numel(), padded.shape[-1] // group, group)
