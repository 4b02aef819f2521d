"""Encoding to the nearest code: the arithmetic that every rounding method ends in.

A tensor passes through these stations: non-finite weights are refused; outliers are set aside; the rest is rotated;
each block gets its statistic; the table is fitted where the format leaves that open; scales are chosen and rounded to
how they are stored; every weight takes the nearest value; scales are freed of their bias. The tensor is worked on in
pieces, so memory is the source, the codes and a few MiB (and an fp32 copy where the format rotates, a copy where it
has outliers).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from core.errors import NonFiniteWeights
from core.formats.elements import ElementTable, element_table, shared_weights, stored_codes
from core.formats.stored import group_of, matrix_shape, packed_bytes, planes
from core.recipe.tensor_format import TensorFormat
from core.tensors import outliers, rotation
from core.tensors.block_types import rows
from core.tensors.blocks import BlockGrid, Piece
from core.tensors.dtypes import SAFETENSORS_NAMES
from core.tensors.encoded import EncodedTensor, scales_like
from core.tensors.fitted import Fitted, fitted_table
from core.tensors.indices import nearest_indices
from core.tensors.packing import pack_planes
from core.tensors.scale_formats import decoded_scales, double_quantised, stored_scales, tensor_scale, undo_double
from core.tensors.scales import statistic_of
from core.tensors.search import best_scales
from core.tensors.unbiased import unbiased

Parts = dict[str, torch.Tensor]


def encode_nearest(
    weight: torch.Tensor, fmt: TensorFormat, *, seed: int = 0, row_weights: torch.Tensor | None = None
) -> EncodedTensor:
    """Encode a floating tensor of any shape, on its device; NonFiniteWeights for NaN or infinity in it.

    `seed`: of a random rotation. `row_weights`: what the squared error of a weight of each row counts, (rows,) of the
    tensor as a matrix of its last dimension; for what is fitted by sensitivity.
    """
    shape, dtype = tuple(weight.shape), SAFETENSORS_NAMES[weight.dtype]
    weight = weight.detach()
    require_finite(weight)
    if fmt.is_block_type:
        blocks = rows.encode_rows(fmt.mode, weight.reshape(matrix_shape(shape))).reshape(-1)
        return EncodedTensor(fmt, shape, dtype, {"codes": blocks.to(weight.device)})
    flat, extra = _prepared(weight.reshape(-1), fmt, shape, seed)
    encoder = _Encoder(flat, fmt, shape, row_weights)
    encoded = EncodedTensor(fmt, shape, dtype, encoder.parts() | extra)
    return unbiased(encoded, flat) if fmt.is_unbiased else encoded


def require_finite(weight: torch.Tensor) -> None:
    """NonFiniteWeights with the place of the first NaN or infinity."""
    flat = weight.reshape(-1)
    for start in range(0, flat.numel(), _CHECKED):
        finite = torch.isfinite(flat[start : start + _CHECKED])
        if not bool(finite.all()):
            place = start + int((~finite).to(torch.uint8).argmax())
            index = [int(at) for at in torch.unravel_index(torch.tensor(place), weight.shape)]
            raise NonFiniteWeights(
                f"NaN or infinity among the weights, the first at {index}",
                hint="the checkpoint is damaged: copy it anew, or keep the tensor by an override",
            )


_CHECKED = 1 << 20


def _prepared(flat: torch.Tensor, fmt: TensorFormat, shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, Parts]:
    """What is left for the codes, flat, and the parts that say what was taken away or turned."""
    extra: Parts = {}
    if fmt.outlier_rule:
        places = _outliers(flat, BlockGrid.of(fmt, shape), *fmt.outlier_rule)
        extra["outlier_values"] = outliers.outlier_values(flat, places)
        extra["outlier_index"] = outliers.encode_index(places, flat.numel())
        flat = outliers.without_outliers(flat, places)
    if fmt.rotation == "hadamard":
        flat = rotation.rotate_rows(flat.reshape(matrix_shape(shape))).reshape(-1)
    if fmt.rotation == "rotate":
        extra["seed"] = torch.tensor([seed % (1 << 63)], dtype=torch.int64, device=flat.device)
        turn = rotation.RandomRotation.of(seed % (1 << 63), shape)
        flat = turn.rotate(flat.reshape(matrix_shape(shape))).reshape(-1)
    return flat, extra


def _outliers(flat: torch.Tensor, grid: BlockGrid, rule: str, value: float) -> torch.Tensor:
    """Flat places of the outliers, ascending."""
    if rule == "outliers":
        return outliers.select_by_ratio(flat, value)
    return outliers.select_by_threshold(flat, value) if rule == "threshold" else outliers.select_opq(flat, grid, value)


class _Encoder:
    """One tensor being encoded."""

    def __init__(
        self, flat: torch.Tensor, fmt: TensorFormat, shape: tuple[int, ...], row_weights: torch.Tensor | None
    ) -> None:
        self.flat, self.fmt, self.shape = flat, fmt, shape
        self.grid = BlockGrid.of(fmt, shape)
        self.group = group_of(fmt.codes)
        self.extreme = self._statistic()
        self.fit = Fitted(element_table(fmt, shared_weights(fmt, shape)))
        if fmt.fitted is not None or fmt.family == "lloyd":
            scales = self.extreme if fmt.family == "float" else self._scales(searched=False)[1]
            self.fit = fitted_table(flat, fmt, shape, scales, row_weights)

    @property
    def table(self) -> ElementTable:
        return self.fit.table

    def parts(self) -> Parts:
        """What is stored of the dense tensor."""
        device = self.flat.device
        stored, factors = self._scales(searched=self.fmt.is_searched)
        made: Parts = {"codes": self._codes(factors), **stored}
        if self.fmt.is_codebook:
            made["codebook"] = torch.tensor(self.table.values, dtype=torch.float32, device=device)
        if self.fit.value is not None:
            made["fitted"] = torch.tensor([self.fit.value], dtype=torch.float64, device=device)
        return made

    def _blocks(self, piece: Piece) -> torch.Tensor:
        """(blocks, width) fp32 of a piece."""
        return self.grid.to_blocks(self.flat[piece.start : piece.stop].float())

    def _pieces(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for piece in self.grid.pieces(1):
            yield slice(piece.first, piece.last), self._blocks(piece)

    def _statistic(self) -> torch.Tensor:
        """absmax, signed extreme or rms of all blocks, flat fp32."""
        name = self.fmt.base_statistic
        if self.grid.one_scale:
            return self._tensor_statistic(name)
        found = [statistic_of(blocks, name, self.grid.counts(blocks)) for _, blocks in self._pieces()]
        return torch.cat(found) if found else torch.zeros(0, device=self.flat.device)

    def _tensor_statistic(self, name: str) -> torch.Tensor:
        """The one statistic of a tensor, (1,), gathered piece by piece."""
        extreme = torch.zeros(1, device=self.flat.device)
        squares = torch.zeros(1, dtype=torch.float64, device=self.flat.device)
        for _, blocks in self._pieces():
            found = statistic_of(blocks, name, 1)
            squares += found.double().square() if name == "rms" else 0
            extreme = torch.where(found.abs() > extreme.abs(), found, extreme)
        return (squares / max(self.grid.elements, 1)).sqrt().float() if name == "rms" else extreme

    def _scales(self, *, searched: bool) -> tuple[Parts, torch.Tensor]:
        """The stored scales with all that belongs to them, and the scales as decoded, flat fp32."""
        largest = self.extreme.abs().max() if self.extreme.numel() else self.extreme.sum()
        constant = tensor_scale(self.fmt, self.table, largest)
        if searched:
            flat = best_scales(self.fmt, self.table, self.extreme, constant, self._pieces)
        else:
            flat = stored_scales(self.fmt, self.table, self.extreme, constant)
        if self.fmt.scale_format == "dq8":
            made = double_quantised(flat)
            return made | {"scales": scales_like(self.fmt, self.shape, made["scales"])}, undo_double(made)
        made = {"scales": scales_like(self.fmt, self.shape, flat)}
        return made | ({} if constant is None else {"tensor_scale": constant}), decoded_scales(self.fmt, flat, constant)

    def _codes(self, factors: torch.Tensor) -> torch.Tensor:
        """Packed codes, uint8."""
        count = self.grid.elements
        packed = torch.empty(packed_bytes(self.fmt.codes, count), dtype=torch.uint8, device=self.flat.device)
        patterns = stored_codes(self.fmt, len(self.table.values))
        lookup = None if patterns is None else torch.tensor(patterns, device=self.flat.device)
        for piece in self.grid.pieces(self.group):
            scales = factors[piece.first : piece.last]
            indices = self.grid.from_blocks(nearest_indices(self._blocks(piece), scales, self.fmt, self.table))
            self._place(packed, piece, indices if lookup is None else lookup[indices.long()])
        return packed

    def _place(self, packed: torch.Tensor, piece: Piece, codes: torch.Tensor) -> None:
        offset = 0
        for plane, data in zip(planes(self.fmt.codes), pack_planes(codes, self.fmt.codes), strict=True):
            begin = offset + piece.start // plane.group * plane.width
            packed[begin : begin + data.numel()] = data
            offset += plane.nbytes(self.grid.elements)
