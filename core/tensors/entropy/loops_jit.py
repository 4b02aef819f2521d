"""The rANS steps that run everywhere, compiled by numba: the definition of what is written and read.

`avx512_jit` has the same steps for machines with wide vectors, bit for bit. Words are read and written as two bytes, so
that no alignment and no byte order of the machine matters; each read is compared with the end of the data.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.tensors.kernels.cpu_jit import compiled

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.integer[Any]]
Table16 = NDArray[np.uint16]
Table32 = NDArray[np.uint32]
Longs = NDArray[np.int64]

_W = np.uint32


@compiled
def decode_steps(
    data: Bytes,
    at: int,
    states: Table32,
    precision: int,
    entries: Table32,
    frequencies: Table32,
    low: int,
    out: Numbers,
    first: int,
    count: int,
) -> int:
    """`count` symbols into out[first:], words read from data[at:]; the next position, or -1: the data ended before.

    `out` is unsigned or wide; `low` is added modulo its width. The last step may be a part of one: all lanes take it.
    """
    cast_ = out.dtype.type
    mask, shift, added = _W((1 << precision) - 1), _W(precision), cast_(low)
    here, target, lanes, one = np.uint64(at), np.uint64(first), np.uint64(states.size), np.uint64(1)
    last, beyond = np.uint64(data.size), np.uint64(first + count)
    while target < beyond:
        is_easy = here + (lanes << one) <= last and target + lanes <= beyond
        for lane in range(lanes):
            state = states[lane]
            entry = entries[state & mask]
            symbol = entry >> _W(16)
            state = _W(_W(frequencies[symbol] * (state >> shift)) + (entry & _W(0xFFFF)))
            needs = _W(state < _W(0x10000))
            if is_easy or (needs == 1 and here + np.uint64(2) <= last):
                word = _W(data[here]) | (_W(data[here + one]) << _W(8))
                state = _W(state << (needs << _W(4))) | _W(word & _W(_W(0) - needs))
            elif needs == 1:
                return -1
            here += np.uint64(needs) << one
            states[lane] = state
            if is_easy or target + lane < beyond:
                out[target + lane] = cast_(cast_(symbol) + added)
        target += lanes
    return int(here)


@compiled
def encode_steps(
    indices: Numbers,
    steps: int,
    states: Table32,
    precision: int,
    frequencies: Table32,
    bases: Table32,
    slots: Table16,
    words: Bytes,
    at: int,
) -> int:
    """The steps of indices[: steps * lanes], last to first; words are written before words[at]; the new end.

    `words` must have room for two bytes a symbol. No frequency of an index may be 0.
    """
    shift = np.uint64(precision)
    for step in range(steps - 1, -1, -1):
        for lane in range(states.size - 1, -1, -1):
            symbol = indices[step * states.size + lane]
            frequency, state = np.uint64(frequencies[symbol]), np.uint64(states[lane])
            if state >= frequency << np.uint64(32 - precision):
                at -= 2
                words[at], words[at + 1] = (
                    np.uint8(state & np.uint64(255)),
                    np.uint8((state >> np.uint64(8)) & np.uint64(255)),
                )
                state >>= np.uint64(16)
            quotient = _W(state) // _W(frequency)
            rank = _W(state) - _W(quotient * _W(frequency))
            states[lane] = _W(quotient << _W(shift)) | _W(slots[bases[symbol] + rank])
    return at
