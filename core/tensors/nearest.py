"""Encoding to the nearest code: the arithmetic that every rounding method ends in.

Nearest to the real number weight / stored scale, decided exactly: thresholds are products of fp64 table midpoints with
the scale, compared with the weight itself (optimal formats, section 5.3). For codebooks the code is
`#{k : x > fl32(t_k s)}`; for integers and floats ties go to even, then the range saturates. The tensor is worked on in
pieces, so memory is the source, the codes and a few MiB.
"""

from __future__ import annotations

import torch

from core.errors import NonFiniteWeights
from core.formats import integer
from core.formats.elements import ElementTable, element_table, shared_weights
from core.formats.stored import group_of, packed_bytes, planes
from core.recipe.tensor_format import TensorFormat
from core.tensors.blocks import BlockGrid, Piece
from core.tensors.dtypes import SAFETENSORS_NAMES
from core.tensors.encoded import EncodedTensor, float_patterns, scales_like
from core.tensors.packing import pack_planes
from core.tensors.scales import absmax, decoded_scales, signed_extreme, stored_scales, sum_of_squares, wanted_scales

_FEW = 33  # up to this many values, counting thresholds is faster than searching


def encode_nearest(weight: torch.Tensor, fmt: TensorFormat) -> EncodedTensor:
    """Encode a floating tensor of any shape, on its device; NonFiniteWeights for NaN or infinity in it."""
    shape = tuple(weight.shape)
    encoder = _Encoder(weight.detach().reshape(-1), fmt, shape)
    codebook = torch.tensor(encoder.table.values, dtype=torch.float32) if fmt.is_codebook else None
    scales = encoder.scales()
    codes = encoder.codes(scales)
    return EncodedTensor(
        format=fmt,
        shape=shape,
        dtype=SAFETENSORS_NAMES[weight.dtype],
        codes=codes,
        scales=scales_like(fmt, shape, scales),
        codebook=None if codebook is None else codebook.to(weight.device),
    )


class _Encoder:
    """One tensor being encoded."""

    def __init__(self, flat: torch.Tensor, fmt: TensorFormat, shape: tuple[int, ...]) -> None:
        self.flat, self.fmt = flat, fmt
        self.grid = BlockGrid.of(fmt, shape)
        self.table = element_table(fmt, shared_weights(fmt, shape))
        self.group = group_of(fmt.codes)

    def _blocks(self, piece: Piece) -> torch.Tensor:
        """(blocks, width) fp32 of a piece."""
        return self.grid.to_blocks(self.flat[piece.start : piece.stop].float())

    def scales(self) -> torch.Tensor:
        """Stored scales of all blocks, flat."""
        if self.grid.one_scale:
            return stored_scales(self.fmt, self._tensor_scale())
        found = [self._piece_scales(piece) for piece in self.grid.pieces(1)]
        return torch.cat(found) if found else stored_scales(self.fmt, torch.zeros(0, device=self.flat.device))

    def _piece_scales(self, piece: Piece) -> torch.Tensor:
        blocks = self._blocks(piece)
        _require_finite(blocks)
        is_rms = self.fmt.statistic == "rms"
        extreme = signed_extreme(blocks) if self.fmt.statistic == "signmax" else absmax(blocks)
        squares = sum_of_squares(blocks) if is_rms else extreme
        wanted = wanted_scales(self.fmt, self.table, extreme, squares, self.grid.counts(blocks))
        return stored_scales(self.fmt, wanted)

    def _tensor_scale(self) -> torch.Tensor:
        """The one scale before rounding, (1,) fp32, gathered piece by piece."""
        device = self.flat.device
        extreme = torch.zeros(1, device=device)
        squares = torch.zeros(1, dtype=torch.float64, device=device)
        for piece in self.grid.pieces(1):
            blocks = self._blocks(piece)
            _require_finite(blocks)
            found = signed_extreme(blocks) if self.fmt.statistic == "signmax" else absmax(blocks)
            extreme = torch.where(found.abs() > extreme.abs(), found, extreme)
            squares += sum_of_squares(blocks)
        return wanted_scales(self.fmt, self.table, extreme, squares, max(self.grid.elements, 1))

    def codes(self, scales: torch.Tensor) -> torch.Tensor:
        """Packed codes, uint8."""
        count = self.grid.elements
        packed = torch.empty(packed_bytes(self.fmt.codes, count), dtype=torch.uint8, device=self.flat.device)
        for piece in self.grid.pieces(self.group):
            factors = decoded_scales(self.fmt, scales[piece.first : piece.last])
            indices = self.grid.from_blocks(nearest_indices(self._blocks(piece), factors, self.fmt, self.table))
            self._place(packed, piece, self._stored_codes(indices))
        return packed

    def _stored_codes(self, indices: torch.Tensor) -> torch.Tensor:
        if self.fmt.family != "float":
            return indices
        return float_patterns(self.fmt, len(self.table.values)).to(indices.device)[indices.long()]

    def _place(self, packed: torch.Tensor, piece: Piece, codes: torch.Tensor) -> None:
        offset = 0
        for plane, data in zip(planes(self.fmt.codes), pack_planes(codes, self.fmt.codes), strict=True):
            begin = offset + piece.start // plane.group * plane.width
            packed[begin : begin + data.numel()] = data
            offset += plane.nbytes(self.grid.elements)


def nearest_indices(blocks: torch.Tensor, scales: torch.Tensor, fmt: TensorFormat, table: ElementTable) -> torch.Tensor:
    """Indices into `table.values` nearest to blocks / scales: (blocks, width) fp32, (blocks,) fp32 -> integers.

    Where a scale is 0 the index is that of the value nearest to 0.
    """
    factors = scales.abs()
    if fmt.statistic == "signmax":
        blocks = torch.where(scales[:, None] < 0, -blocks, blocks)
    if fmt.family == "int":
        indices = _integer_indices(blocks, factors, fmt)
    elif len(table.values) <= _FEW:
        indices = _counted(blocks, factors, fmt, table)
    else:
        indices = _searched(blocks, factors, fmt, table)
    dead = factors == 0
    if bool(dead.any()):
        indices[dead] = table.zero
    return indices


def _integer_indices(blocks: torch.Tensor, factors: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """Half to even on the integers' own grid: the quotient in fp64 shows every tie of fp32 numbers exactly."""
    lowest = integer.lowest(fmt.mode, fmt.codes)
    shift = lowest - int(lowest)  # 0, or -0.5 for a grid of halves
    quotients = blocks.double().div_(factors.double()[:, None]).nan_to_num_(0.0)
    levels = quotients.sub_(shift).round_().sub_(lowest - shift).clamp_(0, fmt.codes - 1)
    return levels.to(torch.uint8 if fmt.codes <= 256 else torch.int32)


def _counted(blocks: torch.Tensor, factors: torch.Tensor, fmt: TensorFormat, table: ElementTable) -> torch.Tensor:
    """How many thresholds lie below each element."""
    indices = torch.zeros(blocks.shape, dtype=torch.uint8, device=blocks.device)
    for low in range(len(table.values) - 1):
        limits = _limits(_midpoint(table, low), factors, table.upper_on_tie[low], exact=not fmt.is_codebook)
        indices += blocks > limits[:, None]
    return indices


def _searched(blocks: torch.Tensor, factors: torch.Tensor, fmt: TensorFormat, table: ElementTable) -> torch.Tensor:
    """A search in the quotients, then one step down or up where the exact threshold says so."""
    count = len(table.values)
    middles = torch.tensor(
        [_midpoint(table, low) for low in range(count - 1)], dtype=torch.float64, device=blocks.device
    )
    upper = torch.tensor(table.upper_on_tie, device=blocks.device)
    quotients = (blocks / factors[:, None]).nan_to_num_(0.0)
    indices = torch.bucketize(quotients, middles.float(), out_int32=True)

    def above(which: torch.Tensor) -> torch.Tensor:
        """Whether the element lies above threshold `which`."""
        inside = which.clamp(0, count - 2)
        limits = _limits(middles[inside], factors[:, None], upper[inside], exact=not fmt.is_codebook)
        return blocks > limits

    indices -= ((indices > 0) & ~above(indices - 1)).int()
    indices += ((indices < count - 1) & above(indices)).int()
    return indices


def _midpoint(table: ElementTable, low: int) -> float:
    return (table.values[low] + table.values[low + 1]) / 2


def _limits(
    middle: float | torch.Tensor, factors: torch.Tensor, upper: bool | torch.Tensor, *, exact: bool
) -> torch.Tensor:
    """fp32 limits L so that `x > L` decides for the upper value, for every fp32 x.

    Not `exact`: L = fl32(middle * scale), the rule of codebooks. `exact`: as the real product decides, ties included.
    """
    product = factors.double() * middle
    limits = product.float()
    if not exact:
        return limits
    rounded = limits.double()
    lower_it = (product < rounded) | ((product == rounded) & torch.as_tensor(upper, device=factors.device))
    below = torch.nextafter(limits, torch.full_like(limits, -torch.inf))
    return torch.where(lower_it, below, limits)


def _require_finite(blocks: torch.Tensor) -> None:
    if not bool(torch.isfinite(blocks).all()):
        raise NonFiniteWeights(
            "NaN or infinity among the weights", hint="the checkpoint is damaged: train or copy anew"
        )
