"""Integers in a fixed number of bits: what is stored where no code is shorter."""

from __future__ import annotations

import numpy as np

from core.errors import InvalidCheckpoint
from core.tensors.entropy import layout
from core.tensors.entropy.layout import Reader
from core.tensors.entropy.loops_jit import Bytes, Longs, Numbers

_PIECE = 1 << 16  # numbers that are packed together: a multiple of 8, so whole bytes
_MOST_WIDTH = 32


def pack_plain(codes: Numbers, limit: int) -> Bytes | None:
    """The plain form of the numbers, or None where it would take `limit` bytes or more."""
    low = int(codes.min())
    width = max(1, (int(codes.max()) - low).bit_length())
    start = layout.head(layout.PLAIN, codes.size) + layout.signed(low) + bytes([width])
    if len(start) + -(-codes.size * width // 8) + layout.CHECKSUM_BYTES >= limit:
        return None
    pieces = []
    for first in range(0, codes.size, _PIECE):
        places = codes[first : first + _PIECE].astype(np.int64) - low
        bits = (places[:, None] >> np.arange(width)) & 1
        pieces.append(np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little").tobytes())
    return layout.sealed(start + b"".join(pieces))


class PlainNumbers:
    """The plain form, read."""

    def __init__(self, reader: Reader, count: int) -> None:
        self.low, self.width, self.start = reader.signed("smallest number"), reader.byte(), reader.at
        needed = self.start + -(-count * self.width // 8) + layout.CHECKSUM_BYTES
        if not 1 <= self.width <= _MOST_WIDTH or needed != reader.data.size:
            raise InvalidCheckpoint(f"{reader.data.size} bytes for {count} numbers of {self.width} bits")
        self.data = reader.data

    def read(self, first: int, stop: int) -> Longs:
        """Numbers first to stop - 1, int64."""
        begin = first // 8 * 8
        raw = self.data[self.start + begin * self.width // 8 : self.start + -(-stop * self.width // 8)]
        bits = np.unpackbits(raw, bitorder="little")[: (stop - begin) * self.width]
        places = bits.reshape(-1, self.width).astype(np.int64) @ (np.int64(1) << np.arange(self.width))
        return np.asarray(places[first - begin :] + self.low, np.int64)

    def read_into(self, out: Numbers, first: int) -> None:
        """Numbers from `first` on; InvalidCheckpoint where they do not fit the dtype of `out`."""
        limits = np.iinfo(out.dtype)
        for at in range(0, out.size, _PIECE):
            values = self.read(first + at, first + min(at + _PIECE, out.size))
            if values.min() < limits.min or values.max() > limits.max:
                raise InvalidCheckpoint(f"numbers that do not fit {out.dtype}")
            out[at : at + _PIECE] = values
