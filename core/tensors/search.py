"""The scale of every block chosen among candidates by the squared error: fewer errors at no cost in bits.

    absmax, signmax   0.70, 0.725, ... 1.15 times the statistic (codebooks, section 8)
    rms               2^(-2), 2^(-7/4), ... 2^2 times it (optimal formats, section 12)
    e8m0              the exponent of the rule, one less and one more (hardware formats, section 2)
    e4m3              the nine E4M3 values around the scale of the maximum (section 3)
    fouroversix       the scales that put the maximum at 6 and at 4

Candidates are tried in ascending order and the first with the smallest error stays, so the search is never worse than
the statistic itself (which is among the candidates) and does not depend on pieces or threads. `block_error` is the
readable reference; on the CPU `core.tensors.kernels.cpu_search` chooses as it does, without computing most errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from core.formats.elements import ElementTable
from core.recipe.tensor_format import TensorFormat
from core.tensors.indices import nearest_indices, uses_quotients
from core.tensors.scale_formats import decoded_scales, e4m3_values, end_of, stored_scales

_ABSMAX_FACTORS = tuple((28 + step) / 40 for step in range(19))
_RMS_FACTORS = tuple(2.0 ** (step / 4) for step in range(-8, 9))
_NEIGHBOURS = 4
_SEGMENT = 4096
_WORTH_COMPILING = 1 << 14  # elements; below, the reference is done before numba is loaded

Pieces = Callable[[], Iterator[tuple[torch.Tensor | slice, torch.Tensor]]]


def candidates(
    fmt: TensorFormat, table: ElementTable, extreme: torch.Tensor, constant: torch.Tensor | None
) -> Iterator[torch.Tensor]:
    """Stored scales to try, each for all blocks at once, ascending."""
    if fmt.statistic == "fouroversix":
        yield from (stored_scales(fmt, table, extreme, constant, factor) for factor in (1.0, 1.5))
    elif fmt.scale_format.startswith("e8m0"):
        yield from (stored_scales(fmt, table, extreme, None, factor) for factor in (0.5, 1.0, 2.0))
    elif fmt.scale_format == "e4m3":
        yield from _e4m3_neighbours(fmt, table, extreme, constant)
    else:
        factors = _RMS_FACTORS if fmt.base_statistic == "rms" else _ABSMAX_FACTORS
        yield from (stored_scales(fmt, table, extreme, None, factor) for factor in factors)


def best_scales(
    fmt: TensorFormat, table: ElementTable, extreme: torch.Tensor, constant: torch.Tensor | None, pieces: Pieces
) -> torch.Tensor:
    """The stored scales with the least squared error, block by block.

    `pieces` yields (which blocks, their elements (blocks, width)), every block once and without padding; the same block
    in several pieces where it is the only one. dq8 scales are chosen before they are coded together.
    """
    if extreme.numel() == 1:
        tried = _tried(fmt, table, extreme, constant)
        parts = (_errors(blocks.float(), tried, fmt, table, constant) for _, blocks in pieces())
        errors = sum(parts, torch.zeros((len(tried), 1), dtype=torch.float64, device=extreme.device))
        return _taken(tried, errors.argmin(dim=0))
    chosen = stored_scales(fmt, table, extreme, constant)
    for which, blocks in pieces():
        tried = _tried(fmt, table, extreme[which], constant)
        chosen[which] = _taken(tried, _first_least(blocks.float(), tried, fmt, table, constant))
    return chosen


def block_error(blocks: torch.Tensor, scales: torch.Tensor, fmt: TensorFormat, table: ElementTable) -> torch.Tensor:
    """The squared error of each of (blocks, width) fp32 under its decoded scale, (blocks,) fp64.

    Squares are added in a fixed order, whatever the device and the threads are: segments of 4096 elements one after the
    other; within a segment, filled with 0 to a power of two, the upper half joins the lower until one number is left.
    """
    values = torch.tensor(table.values, dtype=torch.float32, device=blocks.device)
    decoded = values[nearest_indices(blocks, scales, fmt, table).long()] * scales[:, None]
    total = torch.zeros(len(blocks), dtype=torch.float64, device=blocks.device)
    squares = (blocks.double() - decoded).square_()
    for start in range(0, blocks.shape[1], _SEGMENT):
        total += _halved(squares[:, start : start + _SEGMENT])
    return total


def _tried(
    fmt: TensorFormat, table: ElementTable, extreme: torch.Tensor, constant: torch.Tensor | None
) -> torch.Tensor:
    """(candidates, blocks) stored scales."""
    return torch.stack(list(candidates(fmt, table, extreme, constant)))


def _taken(tried: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """The candidate of that index for each block."""
    raw = tried.view(torch.uint8) if tried.dtype is torch.float8_e4m3fn else tried
    return raw.gather(0, which[None]).squeeze(0).view(tried.dtype)


def _first_least(
    blocks: torch.Tensor, tried: torch.Tensor, fmt: TensorFormat, table: ElementTable, constant: torch.Tensor | None
) -> torch.Tensor:
    """Index of the first candidate of least error for each block."""
    if _worth_compiling(blocks):
        from core.tensors.kernels import cpu_search

        if cpu_search.supports(blocks, table):
            scales = _decoded(fmt, tried, constant)
            return cpu_search.best_candidates(blocks, scales, fmt, table, quotients=uses_quotients(fmt))
    return _errors(blocks, tried, fmt, table, constant).argmin(dim=0)


def _errors(
    blocks: torch.Tensor, tried: torch.Tensor, fmt: TensorFormat, table: ElementTable, constant: torch.Tensor | None
) -> torch.Tensor:
    """(candidates, blocks) squared errors, fp64."""
    scales = _decoded(fmt, tried, constant)
    if _worth_compiling(blocks):
        from core.tensors.kernels import cpu_search

        if cpu_search.supports(blocks, table):
            return cpu_search.block_errors(blocks, scales, fmt, table, quotients=uses_quotients(fmt))
    return torch.stack([block_error(blocks, one, fmt, table) for one in scales])


def _worth_compiling(blocks: torch.Tensor) -> bool:
    return blocks.numel() >= _WORTH_COMPILING and blocks.device.type == "cpu"


def _decoded(fmt: TensorFormat, tried: torch.Tensor, constant: torch.Tensor | None) -> torch.Tensor:
    """Decoded scales; of one byte, by a table of them all."""
    if tried.element_size() > 1:
        return decoded_scales(fmt, tried.reshape(-1), constant).view(tried.shape)
    every = torch.arange(256, dtype=torch.uint8, device=tried.device).view(tried.dtype)
    patterns = tried.view(torch.uint8).reshape(-1).int()
    return decoded_scales(fmt, every, constant).index_select(0, patterns).view(tried.shape)


def _halved(numbers: torch.Tensor) -> torch.Tensor:
    """The sum of each row."""
    size = 1 << max(numbers.shape[1] - 1, 0).bit_length()
    numbers = torch.nn.functional.pad(numbers, (0, size - numbers.shape[1]))
    while size > 1:
        size //= 2
        numbers = numbers[:, :size] + numbers[:, size:]
    return numbers[:, 0]


def _e4m3_neighbours(
    fmt: TensorFormat, table: ElementTable, extreme: torch.Tensor, constant: torch.Tensor | None
) -> Iterator[torch.Tensor]:
    """The values from four below to four above the first that is not smaller than the wanted scale.

    A block of zeros keeps the scale that it has without a search.
    """
    wanted = (
        extreme
        / extreme.new_tensor(end_of(fmt, table))
        / (torch.ones(1, device=extreme.device) if constant is None else constant)
    )
    plain = stored_scales(fmt, table, extreme, constant)
    grid = e4m3_values().to(extreme.device)
    last = grid.numel() - 1
    first = torch.bucketize(wanted.abs(), grid).clamp(max=last).to(torch.int16)
    sign, is_zero = (wanted < 0).to(torch.uint8) << 7, extreme == 0
    for step in range(-_NEIGHBOURS, _NEIGHBOURS + 1):
        near = ((first + step).clamp_(0, last) + 1).to(torch.uint8) | sign  # the pattern 1 is the first value's
        yield torch.where(is_zero, plain.view(torch.uint8), near).view(torch.float8_e4m3fn)
