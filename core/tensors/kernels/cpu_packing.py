"""Packing of codes on the CPU, equal to `core.tensors.packing` bit for bit, by compiled loops.

Takes and gives uint8 codes of formats with at most 256 of them, in pieces that begin at whole groups.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from core.formats.stored import GroupLayout, planes

_EIGHT, _FIVE = 8, 5
_PAIRED = (1, 2, 4)  # bits of codes that fill a byte


def pack_planes(codes: torch.Tensor, radix: int) -> list[torch.Tensor]:
    """Codes (n,) uint8 of a format with `radix` of them, as one packed piece per plane."""
    layouts, digits = planes(radix), codes.numpy()
    if len(layouts) == 1:
        return [torch.from_numpy(_pack(digits, layouts[0]))]
    low = np.uint8(layouts[0].radix)
    high = digits // low
    parts = (digits - high * low, high)
    return [torch.from_numpy(_pack(part, layout)) for part, layout in zip(parts, layouts, strict=True)]


def unpack_planes(pieces: list[torch.Tensor], radix: int, count: int) -> torch.Tensor:
    """The inverse: codes (count,) uint8."""
    layouts = planes(radix)
    bits = _bits(layouts[0])
    if len(layouts) == 1 and bits is not None:
        return torch.from_numpy(_unpack_bits(pieces[0].numpy(), bits, count))
    codes, factor = np.zeros(count, np.uint8), 1
    for piece, layout in zip(pieces, layouts, strict=True):
        _add(piece.numpy(), layout, factor, codes)
        factor *= layout.radix
    return torch.from_numpy(codes)


def _bits(layout: GroupLayout) -> int | None:
    """Bits of a code where they are packed as such."""
    bits = layout.radix.bit_length() - 1
    return bits if layout.radix == 1 << bits and 0 < bits < _EIGHT else None


def _pack(codes: NDArray[np.uint8], layout: GroupLayout) -> NDArray[np.uint8]:
    from core.tensors.kernels import cpu_packing_jit

    if layout.width == layout.group:
        return codes
    out, bits = np.empty(layout.nbytes(codes.size), np.uint8), _bits(layout)
    if bits is not None:
        _pack_bits(codes, bits, out)
    elif layout.width == 1 and layout.group == _FIVE:
        fives = codes.size // _FIVE
        cpu_packing_jit.pack_fives(codes, layout.radix, out)
        rest = codes[fives * _FIVE :] * layout.radix ** np.arange(codes.size - fives * _FIVE)
        out[fives:] = rest.sum()
    elif layout.width:
        places = np.array([layout.radix**place for place in range(layout.group)], np.uint64)
        weighted = np.outer(places, np.arange(256, dtype=np.uint64)).astype(np.uint64)
        cpu_packing_jit.pack_digits(codes, weighted, layout.width, out)
    return out


def _pack_bits(codes: NDArray[np.uint8], bits: int, out: NDArray[np.uint8]) -> None:
    from core.tensors.kernels import cpu_packing_jit

    eights = codes.size // _EIGHT
    whole, rest = codes[: eights * _EIGHT], np.zeros(_EIGHT, np.uint8)
    rest[: codes.size - eights * _EIGHT] = codes[eights * _EIGHT :]
    end = np.empty(bits, np.uint8)
    for source, packed in ((whole, out[: eights * bits]), (rest, end)):
        if bits in _PAIRED:
            _pack_pairs(source, bits, packed)
        else:
            cpu_packing_jit.pack_bits(source.view(np.uint64), bits, packed)
    out[eights * bits :] = end[: out.size - eights * bits]


def _pack_pairs(codes: NDArray[np.uint8], bits: int, out: NDArray[np.uint8]) -> None:
    """Neighbours join until a byte is full."""
    from core.tensors.kernels import cpu_jit

    while bits < _EIGHT // 2:
        joined = np.empty(codes.size // 2, np.uint8)
        cpu_jit.pack_pairs(codes.view(np.uint16), bits, joined)
        codes, bits = joined, 2 * bits
    cpu_jit.pack_pairs(codes.view(np.uint16), bits, out)


def _unpack_pairs(packed: NDArray[np.uint8], bits: int, out: NDArray[np.uint8]) -> None:
    """The inverse of `_pack_pairs`."""
    from core.tensors.kernels import cpu_packing_jit

    width = _EIGHT // 2
    while width > bits:
        parted = np.empty(packed.size * 2, np.uint8)
        cpu_packing_jit.unpack_pairs(packed, width, parted.view(np.uint16))
        packed, width = parted, width // 2
    cpu_packing_jit.unpack_pairs(packed, width, out.view(np.uint16))


def _add(packed: NDArray[np.uint8], layout: GroupLayout, factor: int, codes: NDArray[np.uint8]) -> None:
    """codes += factor * digit."""
    from core.tensors.kernels import cpu_packing_jit

    bits = _bits(layout)
    if layout.width == 0:
        return
    if layout.width == layout.group:
        codes += packed[: codes.size] * np.uint8(factor)
    elif bits is not None:
        codes += _unpack_bits(packed, bits, codes.size) * np.uint8(factor)
    elif layout.width == 1:
        places = layout.radix ** np.arange(layout.group)
        digits = (np.arange(256)[:, None] // places % layout.radix * factor).astype(np.uint8)
        words = codes.size // (_FIVE * _EIGHT) if layout.group == _FIVE else 0
        if words:
            wide = (digits.astype(np.uint64) << (np.arange(_FIVE, dtype=np.uint64) * np.uint64(_EIGHT))).sum(axis=1)
            cpu_packing_jit.add_fives(packed, wide, codes[: words * _FIVE * _EIGHT].view(np.uint64))
        cpu_packing_jit.add_bytes(packed[words * _EIGHT :], digits, codes[words * _FIVE * _EIGHT :])
    else:
        cpu_packing_jit.add_digits(packed, layout.radix, layout.group, layout.width, factor, codes)


def _unpack_bits(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    from core.tensors.kernels import cpu_packing_jit

    eights = count // _EIGHT
    out, end = np.empty((eights + 1) * _EIGHT, np.uint8), np.zeros(bits, np.uint8)
    end[: packed.size - eights * bits] = packed[eights * bits :]
    whole, rest = out[: eights * _EIGHT], out[eights * _EIGHT :]
    for source, target in ((packed[: eights * bits], whole), (end, rest)):
        if bits in _PAIRED:
            _unpack_pairs(source, bits, target)
        else:
            cpu_packing_jit.unpack_bits(source, bits, target.view(np.uint64))
    return out[:count]
