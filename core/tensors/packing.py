"""Packing codes into bytes and back: the torch side of the layout that `core.formats.stored` documents.

Both directions work on any device, take codes in pieces that start at whole groups, and are exact inverses.
"""

from __future__ import annotations

import torch

from core.formats.stored import GroupLayout, planes

_NIBBLES = 16


def pack(codes: torch.Tensor, layout: GroupLayout) -> torch.Tensor:
    """Codes (n,) of any integer dtype below `layout.radix` -> bytes (layout.nbytes(n),) uint8."""
    if layout.width == layout.group:  # radix 256, or a radix that leaves nothing to gain
        return codes.to(torch.uint8)
    if layout.radix == _NIBBLES:
        return _pack_nibbles(codes)
    count = codes.numel()
    groups = -(-count // layout.group)
    padded = torch.zeros(groups * layout.group, dtype=torch.int64, device=codes.device)
    padded[:count] = codes
    digits = padded.view(groups, layout.group)
    words = digits[:, layout.group - 1].clone()
    for place in range(layout.group - 2, -1, -1):
        words.mul_(layout.radix).add_(digits[:, place])
    return _bytes_of(words, layout.width).reshape(-1)[: layout.nbytes(count)]


def unpack(data: torch.Tensor, layout: GroupLayout, count: int) -> torch.Tensor:
    """The first `count` codes of packed bytes, uint8."""
    if layout.width == 0:
        return torch.zeros(count, dtype=torch.uint8, device=data.device)
    if layout.width == layout.group:
        return data[:count]
    if layout.radix == _NIBBLES:
        return torch.stack((data & 15, data >> 4), dim=1).reshape(-1)[:count]
    groups = -(-count // layout.group)
    padded = torch.zeros(groups * layout.width, dtype=torch.uint8, device=data.device)
    padded[: data.numel()] = data
    return _digits(_words_of(padded.view(groups, layout.width)), layout).reshape(-1)[:count]


def pack_planes(codes: torch.Tensor, radix: int) -> list[torch.Tensor]:
    """Codes of a format with `radix` of them, as one packed piece per plane."""
    layouts = planes(radix)
    if len(layouts) == 1:
        return [pack(codes, layouts[0])]
    high = torch.div(codes, layouts[0].radix, rounding_mode="floor")
    return [pack(codes - high * layouts[0].radix, layouts[0]), pack(high, layouts[1])]


def unpack_planes(pieces: list[torch.Tensor], radix: int, count: int) -> torch.Tensor:
    """The inverse: uint8, or int32 for more than 256 codes."""
    layouts = planes(radix)
    low = unpack(pieces[0], layouts[0], count)
    if len(layouts) == 1:
        return low
    kind = torch.uint8 if radix <= 256 else torch.int32
    return low.to(kind) + unpack(pieces[1], layouts[1], count).to(kind) * layouts[0].radix


def _pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    small = codes.to(torch.uint8)
    if small.numel() % 2:
        small = torch.cat((small, small.new_zeros(1)))
    return small[0::2] | (small[1::2] << 4)


def _bytes_of(words: torch.Tensor, width: int) -> torch.Tensor:
    """int64 (g,) -> their lowest bytes (g, width), little-endian."""
    return torch.stack([(words >> (8 * place)).to(torch.uint8) for place in range(width)], dim=1)


def _words_of(data: torch.Tensor) -> torch.Tensor:
    """uint8 (g, width) -> int64 (g,)."""
    words = data[:, 0].to(torch.int64)
    for place in range(1, data.shape[1]):
        words |= data[:, place].to(torch.int64) << (8 * place)
    return words


def _digits(words: torch.Tensor, layout: GroupLayout) -> torch.Tensor:
    """int64 (g,) -> digits (g, group) uint8; the words are used up."""
    digits = torch.empty((words.numel(), layout.group), dtype=torch.uint8, device=words.device)
    shift = layout.radix.bit_length() - 1
    is_power = layout.radix == 1 << shift
    for place in range(layout.group):
        if is_power:
            digits[:, place] = words & (layout.radix - 1)
            words >>= shift
        else:
            higher = torch.div(words, layout.radix, rounding_mode="floor")
            digits[:, place] = words - higher * layout.radix
            words = higher
    return digits
