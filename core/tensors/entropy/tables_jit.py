"""Compiled loops around the entropy coder's steps: checksum, tables of a model, frequencies as bits, passes over codes.

Nothing here trusts what it reads: each read is compared with the end that it was given. `core.tensors.kernels.cpu_jit`
explains the style.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from core.tensors.entropy.loops_jit import Bytes, Longs, Numbers, Table16, Table32
from core.tensors.kernels.cpu_jit import compiled, inlined

_W = np.uint32
_P1, _P2, _P3, _P4, _P5 = 2654435761, 2246822519, 3266489917, 668265263, 374761393
_LONGEST = 16  # zeros of a gamma code: larger numbers do not occur
_SCANNED = 1024  # codes that are looked at together
_COUNTERS = 4  # so that equal codes do not wait for each other
_SIDE = np.uint64(64)  # of a tile


@inlined
def _rotated(value: np.uint32, by: int) -> np.uint32:
    return _W(_W(value << _W(by)) | _W(value >> _W(32 - by)))


@inlined
def _round(total: np.uint32, word: np.uint32) -> np.uint32:
    return _W(_rotated(_W(total + _W(word * _W(_P2))), 13) * _W(_P1))


@compiled
def xxh32(data: Bytes, words: Table32, start: int, stop: int, seed: int) -> int:
    """XXH32 of data[start:stop] (the public specification); `words` is `data` seen as 32-bit numbers, start % 4 = 0."""
    at = start // 4
    if stop - start >= 16:
        a, b = _W(_W(seed) + _W(_W(_P1) + _W(_P2))), _W(_W(seed) + _W(_P2))
        c, d = _W(seed), _W(_W(seed) - _W(_P1))
        for _ in range((stop - start) // 16):
            a, b = _round(a, words[at]), _round(b, words[at + 1])
            c, d = _round(c, words[at + 2]), _round(d, words[at + 3])
            at += 4
        found = _W(_W(_rotated(a, 1) + _rotated(b, 7)) + _W(_rotated(c, 12) + _rotated(d, 18)))
    else:
        found = _W(_W(seed) + _W(_P5))
    found = _W(found + _W(stop - start))
    for i in range(at, stop // 4):
        found = _W(_rotated(_W(found + _W(words[i] * _W(_P3))), 17) * _W(_P4))
    for i in range(stop // 4 * 4, stop):
        found = _W(_rotated(_W(found + _W(_W(data[i]) * _W(_P5))), 11) * _W(_P1))
    found = _W(_W(found ^ (found >> _W(15))) * _W(_P2))
    found = _W(_W(found ^ (found >> _W(13))) * _W(_P3))
    return int(found ^ (found >> _W(16)))


@compiled
def alias_table(frequencies: Longs, precision: int, table: Table16) -> None:
    """Alias tables of a model (Walker 1977, Vose 1991): table (5, buckets).

    Its rows: threshold, alias, what is added to a slot's place for its rank below and from the threshold on, frequency.
    The order in which buckets are filled belongs to the format: ascending stacks, the small one filled from the top of
    the large one.
    """
    buckets = table.shape[1]
    room = (1 << precision) // buckets
    left, next_rank = np.zeros(buckets, np.int64), np.zeros(buckets, np.int64)
    left[: frequencies.size] = frequencies
    small, large, smalls, larges = np.empty(buckets, np.int64), np.empty(buckets, np.int64), 0, 0
    for b in range(buckets):
        table[0, b], table[1, b], table[4, b] = room, b, left[b]
        if left[b] < room:
            small[smalls] = b
            smalls += 1
        elif left[b] > room:
            large[larges] = b
            larges += 1
    while smalls > 0:
        smalls -= 1
        b, lender = small[smalls], large[larges - 1]
        table[0, b], table[1, b] = left[b], lender
        left[lender] -= room - left[b]
        if left[lender] <= room:
            larges -= 1
            if left[lender] < room:
                small[smalls] = lender
                smalls += 1
    for b in range(buckets):
        own, other = np.int64(table[0, b]), np.int64(table[1, b])
        table[2, b] = next_rank[b]
        next_rank[b] += own
        table[3, b] = np.uint16((next_rank[other] - own) & 0xFFFF)
        next_rank[other] += room - own


@compiled
def alias_entries(table: Table16, entries: Table32) -> None:
    """(symbol << 16) + rank of each slot, by alias tables."""
    room = entries.size // table.shape[1]
    for slot in range(entries.size):
        b, low = slot // room, slot % room
        if low < table[0, b]:
            entries[slot] = (_W(b) << _W(16)) | _W((low + np.int64(table[2, b])) & 0xFFFF)
        else:
            entries[slot] = (_W(table[1, b]) << _W(16)) | _W((low + np.int64(table[3, b])) & 0xFFFF)


@compiled
def direct_entries(frequencies: Longs, entries: Table32) -> None:
    """(symbol << 16) + rank of each slot, symbols one after the other."""
    slot = 0
    for symbol in range(frequencies.size):
        for rank in range(frequencies[symbol]):
            entries[slot] = (_W(symbol) << _W(16)) | _W(rank)
            slot += 1


@compiled
def slots_of(entries: Table32, bases: Table32, slots: Table16) -> None:
    """The inverse: the slot of rank r of symbol s in slots[bases[s] + r]."""
    for slot in range(entries.size):
        slots[bases[entries[slot] >> _W(16)] + (entries[slot] & _W(0xFFFF))] = slot


@inlined
def _gamma_written(out: Bytes, at: int, value: int) -> int:
    length = 0
    while value >> (length + 1):
        length += 1
    return _bits_written(out, at + length, ((value << 1) | 1) & ((2 << length) - 1), length + 1)


@inlined
def _bits_written(out: Bytes, at: int, value: int, width: int) -> int:
    for i in range(width):
        out[(at + i) >> 3] |= np.uint8(((value >> i) & 1) << ((at + i) & 7))
    return at + width


@inlined
def _bits_read(data: Bytes, at: int, width: int) -> int:
    """Zeros beyond the end: the caller compares the position."""
    value = np.int64(0)
    for i in range(width):
        if (at + i) >> 3 < data.size:
            value |= ((np.int64(data[(at + i) >> 3]) >> ((at + i) & 7)) & 1) << i
    return int(value)


@inlined
def _gamma_length(data: Bytes, at: int) -> int:
    """Zeros before the next one; _LONGEST + 1 where there are more, or the data ends."""
    length = 0
    while length <= _LONGEST and _bits_read(data, at + length, 1) == 0:
        length += 1
    return length


@compiled
def write_frequencies(frequencies: Longs, peak: int, kept: int, out: Bytes) -> int:
    """Frequencies but the peak's as bits of zeroed `out` (`layout` has the code); how many bits.

    `out` needs eight bytes a symbol and eight more.
    """
    at, before, i = 0, 1, 0
    while i < frequencies.size:
        value, length = int(frequencies[i]), 0
        while value >> length:
            length += 1
        if i != peak:
            step = length - before
            at = _gamma_written(out, at, 1 + (2 * step if step >= 0 else -2 * step - 1))
        if i != peak and length == 0:
            run = 1
            while i + 1 < frequencies.size and (frequencies[i + 1] == 0 or i + 1 == peak):
                i += 1
                run += 1 if i != peak else 0
            at = _gamma_written(out, at, run)
        elif i != peak:
            width = min(kept, length)
            at = _bits_written(out, at, (value >> (length - width)) & ((1 << (width - 1)) - 1), width - 1)
            before = length
        i += 1
    return at


@compiled
def read_frequencies(data: Bytes, start: int, peak: int, precision: int, kept: int, out: Longs) -> int:
    """The inverse, from byte `start` on; the byte after the last one, or -1 where no frequencies are written there."""
    at, before, run, total = 8 * start, 1, 0, 0
    for i in range(out.size):
        out[i] = 0
        if i == peak:
            continue
        if run:
            run -= 1
            continue
        width = _gamma_length(data, at)
        if width > _LONGEST:
            return -1
        step = (_bits_read(data, at + width + 1, width) | (1 << width)) - 1
        at += 2 * width + 1
        length = before + (step // 2 if step % 2 == 0 else -(step + 1) // 2)
        if length < 0 or length > precision:
            return -1
        if length == 0:
            width = _gamma_length(data, at)
            if width > _LONGEST:
                return -1
            run = (_bits_read(data, at + width + 1, width) | (1 << width)) - 1
            at += 2 * width + 1
        else:
            width = min(kept, length)
            out[i] = ((1 << (width - 1)) | _bits_read(data, at, width - 1)) << (length - width)
            at += width - 1
            before = length
        total += out[i]
    if run or at > 8 * data.size or total >= 1 << precision:
        return -1
    out[peak] = (1 << precision) - total
    return (at + 7) // 8


@compiled
def count_codes(codes: Numbers, low: int, counts: Longs) -> None:
    """Adds to counts[z - low] for each code z; all must be inside."""
    parts, size = np.zeros((_COUNTERS, counts.size), np.int64), np.uint64(codes.size)
    whole = size - size % np.uint64(_COUNTERS)
    for i in range(np.uint64(0), whole, np.uint64(_COUNTERS)):
        for j in range(np.uint64(_COUNTERS)):
            parts[j, np.uint64(np.int64(codes[i + j]) - low)] += 1
    for i in range(whole, size):
        parts[0, np.uint64(np.int64(codes[i]) - low)] += 1
    for j in range(_COUNTERS):
        for k in range(counts.size):
            counts[k] += parts[j, k]


@compiled
def count_groups(lines: Numbers, width: int, centre: int, reach: int, counts: NDArray[np.float64]) -> None:
    """Adds to counts[g, |z - centre|] for each number z of the lines of group g, `reach` where that is more."""
    found, length = np.zeros(2 * reach + 1, np.int64), np.uint64(lines.shape[1])
    for line in range(np.uint64(lines.shape[0])):
        for i in range(length):
            near = min(max(np.int64(lines[line, i]) - centre, np.int64(-reach)), np.int64(reach))
            found[np.uint64(near + reach)] += 1
        group = line // np.uint64(width)
        for k in range(found.size):
            counts[group, abs(k - reach)] += found[k]
            found[k] = 0


@compiled
def transpose(matrix: Numbers, out: Numbers) -> None:
    """out[j, i] = matrix[i, j], through tiles: columns of powers of two fall on the same lines of a cache."""
    tile = np.empty((_SIDE, _SIDE), matrix.dtype)
    rows, columns = np.uint64(matrix.shape[0]), np.uint64(matrix.shape[1])
    for row in range(np.uint64(0), rows, _SIDE):
        for column in range(np.uint64(0), columns, _SIDE):
            high, wide = min(_SIDE, rows - row), min(_SIDE, columns - column)
            for i in range(high):
                for j in range(wide):
                    tile[i, j] = matrix[row + i, column + j]
            for j in range(wide):
                for i in range(high):
                    out[column + j, row + i] = tile[i, j]


@compiled
def to_indices(
    codes: Numbers, low: int, frequencies: Table32, values: int, escape: int, indices: Numbers, escaped: Longs
) -> int:
    """indices[i] = codes[i] - low, or `escape` where that is not in [0, values) or has frequency 0; how many there are.

    Those codes go to `escaped`, in order; no more than fit are written.
    """
    found, cast_, wide = 0, indices.dtype.type, np.int32
    is_complete = frequencies[: np.int64(values)].min() > 0 if values else False
    for start in range(np.uint64(0), np.uint64(codes.size), np.uint64(_SCANNED)):
        stop = min(start + np.uint64(_SCANNED), np.uint64(codes.size))
        outside: np.bool_ = np.bool_(False)
        for i in range(start, stop):
            code = wide(codes[i])
            outside |= (code < wide(low)) | (code > wide(low + values - 1))
            indices[i] = cast_(wide(code - wide(low)))
        for i in range(start, stop if outside or not is_complete else start):
            place_ = np.int64(codes[i]) - low
            if not 0 <= place_ < values or frequencies[place_] == 0:
                indices[i] = escape
                if found < escaped.size:
                    escaped[found] = codes[i]
                found += 1
    return found


@compiled
def put_escapes(out: Numbers, mark: int, values: Longs) -> int:
    """Replaces each `mark` in `out` by the next value; how many there are, -1 where there are more than values."""
    cast_, found = out.dtype.type, 0
    wanted = cast_(mark)
    for start in range(np.uint64(0), np.uint64(out.size), np.uint64(_SCANNED)):
        stop, is_there = min(start + np.uint64(_SCANNED), np.uint64(out.size)), False
        for i in range(start, stop):
            is_there |= out[i] == wanted
        for i in range(start, stop if is_there else start):
            if out[i] == wanted:
                if found == values.size:
                    return -1
                out[i] = cast_(values[found])
                found += 1
    return found
