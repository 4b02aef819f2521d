"""The search of block scales on the CPU: exact errors of candidates, and the first candidate of least error.

`block_errors` equals the readable reference, `core.tensors.search.block_error` of each candidate, bit for bit: the same
limits, the same fp32 decoded values, and fp64 squares added in the same order. `best_candidates` gives the index that
the first minimum of those errors has, and computes few of them: a quick look in 16-bit integers says which candidates
cannot win, and exact errors are computed only where two or more are left. No codes are written. Blocks are independent,
so threads change nothing. Loops are compiled by numba when first asked for.

Why the quick look never drops the winner. A block of n elements is measured in units of 1/24000 of its largest
magnitude. With x and v the elements and decoded values in these units, X and V the integers nearest to them, V cut to
+-32767:

    |X - x| <= 1/2 + 2^-9, |V - v| <= 1/2 + 2^-7    the second terms are for fp32: three roundings of at most 2^15
    D = min_k |X - V_k|                             exactly: all are integers, and limits lie half-way between the V
    d = |x - v of the code| <= min_k |x - v_k| + 2^-5    as limits and quotients in fp32 are off by less than 2^-7

so |D - d| <= m = 1 + 1/16 for every element, and by the triangle inequality the norms of both differ by at most
m sqrt(n). Where a V was cut, D is only smaller: cutting to an interval that has X in it brings no V farther from X; if
moreover no element can have taken a V that was cut, D is what it would be without cutting. Hence norm(D) - m sqrt(n) is
never above the root of the exact error, and norm(D) + m sqrt(n) is never below it unless an element may have taken a
cut V, in which case it is not used; rounding in fp64 is far below what m leaves. The winner's lower bound cannot be
above the upper bound of any other, so the winner is kept, and so are all that tie with it. Sums of D^2 in fp32 are off
by less than (n/4 + 8) 2^-23 of them, which the comparison allows for. Blocks outside of 2^-100 .. 2^100, and those with
scales of 0 or of both signs, keep all candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from core.formats import integer
from core.formats.elements import ElementTable
from core.recipe.tensor_format import TensorFormat
from core.tensors.kernels import cpu_search_jit as loops

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]
Bytes = NDArray[np.uint8]
Part = Callable[[int, int], None]  # works on blocks low..high

_LONGEST = 1 << 14  # elements of a block up to which it is looked at quickly: 32 blocks side by side are 1 MiB


def supports(blocks: torch.Tensor, table: ElementTable) -> bool:
    """Whether this module takes these blocks: fp32 on the CPU and at most 256 values."""
    return blocks.device.type == "cpu" and blocks.dtype is torch.float32 and len(table.values) <= 256


def block_errors(
    blocks: torch.Tensor, scales: torch.Tensor, fmt: TensorFormat, table: ElementTable, *, quotients: bool
) -> torch.Tensor:
    """Squared errors of blocks (count, width) fp32 under decoded scales (candidates, count) fp32, as fp64 like them.

    `quotients`: whether fl32(x / scale) is rounded and not the real quotient.
    """
    given = blocks.contiguous().numpy(), scales.contiguous().numpy()
    asked, out = np.ones(scales.shape, dtype=np.bool_), np.empty(scales.shape)
    _divided(_exact_work(fmt, table, quotients, *given, asked, out), len(blocks))
    return torch.from_numpy(out)


def best_candidates(
    blocks: torch.Tensor, scales: torch.Tensor, fmt: TensorFormat, table: ElementTable, *, quotients: bool
) -> torch.Tensor:
    """Index of the first candidate of least squared error for each block, int64.

    Arguments as of `block_errors`, all finite.
    """
    given = blocks.contiguous().numpy(), scales.contiguous().numpy()
    asked, best = undecided(fmt, table, *given)
    out = np.empty(scales.shape)
    work = _exact_work(fmt, table, quotients, *given, asked, out)

    def part(low: int, high: int) -> None:
        work(low, high)
        loops.first_least(out, asked, low, high, best)

    _divided(part, len(blocks))
    return torch.from_numpy(best).long()


def undecided(fmt: TensorFormat, table: ElementTable, blocks: Floats, scales: Floats) -> tuple[Flags, Bytes]:
    """After the quick look: which exact errors are needed, (candidates, count), and the choice where none is, (count,).

    Where some are, the choice is the first of them. All are where the table or the width is none for a quick look.
    """
    short, is_half = _short_table(table)
    width, best = blocks.shape[1], np.zeros(len(blocks), dtype=np.uint8)
    if short is None or len(scales) < 2 or width % 4 or not 0 < width <= _LONGEST:
        return np.ones(scales.shape, dtype=np.bool_), best
    asked = np.empty(scales.shape, dtype=np.bool_)
    rules = is_half, 0.0 in table.values, fmt.base_statistic == "signmax"
    _divided(lambda low, high: loops.look(blocks, scales, short, rules, low, high, asked, best), len(blocks))
    return asked, best


def _short_table(table: ElementTable) -> tuple[Floats | None, bool]:
    """The values to look among, filled up to a length that there is a loop for; whether for magnitudes.

    None where there are too many, or where an element may take a value that is not the nearest.
    """
    values = np.array(table.values, dtype=np.float32)
    is_half = bool(np.array_equal(values, -values[::-1]))
    values = values[values.size // 2 :] if is_half else values
    lengths = [length for length in loops.SHORT_TABLES if length >= values.size]
    if table.edges is not None or not lengths or not (is_half or values[0] <= 0 <= values[-1]):
        return None, is_half
    return np.pad(values, (0, lengths[0] - values.size), mode="edge"), is_half


def _divided(work: Part, blocks: int) -> None:
    """All blocks, on torch's number of threads."""
    threads = min(torch.get_num_threads(), max(blocks, 1))
    if threads == 1:
        work(0, blocks)
        return
    bounds = [blocks * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))


def _exact_work(
    fmt: TensorFormat, table: ElementTable, quotients: bool, blocks: Floats, scales: Floats, asked: Flags, out: Doubles
) -> Part:
    if fmt.family == "int":
        return _integer_work(fmt, blocks, scales, asked, out)
    return _table_work(fmt, table, quotients, blocks, scales, asked, out)


def _integer_work(fmt: TensorFormat, blocks: Floats, scales: Floats, asked: Flags, out: Doubles) -> Part:
    lowest, step = integer.lowest(fmt.mode, fmt.codes), integer.step(fmt.mode, fmt.codes)
    grid = (step, lowest - int(lowest), lowest + (1.0 if fmt.mode == "mx" else 0.0), lowest + fmt.codes - 1)
    return lambda low, high: loops.integer_errors(blocks, scales, grid, asked, low, high, out)


def _table_work(
    fmt: TensorFormat, table: ElementTable, quotients: bool, blocks: Floats, scales: Floats, asked: Flags, out: Doubles
) -> Part:
    count = len(table.limits)
    filled = -(-count // loops.GROUP) * loops.GROUP
    filled = filled if filled <= loops.FEW else (1 << count.bit_length()) - 1
    limits, values = np.full(filled, np.inf), np.zeros(filled + 1, dtype=np.float32)
    on_tie = np.zeros(filled, dtype=np.bool_)
    limits[:count], on_tie[:count], values[: count + 1] = table.limits, table.upper_on_tie, table.values
    given = values, limits, on_tie
    rules = (not fmt.is_codebook, quotients, fmt.base_statistic == "signmax")
    return lambda low, high: loops.table_errors(blocks, scales, given, rules, asked, low, high, out)
