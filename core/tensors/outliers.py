"""Sparse outliers: which weights are kept apart, how they are stored, and how they come back.

Outliers are chosen from the whole tensor, set to 0 before statistics, rotation and fitting, stored as bf16 with their
flat positions (bytes: `core.formats.sparse_index`), and written over the decoded tensor at the end (optimal formats,
section 10; OPQ: BOF4, arXiv 2505.06653).

Promise: positions ascend; the choice does not depend on the number of threads, nor on the device (of limits computed
from sums of squares a device may see other last digits of fp64); the tensor is read in pieces, so memory is a few MiB
besides the result. Weights are taken as fp32 and free of NaN; a chosen one that is not finite is refused. Positions
read from a file are checked before anything is indexed with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from core.errors import InvalidCheckpoint, InvalidFormat, NonFiniteWeights
from core.formats.sparse_index import IndexLayout, outlier_count
from core.tensors.blocks import PIECE, BlockGrid, Piece
from core.tensors.scales import sum_of_squares

_SEGMENT = 4096
_MAGNITUDE = 0x7FFFFFFF  # an fp32 pattern without its sign orders as the magnitude does
_LOW_BITS = 15
_POSITIONS = 1 << 15  # whose low bits are in work at once: a multiple of 8


def select_by_ratio(flat: torch.Tensor, ratio: float) -> torch.Tensor:
    """The floor(ratio * n) elements of largest magnitude of a flat tensor (n,): ascending positions, int64.

    Of equal magnitudes the lowest positions are taken.
    """
    count = outlier_count(flat.numel(), ratio)
    if count == 0:
        return _no_positions(flat)
    limit, ties = _limit_of_largest(flat, count)
    found = []
    for start, stop in _pieces(flat.numel()):
        keys = _keys(flat[start:stop])
        tied = (keys == limit).nonzero().squeeze(1)[:ties]
        ties -= tied.numel()
        found.append(torch.cat(((keys > limit).nonzero().squeeze(1), tied)).sort().values + start)
    return torch.cat(found)


def select_by_threshold(flat: torch.Tensor, multiple_of_rms: float) -> torch.Tensor:
    """Positions of the elements with |x| > multiple * RMS of the whole tensor, ascending, int64."""
    squares = torch.zeros(1, dtype=torch.float64, device=flat.device)
    for start, stop in _pieces(flat.numel()):
        squares += sum_of_squares(flat[start:stop].float()[None])
    limit = multiple_of_rms * (squares / max(flat.numel(), 1)).sqrt()
    pieces = (Piece(start, stop, 0, 1) for start, stop in _pieces(flat.numel()))
    return _positions_above(flat, pieces, lambda _: limit)


def select_by_iqr(flat: torch.Tensor, multiple: float) -> torch.Tensor:
    """Positions of the elements with |x| > max(|q1 - r IQR|, |q3 + r IQR|), ascending, int64 (SqueezeLLM).

    q1, q3: quartiles of the whole tensor, interpolated; IQR: their distance, r = `multiple`. Where the quartiles are
    equal there are no outliers.
    """
    limit = _iqr_limit(flat, multiple)
    pieces = (Piece(start, stop, 0, 1) for start, stop in _pieces(flat.numel()))
    return _positions_above(flat, pieces, lambda _: limit)


def select_opq(flat: torch.Tensor, grid: BlockGrid, quantile: float) -> torch.Tensor:
    """Positions of the elements with |x| > sigma_b F_M^-1(quantile), ascending, int64 (BOF4, outlier-preserving).

    sigma_b: the sample standard deviation (ddof 1) of the element's own block, F_M^-1: `quantile_of_max` of as many
    draws as the block has elements. A block without a deviation (one element, or all of them equal) has no outliers.
    """
    counts = _by_length(grid, float, flat.device)
    means = _per_block(flat, grid, lambda values, _: _row_sums(grid.to_blocks(values))) / counts

    def squares(values: torch.Tensor, piece: Piece) -> torch.Tensor:
        return sum_of_squares(grid.to_blocks(values - _spread(means, grid, piece)))

    deviations = (_per_block(flat, grid, squares) / (counts - 1).clamp(min=1)).sqrt()
    limits = deviations * _by_length(grid, lambda length: quantile_of_max(quantile, length), flat.device)
    limits = torch.where(deviations > 0, limits, torch.inf)
    return _positions_above(flat, grid.pieces(1), lambda piece: _spread(limits, grid, piece))


def quantile_of_max(quantile: float, block: int) -> float:
    """F_M^-1(q) = G^-1((1 + q^(1/I)) / 2) for the largest magnitude of I = `block` standard Normal draws; q in (0, 1).

    Codebooks, section 2. InvalidFormat for another q.
    """
    from scipy import special

    if not 0 < quantile < 1:
        raise InvalidFormat(f"the {quantile:g} quantile of a maximum", hint="between 0 and 1, for instance 0.95")
    return -float(special.ndtri(-math.expm1(math.log(quantile) / block) / 2))


def outlier_values(flat: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """What is stored of the outliers: bf16, nearest, ties to even, finite; NonFiniteWeights for NaN or infinity."""
    values = flat[indices].float()
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteWeights(
            "NaN or infinity among the weights", hint="the checkpoint is damaged: train or copy anew"
        )
    limit = torch.finfo(torch.bfloat16).max
    return values.clamp(-limit, limit).to(torch.bfloat16)


def without_outliers(values: torch.Tensor, indices: torch.Tensor, start: int = 0) -> torch.Tensor:
    """The flat elements `start`, `start` + 1, ... with the outliers among them set to 0; `values` is left alone.

    A copy, or `values` itself where no outlier is among them. With a piece of a tensor and its start, no copy of the
    whole is needed. `indices`: ascending, of the whole tensor.
    """
    first, last = _range_within(indices, start, start + values.numel())
    return values.index_fill(0, indices[first:last] - start, 0) if first < last else values


def overwrite(values: torch.Tensor, indices: torch.Tensor, outliers: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Write the outliers that fall among the flat elements `start`, `start` + 1, ... over them, in place."""
    first, last = _range_within(indices, start, start + values.numel())
    values[indices[first:last] - start] = outliers[first:last].to(values.dtype)
    return values


def encode_index(indices: torch.Tensor, elements: int) -> torch.Tensor:
    """Ascending positions (n,) int64 below `elements` -> uint8 (index_bytes(elements, n),)."""
    _require_ascending(indices, elements)
    layout = IndexLayout(elements, indices.numel())
    data = torch.zeros(layout.low_bytes + layout.high_bytes, dtype=torch.uint8, device=indices.device)
    if not layout.count:
        return data
    if layout.low_width:
        for first in range(0, layout.count, _POSITIONS):
            packed = _pack_bits(_bits_of(indices[first : first + _POSITIONS], layout.low_width))
            begin = first // 8 * layout.low_width
            data[begin : begin + packed.numel()] = packed
    order = torch.arange(layout.count, device=indices.device)
    ones = torch.zeros(layout.high_bits, dtype=torch.uint8, device=indices.device)
    ones[(indices >> layout.low_width) + order] = 1
    data[layout.low_bytes :] = _pack_bits(ones)
    return data


def decode_index(data: torch.Tensor, elements: int, count: int) -> torch.Tensor:
    """The positions (count,) int64 of `encode_index`; InvalidCheckpoint for bytes that no positions encode to."""
    layout = IndexLayout(elements, count)
    if data.numel() != layout.low_bytes + layout.high_bytes:
        raise InvalidCheckpoint(f"{data.numel()} bytes are not the positions of {count} among {elements}")
    if not count:
        return torch.zeros(0, dtype=torch.int64, device=data.device)
    ones = _unpack_bits(data[layout.low_bytes :]).nonzero().squeeze(1)
    if ones.numel() != count or int(ones[-1]) >= layout.high_bits:
        raise InvalidCheckpoint(f"the index of outliers does not hold {count} positions below {elements}")
    high = ones - torch.arange(count, device=data.device)
    indices = (high << layout.low_width) | _low_parts(data[: layout.low_bytes], layout)
    _require_ascending(indices, elements)
    return indices


def _low_parts(data: torch.Tensor, layout: IndexLayout) -> torch.Tensor:
    """The low bits of all positions, int64; the filling of the section must be zeros."""
    width, found = layout.low_width, []
    places = torch.arange(width, device=data.device)
    for first in range(0, layout.count, _POSITIONS):
        size = min(_POSITIONS, layout.count - first)
        begin = first // 8 * width
        bits = _unpack_bits(data[begin : begin + (size * width + 7) // 8])
        if bool(bits[size * width :].any()):
            raise InvalidCheckpoint("the index of outliers ends in bits that mean nothing")
        found.append((bits[: size * width].view(size, width).long() << places).sum(dim=1))
    return torch.cat(found)


def _bits_of(values: torch.Tensor, width: int) -> torch.Tensor:
    """The `width` lowest bits of each value, lowest first, as one flat uint8 run."""
    places = torch.arange(width, device=values.device)
    return ((values[:, None] >> places) & 1).to(torch.uint8).reshape(-1)


def _pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """uint8 zeros and ones -> bytes, the first bit lowest."""
    octets = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    data = octets[:, 0].clone()
    for place in range(1, 8):
        data |= octets[:, place] << place
    return data


def _unpack_bits(data: torch.Tensor) -> torch.Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data[:, None] >> places) & 1).reshape(-1)


def _require_ascending(indices: torch.Tensor, elements: int) -> None:
    if not indices.numel():
        return
    within = int(indices[0]) >= 0 and int(indices[-1]) < elements
    if not within or not bool((indices[1:] > indices[:-1]).all()):
        raise InvalidCheckpoint(f"positions of outliers that do not ascend within {elements} elements")


def _limit_of_largest(flat: torch.Tensor, count: int) -> tuple[int, int]:
    """(key, ties): the `count` largest are those whose key is larger, and the first `ties` that have it.

    Two histograms of integers, of the high and then of the low bits, instead of sorting.
    """
    device = flat.device
    highs = torch.zeros(1 << (31 - _LOW_BITS), dtype=torch.int64, device=device)
    for start, stop in _pieces(flat.numel()):
        highs += torch.bincount(_keys(flat[start:stop]) >> _LOW_BITS, minlength=highs.numel())
    high, count = _bin_of(highs, count)
    lows = torch.zeros(1 << _LOW_BITS, dtype=torch.int64, device=device)
    for start, stop in _pieces(flat.numel()):
        keys = _keys(flat[start:stop])
        lows += torch.bincount(keys[keys >> _LOW_BITS == high] & ((1 << _LOW_BITS) - 1), minlength=lows.numel())
    low, count = _bin_of(lows, count)
    return high << _LOW_BITS | low, count


def _iqr_limit(flat: torch.Tensor, multiple: float) -> torch.Tensor:
    if not flat.numel():
        return torch.tensor(torch.inf, dtype=torch.float64)
    low, high = _quantile(flat, 0.25), _quantile(flat, 0.75)
    limit = max(abs(low - multiple * (high - low)), abs(high + multiple * (high - low))) if high > low else torch.inf
    return torch.tensor(limit, dtype=torch.float64, device=flat.device)


def _quantile(flat: torch.Tensor, share: float) -> float:
    """Between the two values of nearest rank, as numpy interpolates."""
    place = share * (flat.numel() - 1)
    low = _of_rank(flat, math.floor(place))
    return low + (_of_rank(flat, math.ceil(place)) - low) * (place - math.floor(place))


def _of_rank(flat: torch.Tensor, rank: int) -> float:
    """The value below which `rank` elements lie, in ascending order, by two histograms."""
    found, parts = 0, ((16, 1 << 15, (1 << 16) - 1), (0, 0, (1 << 16) - 1))
    for shift, offset, mask in parts:
        counts = torch.zeros(mask + 1, dtype=torch.int64, device=flat.device)
        for start, stop in _pieces(flat.numel()):
            keys = _signed_keys(flat[start:stop])
            inside = keys if shift else keys[keys >> 16 == found >> 16]
            counts += torch.bincount(((inside >> shift) + offset) & mask, minlength=mask + 1)
        cumulative = counts.cumsum(0)
        place = int((cumulative <= rank).sum())
        rank -= int(cumulative[place - 1]) if place else 0
        found = (place - offset) << 16 if shift else found | place
    key = torch.tensor(found, dtype=torch.int32)
    return float((key ^ ((key >> 31) & _MAGNITUDE)).view(torch.float32))


def _signed_keys(values: torch.Tensor) -> torch.Tensor:
    """int32 that order as the fp32 values do."""
    patterns = values.float().view(torch.int32)
    return patterns ^ ((patterns >> 31) & _MAGNITUDE)


def _bin_of(histogram: torch.Tensor, count: int) -> tuple[int, int]:
    """The bin that holds the `count`-th largest entry, and which one it is within that bin, counted from the top."""
    cumulative = histogram.flip(0).cumsum(0)
    place = int((cumulative < count).sum())
    above = int(cumulative[place - 1]) if place else 0
    return histogram.numel() - 1 - place, count - above


def _keys(values: torch.Tensor) -> torch.Tensor:
    return values.float().view(torch.int32) & _MAGNITUDE


def _positions_above(
    flat: torch.Tensor, pieces: Iterator[Piece], limits: Callable[[Piece], torch.Tensor]
) -> torch.Tensor:
    """Where |x| is above the fp64 limits of its piece."""
    found = [
        (flat[piece.start : piece.stop].float().abs() > limits(piece)).nonzero().squeeze(1) + piece.start
        for piece in pieces
    ]
    return torch.cat(found) if found else _no_positions(flat)


def _per_block(
    flat: torch.Tensor, grid: BlockGrid, sums: Callable[[torch.Tensor, Piece], torch.Tensor]
) -> torch.Tensor:
    """A sum of each block, fp64 (blocks,): `sums` of the fp64 elements of each piece, put or added together."""
    found = [sums(flat[piece.start : piece.stop].float().double(), piece) for piece in grid.pieces(1)]
    if not found:
        return torch.zeros(grid.blocks, dtype=torch.float64, device=flat.device)
    return torch.cat(found).sum(dim=0, keepdim=True) if grid.one_scale else torch.cat(found)


def _spread(per_block: torch.Tensor, grid: BlockGrid, piece: Piece) -> torch.Tensor:
    """A number per block as a number per element of the piece; one number where the whole tensor is a block."""
    if grid.one_scale:
        return per_block
    return grid.from_blocks(per_block[piece.first : piece.last, None].expand(-1, grid.width))


def _by_length(grid: BlockGrid, number: Callable[[int], float], device: torch.device) -> torch.Tensor:
    """`number` of how many real elements each block has, fp64 (blocks,)."""
    numbers = torch.full((grid.blocks,), number(grid.width), dtype=torch.float64)
    if grid.ragged:
        numbers.view(-1, grid.blocks_per_row)[:, -1] = number(grid.ragged)
    return numbers.to(device)


def _row_sums(blocks: torch.Tensor) -> torch.Tensor:
    """Of fp64 rows; segments first, so that the order of additions does not depend on the number of threads."""
    while blocks.shape[1] > _SEGMENT:
        padding = -blocks.shape[1] % _SEGMENT
        blocks = torch.nn.functional.pad(blocks, (0, padding)).view(blocks.shape[0], -1, _SEGMENT).sum(dim=2)
    return blocks.sum(dim=1)


def _range_within(indices: torch.Tensor, start: int, stop: int) -> tuple[int, int]:
    """The slice of ascending `indices` that lies in start..stop."""
    ends = torch.searchsorted(indices, torch.tensor([start, stop], device=indices.device))
    return int(ends[0]), int(ends[1])


def _pieces(elements: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + PIECE, elements)) for start in range(0, elements, PIECE))


def _no_positions(flat: torch.Tensor) -> torch.Tensor:
    return torch.zeros(0, dtype=torch.int64, device=flat.device)
