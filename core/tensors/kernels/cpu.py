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
Numbers = NDArray[np.integer[Any]]
Starts = NDArray[np.uint64]
PieceOfWork = TypeVar("PieceOfWork")
Result = TypeVar("Result")

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
_MOST_CODES = 256
OUTPUTS = (torch.float32, torch.bfloat16)
ROOM = 32  # elements that COUNT reads and codes that it writes beyond the piece


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
    return dtype in KINDS and codes <= _MOST_CODES


def statistics(piece: torch.Tensor, columns: int, width: int, statistic: str) -> BlockStatistics:
    """Statistic of each block of a flat piece: absmax, signmax, or under rms absmax and sums of squares.

    signmax: the first of equal magnitudes gives the sign. Zeros give +0. Squares: fp64; neighbours are added in pairs
    until one number is left, an odd one out stays as it is.
    """
    from core.tensors.kernels import cpu_jit

    bits, starts = bits_of(piece), starts_of(piece.numel(), columns, width)
    found = np.empty(starts.size - 1, bits.dtype)
    kernel = cpu_jit.block_signmax if statistic == "signmax" else cpu_jit.block_absmax
    largest = kernel(bits, starts, found)
    extreme = torch.from_numpy(found).view(piece.dtype).float()
    if largest >= INFINITY[piece.dtype]:
        return BlockStatistics(extreme, None, first_not_finite(piece))
    squares = _squares(bits, starts, KINDS[piece.dtype], found) if statistic == "rms" else None
    return BlockStatistics(extreme, squares, None)


def first_not_finite(piece: torch.Tensor) -> int:
    """Index of the first NaN or infinity of a flat piece, -1 where there is none."""
    from core.tensors.kernels import cpu_packing_jit

    bits = bits_of(piece)
    return int(cpu_packing_jit.first_not_finite(bits, int(np.iinfo(bits.dtype).max), INFINITY[piece.dtype]))


def encode_codes(
    flat: torch.Tensor, start: int, stop: int, scales: torch.Tensor, rule: RoundingRule, columns: int, width: int
) -> torch.Tensor:
    """Stored codes of `flat[start:stop]`, uint8: #{k : x > limit k at the block's scale}, translated as `rule` says.

    `scales`: decoded, fp32, one per block of the piece. Where one is negative, x and it change sign; where it is 0, the
    code is that of the value nearest to 0. All elements must be finite. `flat` may reach beyond the piece, which saves
    a copy: what follows is read and never used.
    """
    codes = torch.empty(stop - start + ROOM, dtype=torch.uint8)
    starts, factors = starts_of(stop - start, columns, width), scales.contiguous().numpy()
    if rule.method is Method.COUNT:
        _count(flat, start, stop, starts, factors, rule, codes.numpy())
    else:
        _round(_wide(flat[start:stop]), starts, factors, rule, codes.numpy())
    found = codes[: stop - start]
    _translate(found.numpy(), rule)
    return found


def decode(
    codes: torch.Tensor, table: torch.Tensor, scales: torch.Tensor, columns: int, width: int, out: torch.Tensor
) -> None:
    """fl32(table[code] * scale) of a flat piece of stored codes (uint8) to `out`: fp32, or rounded once to bf16.

    `table`: fp32, by stored code, at most 256; larger codes decode as its last value. `scales`: decoded, fp32, one per
    block of the piece. `out`: flat, contiguous.
    """
    from core.tensors.kernels import cpu_decode_jit

    starts, values, factors = starts_of(codes.numel(), columns, width), table.numpy(), scales.contiguous().numpy()
    filling = np.full(_MOST_CODES - values.size, values[-1], np.float32)
    whole, steps = np.concatenate((values, filling)), _even_steps(values)
    if out.dtype is torch.bfloat16:
        few = values.size <= cpu_decode_jit.FEW
        kernel = cpu_decode_jit.decode_few_bf16 if few else cpu_decode_jit.decode_bf16
        kernel(codes.numpy(), starts, whole, factors, out.view(torch.int16).numpy())
    elif steps is not None:
        cpu_decode_jit.decode_steps(codes.numpy(), starts, *steps, values.size - 1, factors, out.numpy())
    else:
        cpu_decode_jit.decode_values(codes.numpy(), starts, whole, factors, out.numpy())


def grid_numbers(
    weights: torch.Tensor,
    scales: torch.Tensor,
    columns: int,
    width: int,
    step: float,
    most: int,
    dtype: type[np.signedinteger[Any]],
) -> Bits:
    """rint(weight / (scale * step)) of a flat piece, in `dtype` and within +-most; 0 under a scale of 0."""
    from core.tensors.kernels import cpu_grid_jit

    numbers, starts = np.empty(weights.numel(), dtype), starts_of(weights.numel(), columns, width)
    cpu_grid_jit.grid_numbers(_wide(weights), starts, scales.contiguous().numpy(), step, float(most), numbers)
    return numbers


def grid_sums(
    weights: torch.Tensor, scales: torch.Tensor, columns: int, width: int, step: float, numbers: Numbers, cells: int
) -> NDArray[np.float64]:
    """Of each cell, |k| = 1, 2, ... `cells` or more: sums of scale^2 (|k| - |weight / (scale * step)|), of scale^2."""
    from core.tensors.kernels import cpu_grid_jit

    sums, starts = np.zeros(2 * cells), starts_of(weights.numel(), columns, width)
    cpu_grid_jit.grid_sums(_wide(weights), starts, scales.contiguous().numpy(), step, numbers, sums)
    return sums


def over_pieces(work: Callable[[PieceOfWork], Result], pieces: Iterable[PieceOfWork]) -> list[Result]:
    """`work` of each piece, in order, on torch's number of threads."""
    threads, todo = torch.get_num_threads(), list(pieces)
    if threads == 1 or len(todo) < 2:
        return [work(piece) for piece in todo]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, todo))


def bits_of(values: torch.Tensor) -> Bits:
    """The patterns of a flat contiguous tensor, without a copy."""
    return values.view(torch.int32 if values.dtype is torch.float32 else torch.int16).numpy()


@lru_cache(maxsize=8)
def starts_of(count: int, columns: int, width: int) -> Starts:
    """Where the blocks of `count` elements start, and where the last one ends."""
    rows = np.arange(0, count, columns, dtype=np.uint64)
    starts = (rows[:, None] + np.arange(0, columns, width, dtype=np.uint64)).reshape(-1)
    return np.append(starts[starts < count], np.uint64(count))


def _wide(piece: torch.Tensor) -> NDArray[np.float32]:
    """The finite elements of a piece in fp32; a copy only of those that are not."""
    from core.tensors.kernels import cpu_jit

    if piece.dtype not in KINDS or piece.dtype is torch.float32:
        return piece.float().numpy()
    patterns = np.empty(piece.numel(), np.int32)
    cpu_jit.widen(bits_of(piece), KINDS[piece.dtype], patterns)
    return patterns.view(np.float32)


def _squares(bits: Bits, starts: Starts, kind: int, largest: Bits) -> torch.Tensor:
    from core.tensors.kernels import cpu_jit

    sizes = starts[1:] - starts[:-1]
    squares, out = np.empty(int(sizes.max(initial=0))), np.empty(sizes.size)
    cpu_jit.block_squares(bits, starts, kind, largest, squares, out)
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

    kind, ties, bits = KINDS[flat.dtype], rule.upper_on_tie, bits_of(roomy(flat, start, stop))
    cpu_jit.counted_codes(bits, starts, kind, scales, rule.limits, ties, rule.exact, rule.zero, codes)


def roomy(flat: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The piece with room behind it; a copy only at the end of the tensor."""
    fits = stop + ROOM <= flat.numel()
    return flat[start : stop + ROOM] if fits else torch.cat((flat[start:stop], flat.new_zeros(ROOM)))


def _translate(codes: NDArray[np.uint8], rule: RoundingRule) -> None:
    from core.tensors.kernels import cpu_jit, cpu_packing_jit

    if rule.stored is None:
        cpu_jit.translate(codes, rule.middle, rule.first)
    else:
        cpu_packing_jit.replace_codes(codes, rule.stored)


def _round(
    numbers: NDArray[np.float32],
    starts: Starts,
    scales: NDArray[np.float32],
    rule: RoundingRule,
    codes: NDArray[np.uint8],
) -> None:
    from core.tensors.kernels import cpu_rounding_jit

    if rule.method is Method.GRID:
        cpu_rounding_jit.grid_codes(numbers, starts, scales, rule.numbers, rule.zero, codes)
    elif rule.method is Method.FLOAT:
        mantissa, least, last, sign = (int(number) for number in rule.numbers)
        cpu_rounding_jit.float_codes(numbers, starts, scales, rule.quotients, mantissa, least, last, sign, codes)
    else:
        cpu_rounding_jit.guided_codes(numbers, starts, scales, rule.limits, rule.guide, rule.numbers, rule.zero, codes)


def _even_steps(values: NDArray[np.float32]) -> tuple[float, float] | None:
    """First value and step of a table that they give without rounding."""
    if values.size < 2:
        return None
    first, step = float(values[0]), float(values[1] - values[0])
    even = np.float32(first) + np.float32(step) * np.arange(values.size, dtype=np.float32)
    return (first, step) if np.array_equal(even, values) else None
