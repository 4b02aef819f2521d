"""Encoding to the nearest code: the arithmetic that every rounding method ends in.

A tensor passes through these stations: non-finite weights are refused; outliers are set aside; the rest is rotated;
each block gets its statistic; tables are fitted where the format leaves that open; scales are chosen and rounded to
how they are stored; every weight takes the nearest value; scales are freed of their bias. The tensor is worked on in
pieces, so memory is the source, the codes and a few MiB (and an fp32 copy where the format rotates, a copy where it
has outliers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from math import prod

import numpy as np
import torch

from core.errors import BitmillError, InvalidFormat, NonFiniteWeights
from core.formats.elements import element_table, is_open, shared_weights
from core.formats.stored import (
    code_count,
    group_of,
    matrix_shape,
    packed_bytes,
    plane_places,
    scale_shape,
    stored_parts,
)
from core.recipe.tensor_format import TensorFormat
from core.tensors import outliers, rotation, vector_grid
from core.tensors.block_types import rows
from core.tensors.blocks import BlockGrid, Piece
from core.tensors.coded import HEAD_BYTES, as_part, shortest_form
from core.tensors.column_scales import nearest_codes as column_codes
from core.tensors.dtypes import FLOATING, SAFETENSORS_NAMES
from core.tensors.encoded import EncodedTensor, scales_like
from core.tensors.errors import relative_rms_error
from core.tensors.fitted import fitted_table
from core.tensors.grid import GridEncoder
from core.tensors.passes import passes_for, require_finite
from core.tensors.row_codebooks import nearest_codes, row_codebooks
from core.tensors.scale_formats import (
    decoded_scales,
    double_quantised,
    require_fp16,
    stored_scales,
    tensor_scale,
    undo_double,
)
from core.tensors.scales import sum_of_squares
from core.tensors.search import best_scales
from core.tensors.unbiased import unbiased

Parts = dict[str, torch.Tensor]
_EASY = (2.0**-10, 2.0**15)  # between these, every block type holds weights
_LOST = 0.5  # R beyond which weights are not held


def encode_nearest(
    weight: torch.Tensor,
    fmt: TensorFormat,
    *,
    seed: int = 0,
    row_weights: torch.Tensor | None = None,
    input_weights: torch.Tensor | None = None,
) -> EncodedTensor:
    """Encode a floating tensor of any shape, on its device; NonFiniteWeights for NaN or infinity in it.

    `seed`: of a random rotation. `row_weights`: what the squared error of a weight of each row counts, (rows,) of the
    tensor as a matrix of its last dimension; for what is fitted by sensitivity. `input_weights`: what one of each
    column counts, (columns,), for codebooks of rows.
    """
    shape, dtype = tuple(weight.shape), SAFETENSORS_NAMES[weight.dtype]
    weight = weight.detach()
    if dtype not in FLOATING:
        raise InvalidFormat(f"weights of {dtype}", hint=f"one of {', '.join(FLOATING)}")
    if fmt.is_block_type or fmt.outlier_rule or fmt.rotation:
        require_finite(weight)
    if fmt.is_block_type:
        return _as_blocks(weight, fmt, dtype)
    places = _outliers(weight.reshape(-1), BlockGrid.of(fmt, shape), *fmt.outlier_rule) if fmt.outlier_rule else None
    flat, extra = prepared(weight.reshape(-1), fmt, shape, seed, places)
    plain = fmt if fmt.is_grid else fmt.without_code
    absent = None if fmt.rotation else places
    encoder = Encoder(flat, plain, shape, row_weights, None if places is None else places.numel())
    parts = encoder.by_rows(input_weights, absent) if fmt.has_row_codebooks else encoder.parts()
    encoded = EncodedTensor(plain, shape, dtype, parts | extra)
    encoded = unbiased(encoded, flat) if fmt.is_unbiased else encoded
    return encoded if plain == fmt else entropy_coded(encoded, fmt)


def entropy_coded(encoded: EncodedTensor, fmt: TensorFormat) -> EncodedTensor:
    """The same codes in the format's entropy code; BitmillError where they take more than the format says."""
    matrix = encoded.all_codes().cpu().numpy().reshape(matrix_shape(encoded.shape))
    data = shortest_form(matrix, fmt.entropy_code or "")[1]
    if fmt.coded_bytes is not None and data.size + HEAD_BYTES > fmt.coded_bytes:
        raise BitmillError(
            f"its codes take {data.size + HEAD_BYTES} bytes where {fmt.coded_bytes} are planned", where=str(fmt)
        )
    part = as_part(data, fmt.coded_bytes).to(encoded.codes.device)
    return EncodedTensor(fmt, encoded.shape, encoded.dtype, dict(encoded.stored) | {"codes": part})


def _as_blocks(weight: torch.Tensor, fmt: TensorFormat, dtype: str) -> EncodedTensor:
    """In a block type; InvalidFormat where its own scales cannot hold the magnitudes of the tensor."""
    shape = tuple(weight.shape)
    blocks = rows.encode_rows(fmt.mode, weight.reshape(matrix_shape(shape))).reshape(-1)
    encoded = EncodedTensor(fmt, shape, dtype, {"codes": blocks.to(weight.device)})
    largest = max(float(end.abs()) for end in weight.aminmax()) if weight.numel() else 0.0
    if largest and not _EASY[0] < largest < _EASY[1] and relative_rms_error(weight, encoded) > _LOST:
        raise InvalidFormat(
            f"weights up to {largest:.3g} are out of the range of {fmt}'s scales", hint="a format with bf16 scales"
        )
    return encoded


def outliers_in(weight: torch.Tensor, fmt: TensorFormat) -> int:
    """How many outliers the format's rule finds in a tensor; NonFiniteWeights for NaN or infinity."""
    require_finite(weight)
    rule = fmt.outlier_rule
    return _outliers(weight.reshape(-1), BlockGrid.of(fmt, tuple(weight.shape)), *rule).numel() if rule else 0


def prepared(
    flat: torch.Tensor, fmt: TensorFormat, shape: tuple[int, ...], seed: int, places: torch.Tensor | None
) -> tuple[torch.Tensor, Parts]:
    """What is left for the codes, flat, and the parts that say what was taken away or turned."""
    extra: Parts = {}
    if places is not None:
        extra["outlier_values"] = outliers.outlier_values(flat, places)
        extra["outlier_index"] = outliers.encode_index(places, flat.numel())
        flat = outliers.without_outliers(flat, places)
    if fmt.rotation == "hadamard":
        flat = rotation.rotate_rows(flat.reshape(matrix_shape(shape))).reshape(-1)
    if fmt.rotation == "rotate":
        extra["seed"] = torch.tensor([seed % (1 << 63)], dtype=torch.int64, device=flat.device)
        turn = rotation.RandomRotation.of(seed % (1 << 63), shape)
        flat = turn.rotate(flat.reshape(matrix_shape(shape))).reshape(-1)
    if fmt.rotation and not bool(torch.isfinite(flat).all()):
        raise NonFiniteWeights("rotating the weights overflows fp32", hint="leave the rotation out")
    return flat, extra


def _outliers(flat: torch.Tensor, grid: BlockGrid, rule: str, value: float) -> torch.Tensor:
    """Flat places of the outliers, ascending."""
    if rule == "outliers":
        return outliers.select_by_ratio(flat, value)
    if rule == "opq":
        return outliers.select_opq(flat, grid, value)
    return (outliers.select_by_threshold if rule == "threshold" else outliers.select_by_iqr)(flat, value)


class Encoder:
    """One tensor being encoded."""

    def __init__(
        self,
        flat: torch.Tensor,
        fmt: TensorFormat,
        shape: tuple[int, ...],
        row_weights: torch.Tensor | None,
        outlier_count: int | None,
    ) -> None:
        self.flat, self.fmt, self.shape, self.outlier_count = flat, fmt, shape, outlier_count
        self.grid, self.passes = BlockGrid.of(fmt, shape), passes_for(flat, fmt, shape)
        self.table = element_table(fmt, shared_weights(fmt, shape))
        self.fitted: float | None = None
        if is_open(fmt):
            scales = self.extreme if fmt.family == "float" else self._scales(searched=False)[1]
            fit = fitted_table(flat, fmt, shape, scales, row_weights)
            self.table, self.fitted = fit.table, fit.value

    def parts(self) -> Parts:
        """What is stored of the dense tensor."""
        if self.fmt.is_vector_grid:
            return self._by_vectors()
        made = self._on_grid() if self.fmt.is_grid else self._coded()
        return made | self.table_parts()

    def table_parts(self) -> Parts:
        """What is stored of the table."""
        made, device = Parts(), self.flat.device
        if self.fmt.is_codebook:
            made["codebook"] = torch.tensor(self.table.values, dtype=torch.float32, device=device)
        if self.fitted is not None:
            made["fitted"] = torch.tensor([self.fitted], dtype=torch.float64, device=device)
        return made

    def by_rows(self, input_weights: torch.Tensor | None, absent: torch.Tensor | None) -> Parts:
        """The same where every row has a codebook; places that are `absent` have no part in it."""
        stored, factors = self._scales(searched=False)
        given = {"input_weights": input_weights, "absent": absent}
        codebook = row_codebooks(self.flat, self.grid, factors, self.fmt.codes, **given)
        codes = self._packed(lambda piece: nearest_codes(self.flat, self.grid, piece, factors, codebook))
        return {"codes": codes, "codebook": codebook, **stored}

    def _by_vectors(self) -> Parts:
        """The same where several weights share a code."""
        stored, factors = self._scales(searched=False)
        points = vector_grid.codebook_of(self.fmt, self.flat.device)
        codes = self._packed(lambda piece: vector_grid.nearest_codes(self.flat, self.grid, piece, factors, points))
        return {"codes": codes, "codebook": points, **stored}

    def _coded(self) -> Parts:
        """Codes and scales, in one pass where there is one; fp16's range is checked by the statistics."""
        found = None if self.fmt.scale_format == "fp16" else self.passes.whole(self.table)
        if found is not None:
            return {"codes": found.codes, "scales": scales_like(self.fmt, self.shape, found.scales)}
        stored, factors = self._scales(searched=self.fmt.is_searched)
        return {"codes": self._codes(factors), **stored}

    def _on_grid(self) -> Parts:
        """Codes, scales and what a grid needs to be decoded, in exactly as many bytes as the format plans."""
        stored, factors = self._scales(searched=False)
        factors = undo_double(stored) if self.fmt.scale_format == "dq8" else factors
        code, device = self.fmt.entropy_code or "", self.flat.device
        room = stored_parts(self.fmt, self.shape, self.outlier_count)["codes"][1][0]
        found = GridEncoder(self.flat, matrix_shape(self.shape), self.grid, factors, code).solved(room)
        return stored | {
            "codes": as_part(found.data, room).to(device),
            "step": torch.tensor([found.step], dtype=torch.float32, device=device),
            "centroids": found.centroids.to(device),
            **self._unit_columns(),
        }

    def _unit_columns(self) -> Parts:
        """Scales of columns, which only data-aware methods have a use for."""
        if not self.fmt.has_column_scales:
            return {}
        codes = column_codes(np.ones(matrix_shape(self.shape)[1]))
        return {"column_scales": torch.from_numpy(codes).to(self.flat.device)}

    def _pieces(self) -> Iterator[tuple[torch.Tensor | slice, torch.Tensor]]:
        """Which blocks, and their elements, (blocks, width); the short blocks that rows end in on their own."""
        for piece in self.grid.pieces(1):
            values = self.flat[piece.start : piece.stop]
            if not self.grid.ragged:
                yield slice(piece.first, piece.last), self.grid.to_blocks(values)
                continue
            rows = values.reshape(-1, self.grid.columns)
            places = torch.arange(piece.first, piece.last, device=values.device).view(len(rows), -1)
            whole = self.grid.columns - self.grid.ragged
            if whole:
                yield places[:, :-1].reshape(-1), rows[:, :whole].reshape(-1, self.grid.width)
            yield places[:, -1], rows[:, whole:]

    @cached_property
    def extreme(self) -> torch.Tensor:
        """absmax, signed extreme or rms of all blocks, flat fp32."""
        found = self.passes.over(self.passes.statistics, self.grid.pieces(1))
        if not found:
            return torch.zeros(prod(scale_shape(self.fmt, self.shape)), device=self.flat.device)
        squares = [one for _, one in found if one is not None]
        if squares:
            return _rms(torch.cat(squares), self.grid)
        extremes = torch.cat([one for one, _ in found])
        return extremes[extremes.abs().argmax()].reshape(1) if self.grid.one_scale else extremes

    def chosen_scales(self) -> tuple[Parts, torch.Tensor]:
        """What `nearest` would store of scales, and the scales as they will be decoded, flat fp32."""
        stored, factors = self._scales(searched=self.fmt.is_searched)
        return stored, undo_double(stored) if self.fmt.scale_format == "dq8" else factors

    def _scales(self, *, searched: bool) -> tuple[Parts, torch.Tensor]:
        """The stored scales with all that belongs to them, and the scales as decoded, flat fp32."""
        largest = self.extreme.abs().max() if self.extreme.numel() else self.extreme.sum()
        require_fp16(self.fmt, self.table, largest)
        constant = tensor_scale(self.fmt, self.table, largest)
        if searched:
            flat = best_scales(self.fmt, self.table, self.extreme, constant, self._pieces)
        else:
            flat = stored_scales(self.fmt, self.table, self.extreme, constant)
        if self.fmt.scale_format == "dq8":
            made = double_quantised(flat)
            return made | {"scales": scales_like(self.fmt, self.shape, made["scales"])}, flat  # bitsandbytes' order
        made = {"scales": scales_like(self.fmt, self.shape, flat)}
        return made | ({} if constant is None else {"tensor_scale": constant}), decoded_scales(self.fmt, flat, constant)

    def _codes(self, factors: torch.Tensor) -> torch.Tensor:
        """Packed codes, uint8."""
        found = self.passes.all_codes(factors, self.table)
        if found is not None:
            return found
        return self._packed(lambda piece: self.passes.codes(piece, factors[piece.first : piece.last], self.table))

    def _packed(self, planes_of: Callable[[Piece], list[torch.Tensor]]) -> torch.Tensor:
        """The packed planes of all pieces, put together."""
        radix, vector = self.fmt.codes, self.fmt.vector
        count = code_count(self.fmt, self.grid.elements)
        packed = torch.empty(packed_bytes(radix, count), dtype=torch.uint8, device=self.flat.device)

        def place(piece: Piece) -> None:
            places = plane_places(radix, count, piece.start // vector)
            for target, plane in zip(places, planes_of(piece), strict=True):
                packed[target : target + plane.numel()] = plane

        self.passes.over(place, self.grid.pieces(group_of(radix) * vector))
        return packed


def _rms(squares: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Root mean square of each block from sums of squares; of a tensor with one scale, from those of its pieces."""
    if grid.one_scale:
        return (sum_of_squares(squares.sqrt()[None]) / max(grid.elements, 1)).sqrt().float()
    return (squares / grid.counts(squares.numel(), squares.device)).sqrt().float()
