"""The compiled loops of the Huffman code; `huffman` documents the bytes."""

from __future__ import annotations

import numpy as np

from core.tensors.entropy.loops_jit import Bytes, Longs, Numbers, Table32
from core.tensors.kernels.cpu_jit import compiled

_LONGEST = 15
_U = np.uint64


@compiled
def encode_codes(numbers: Numbers, low: int, lengths: Longs, codes: Table32, out: Bytes) -> None:
    """Codes of the numbers, one after the other, into `out`, which has just the room."""
    held, width, at = _U(0), 0, 0
    for i in range(numbers.size):
        symbol = np.int64(numbers[i]) - low
        held |= _U(codes[symbol]) << _U(width)
        width += lengths[symbol]
        while width >= 8:
            out[at] = np.uint8(held & _U(255))
            held >>= _U(8)
            width -= 8
            at += 1
    if width:
        out[at] = np.uint8(held & _U(255))


@compiled
def decode_codes(data: Bytes, table: Table32, low: int, out: Numbers) -> int:
    """Fills `out`; the bits that were used, -1 where no code stands. Beyond the end zeros are read."""
    held, width, at, used = _U(0), 0, 0, 0
    for i in range(out.size):
        while width < _LONGEST:
            if at < data.size:
                held |= _U(data[at]) << _U(width)
            at += 1
            width += 8
        entry = table[held & _U((1 << _LONGEST) - 1)]
        length = int(entry >> np.uint32(16))
        if length == 0:
            return -1
        out[i] = np.int64(entry & np.uint32(0xFFFF)) + low
        held >>= _U(length)
        width -= length
        used += length
    return used if used <= 8 * data.size else -1
