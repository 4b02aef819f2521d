"""Canonical Huffman codes of limited length: what symbol-by-symbol codes of whole bits cost, for comparison.

    u8 version = 1, varint N, signed varint low, varint n (1..4096), n lengths of 4 bits (0: does not occur)
    the codes of the numbers, the first bit of each code in the lowest free bit, filled up with zeros
    u32 XXH32 of all of that

Codes are canonical: shorter ones before longer ones, equal lengths in the order of the numbers, no longer than 15 bits.
Where all numbers are the same (n = 1), the length is 0 and there are no codes.
"""

from __future__ import annotations

import numpy as np

from core.errors import InvalidCheckpoint, InvalidFormat
from core.tensors.entropy import layout
from core.tensors.entropy.decoder import DType
from core.tensors.entropy.layout import Reader
from core.tensors.entropy.loops_jit import Bytes, Longs, Numbers, Table32
from core.tensors.entropy.models import MOST_SYMBOLS
from core.tensors.entropy.windows import counted

VERSION = 1
LONGEST = 15


def code_lengths(counts: Longs, longest: int = LONGEST) -> Longs:
    """Lengths of least total among prefix codes of at most `longest` bits; 0 where the count is 0, never elsewhere.

    Package-merge (Larmore and Hirschberg 1990). InvalidFormat where 2^longest symbols are too few.
    """
    used = np.flatnonzero(counts)
    lengths = np.zeros(counts.size, np.int64)
    if used.size > 1 << longest:
        raise InvalidFormat(f"{used.size} symbols in codes of {longest} bits")
    if used.size <= 1:
        lengths[used] = 1
        return lengths
    leaves = sorted((int(counts[symbol]), (int(symbol),)) for symbol in used)
    packages: list[tuple[int, tuple[int, ...]]] = list(leaves)
    for _ in range(longest - 1):
        pairs = zip(packages[::2], packages[1::2], strict=False)
        packages = sorted([*leaves, *((a[0] + b[0], a[1] + b[1]) for a, b in pairs)])
    for _, symbols in packages[: 2 * used.size - 2]:
        lengths += np.bincount(symbols, minlength=counts.size)
    return lengths


def huffman_encode(codes: Numbers) -> Bytes:
    """Bytes of integers that span at most 4096 values; InvalidFormat for others."""
    from core.tensors.entropy.huffman_jit import encode_codes

    flat = np.ascontiguousarray(codes).reshape(-1)
    if flat.size == 0:
        flat = np.zeros(0, np.int64)
        values, counts = np.zeros(1, np.int64), np.zeros(1, np.int64)
    else:
        values, counts = counted(flat)
    low, size = int(values[0]), int(values[-1] - values[0]) + 1
    if size > MOST_SYMBOLS:
        raise InvalidFormat(f"{size} values in a Huffman code", hint=f"at most {MOST_SYMBOLS}")
    dense = np.zeros(size, np.int64)
    dense[values - low] = counts
    lengths = code_lengths(dense) if size > 1 else np.zeros(1, np.int64)
    start = bytes([VERSION]) + layout.varint(flat.size) + layout.signed(low) + layout.varint(size) + _nibbles(lengths)
    out = np.zeros(-(-int(np.dot(dense, lengths)) // 8), np.uint8)
    encode_codes(flat, low, lengths, reversed_codes(lengths), out)
    return layout.sealed(start + out.tobytes())


def huffman_decode(data: Bytes | bytes, count: int, dtype: DType = np.int32) -> Numbers:
    """The `count` integers; InvalidCheckpoint where the bytes hold no such sequence or they do not fit."""
    from core.tensors.entropy.huffman_jit import decode_codes

    data = np.frombuffer(bytearray(data), np.uint8) if isinstance(data, bytes) else data
    reader = Reader(data)
    if reader.byte() != VERSION or reader.varint(layout.MOST_NUMBERS, "number of integers") != count:
        raise InvalidCheckpoint(f"no Huffman code of {count} integers")
    low, size = reader.signed("smallest number"), reader.varint(MOST_SYMBOLS, "number of symbols")
    stop, half = data.size - layout.CHECKSUM_BYTES, -(-size // 2)
    limits = np.iinfo(dtype)
    if reader.at + half > stop or not 0 < size <= limits.max - low + 1 or low < limits.min:
        raise InvalidCheckpoint(f"a Huffman code of {size} numbers from {low} in {data.size} bytes")
    if layout.checksum(data[:stop].copy()) != int.from_bytes(data[stop:].tobytes(), "little"):
        raise InvalidCheckpoint("Huffman-coded data are damaged: the checksum differs")
    packed = data[reader.at : reader.at + half]
    lengths = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[:size].astype(np.int64)
    if size == 1:
        if lengths[0] or reader.at + half != stop:
            raise InvalidCheckpoint("Huffman-coded data of one number that take bits")
        return np.full(count, low, dtype)
    out, table = np.empty(count, dtype), lookup_table(lengths)
    used = decode_codes(data[reader.at + half : stop].copy(), table, low, out)
    if used < 0 or -(-used // 8) != stop - reader.at - half:
        raise InvalidCheckpoint("Huffman-coded data are damaged: they do not end where they should")
    return out


def _nibbles(lengths: Longs) -> bytes:
    padded = np.append(lengths, np.zeros(lengths.size % 2, np.int64)).astype(np.uint8)
    return (padded[::2] | (padded[1::2] << 4)).astype(np.uint8).tobytes()


def reversed_codes(lengths: Longs) -> Table32:
    """Canonical codes, first bit lowest; InvalidCheckpoint where there is no prefix code of these lengths."""
    codes, code = np.zeros(lengths.size, np.uint32), 0
    for length in range(1, LONGEST + 1):
        code <<= 1
        for symbol in np.flatnonzero(lengths == length).tolist():
            if code >> length:
                raise InvalidCheckpoint("Huffman codes of impossible lengths")
            codes[symbol] = int(f"{code:0{length}b}"[::-1], 2)
            code += 1
    return codes


def lookup_table(lengths: Longs) -> Table32:
    """symbol + (length << 16) for each value of the next LONGEST bits; 0 where no code begins so."""
    table = np.zeros(1 << LONGEST, np.uint32)
    for symbol, code in enumerate(reversed_codes(lengths).tolist()):
        if length := int(lengths[symbol]):
            table[code :: 1 << length] = symbol | (length << 16)
    return table
