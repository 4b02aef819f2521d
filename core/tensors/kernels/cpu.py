"""Encoding and decoding of pieces on the CPU: the door from torch tensors to the compiled loops.

Equal bit for bit to the torch functions of `core.tensors`, many times as fast; a piece takes the memory of its codes
and, for some formats, of one copy in fp32. Knows blocks, scales, limits and codes; no recipes, files or names of
formats. numba is imported, and a loop compiled or fetched from its cache on disk, when it is first used. The loops let
go of the interpreter lock and share nothing, so `over_pieces` runs pieces on as many threads as torch has.

Blocks of a piece: `width` elements share a scale, every `columns` elements the count starts anew, and the last block of
a row may be shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from core.tensors.kernels.cpu_rule import Method, RoundingRule

Bits = NDArray[np.signedinteger[Any]]
Starts = NDArray[np.uint64]
PieceOfWork = TypeVar("PieceOfWork")
Result = TypeVar("Result")

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_MOST_CODES = 256
OUTPUTS = (torch.float32, torch.bfloat16)
_ROOM = 32  # elements that COUNT reads and codes that it writes beyond the piece


@dataclass(frozen=True)
class BlockStatistics:
    """Of each block: `extreme` fp32, `squares` fp64 or None; `not_finite`: index of the first NaN or infinity.

    With a `not_finite` there are no numbers to be relied on.
    """

    extreme: torch.Tensor
    squares: torch.Tensor | None
    not_finite: int | None


def supports(dtype: torch.dtype, codes: int) -> bool:
    """Whether these kernels work on weights of that dtype and formats of that many codes (on the CPU)."""
    return dtype in _KINDS and codes <= _MOST_CODES


def statistics(piece: torch.Tensor, columns: int, width: int, statistic: str) -> BlockStatistics:
    """Statistic of each block of a flat piece: absmax, signmax, or under rms absmax and sums of squares.

    signmax: the first of equal magnitudes gives the sign. Zeros give +0. Squares: fp64; neighbours are added in pairs
    until one number is left, an odd one out stays as it is.
    """
    from core.tensors.kernels import cpu_jit

    bits, starts = _bits(piece), _starts(piece.numel(), columns, width)
    mask, infinity = int(np.iinfo(bits.dtype).max), _INFINITY[piece.dtype]
    found = np.empty(starts.size - 1, bits.dtype)
    kernel = cpu_jit.block_signmax if statistic == "signmax" else cpu_jit.block_absmax
    largest = kernel(bits, starts, mask, found)
    extreme = torch.from_numpy(found).view(piece.dtype).float()
    if largest >= infinity:
        return BlockStatistics(extreme, None, int(cpu_jit.first_not_finite(bits, mask, infinity)))
    return BlockStatistics(extreme, _squares(piece, starts) if statistic == "rms" else None, None)


def encode_codes(
    flat: torch.Tensor, start: int, stop: int, scales: torch.Tensor, rule: RoundingRule, columns: int, width: int
) -> torch.Tensor:
    """Stored codes of `flat[start:stop]`, uint8: #{k : x > limit k at the block's scale}, translated as `rule` says.

    `scales`: decoded, fp32, one per block of the piece. Where one is negative, x and it change sign; where it is 0, the
    code is that of the value nearest to 0. All elements must be finite. `flat` may reach beyond the piece, which saves
    a copy: what follows is read and never used.
    """
    codes = torch.empty(stop - start + _ROOM, dtype=torch.uint8)
    starts, factors = _starts(stop - start, columns, width), scales.contiguous().numpy()
    if rule.method is Method.COUNT:
        _count(flat, start, stop, starts, factors, rule, codes.numpy())
    else:
        _round(_wide(flat[start:stop]), starts, factors, rule, codes.numpy())
    found = codes[: stop - start]
    if rule.stored is not None:
        from core.tensors.kernels import cpu_packing_jit

        cpu_packing_jit.replace_codes(found.numpy(), rule.stored)
    return found


def decode(
    codes: torch.Tensor, table: torch.Tensor, scales: torch.Tensor, columns: int, width: int, out: torch.Tensor
) -> None:
    """fl32(table[code] * scale) of a flat piece of stored codes (uint8) to `out`: fp32, or rounded once to bf16.

    `table`: fp32, by stored code, at most 256; larger codes decode as its last value. `scales`: decoded, fp32, one per
    block of the piece. `out`: flat, contiguous.
    """
    from core.tensors.kernels import cpu_jit

    starts, values, factors = _starts(codes.numel(), columns, width), table.numpy(), scales.contiguous().numpy()
    filling = np.full(_MOST_CODES - values.size, values[-1], np.float32)
    whole, steps = np.concatenate((values, filling)), _even_steps(values)
    if out.dtype is torch.bfloat16:
        cpu_jit.decode_bf16(codes.numpy(), starts, whole, factors, out.view(torch.int16).numpy())
    elif steps is not None:
        cpu_jit.decode_steps(codes.numpy(), starts, *steps, values.size - 1, factors, out.numpy())
    else:
        cpu_jit.decode_values(codes.numpy(), starts, whole, factors, out.numpy())


def over_pieces(work: Callable[[PieceOfWork], Result], pieces: Iterable[PieceOfWork]) -> list[Result]:
    """`work` of each piece, in order, on torch's number of threads."""
    threads, todo = torch.get_num_threads(), list(pieces)
    if threads == 1 or len(todo) < 2:
        return [work(piece) for piece in todo]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, todo))


def _bits(values: torch.Tensor) -> Bits:
    """The patterns of a flat contiguous tensor, without a copy."""
    return values.view(torch.int32 if values.dtype is torch.float32 else torch.int16).numpy()


@lru_cache(maxsize=8)
def _starts(count: int, columns: int, width: int) -> Starts:
    """Where the blocks of `count` elements start, and where the last one ends."""
    rows = np.arange(0, count, columns, dtype=np.uint64)
    starts = (rows[:, None] + np.arange(0, columns, width, dtype=np.uint64)).reshape(-1)
    return np.append(starts[starts < count], np.uint64(count))


def _wide(piece: torch.Tensor) -> NDArray[np.float32]:
    """The finite elements of a piece in fp32; a copy only of 16-bit ones."""
    from core.tensors.kernels import cpu_packing_jit

    if piece.dtype is torch.float32:
        return piece.numpy()
    patterns = np.empty(piece.numel(), np.int32)
    cpu_packing_jit.widen(_bits(piece), piece.dtype is torch.float16, patterns)
    return patterns.view(np.float32)


def _squares(piece: torch.Tensor, starts: Starts) -> torch.Tensor:
    from core.tensors.kernels import cpu_jit

    part = np.uint64(cpu_jit.PART)
    parts = int(((starts[1:] - starts[:-1] + part - np.uint64(1)) // part).sum())
    sums, out = np.empty(parts + cpu_jit.PART), np.empty(starts.size - 1)
    cpu_jit.block_squares(_wide(piece), starts, sums, out)
    return torch.from_numpy(out)


def _count(
    flat: torch.Tensor,
    start: int,
    stop: int,
    starts: Starts,
    scales: NDArray[np.float32],
    rule: RoundingRule,
    codes: NDArray[np.uint8],
) -> None:
    from core.tensors.kernels import cpu_jit

    fits = stop + _ROOM <= flat.numel()
    roomy = flat[start : stop + _ROOM] if fits else torch.cat((flat[start:stop], flat.new_zeros(_ROOM)))
    kind, ties = _KINDS[flat.dtype], rule.upper_on_tie
    cpu_jit.counted_codes(_bits(roomy), starts, kind, scales, rule.limits, ties, rule.exact, rule.zero, codes)


def _round(
    numbers: NDArray[np.float32],
    starts: Starts,
    scales: NDArray[np.float32],
    rule: RoundingRule,
    codes: NDArray[np.uint8],
) -> None:
    from core.tensors.kernels import cpu_jit

    if rule.method is Method.GRID:
        cpu_jit.grid_codes(numbers, starts, scales, rule.numbers, rule.zero, codes)
    elif rule.method is Method.FLOAT:
        mantissa, least, last, sign = (int(number) for number in rule.numbers)
        cpu_jit.float_codes(numbers, starts, scales, rule.quotients, mantissa, least, last, sign, codes)
    else:
        cpu_jit.guided_codes(numbers, starts, scales, rule.limits, rule.guide, rule.numbers, rule.zero, codes)


def _even_steps(values: NDArray[np.float32]) -> tuple[float, float] | None:
    """First value and step of a table that they give without rounding."""
    if values.size < 2:
        return None
    first, step = float(values[0]), float(values[1] - values[0])
    even = np.float32(first) + np.float32(step) * np.arange(values.size, dtype=np.float32)
    return (first, step) if np.array_equal(even, values) else None
