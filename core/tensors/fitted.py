"""Tables that are fitted to a tensor: what a format leaves open is chosen by the least squared error.

`t_4` chooses nu, `power4` the exponent, `float4` the exponent bits, `lloyd4` all values (weighted by sensitivities in
the mode `weighted`). One pass over the tensor gathers a histogram of weight / scale, on which candidates are judged:
fitting costs about as much as encoding. Deterministic; what was chosen is stored with the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from core.errors import InvalidFormat, MethodNotAvailable
from core.formats.elements import ElementTable, codebook_table, element_table, shared_weights, started
from core.formats.stored import matrix_shape
from core.recipe.tensor_format import TensorFormat
from core.tensors import fit, lloyd
from core.tensors.blocks import BlockGrid
from core.tensors.histogram import ErrorWeights, Histogram, scaled_histogram


@dataclass(frozen=True)
class Fitted:
    """A table and the parameter that it follows from (None where there is none, or nothing was open)."""

    table: ElementTable
    value: float | None = None


def fitted_table(
    flat: torch.Tensor,
    fmt: TensorFormat,
    shape: tuple[int, ...],
    scales: torch.Tensor,
    row_weights: torch.Tensor | None,
) -> Fitted:
    """The table for a flat tensor whose blocks have these decoded scales (of float: their statistics).

    MethodNotAvailable without sensitivities where the format weighs by them.
    """
    weights = _weights(fmt, shape, row_weights) if fmt.mode == "weighted" else None
    histogram = scaled_histogram(flat, BlockGrid.of(fmt, shape), scales, weights=weights)
    block = shared_weights(fmt, shape)
    if fmt.family == "lloyd":
        return Fitted(_lloyd(fmt, block, histogram))
    if fmt.fitted == "nu":
        return _student(fmt, block, histogram)
    value = _value(fmt, histogram)
    return Fitted(element_table(fmt.with_fitted(value), block), value)


def _weights(fmt: TensorFormat, shape: tuple[int, ...], row_weights: torch.Tensor | None) -> ErrorWeights:
    if row_weights is None:
        raise MethodNotAvailable(
            f"{fmt} weighs errors by sensitivities, and there are none", hint="lloyd4 without mode"
        )
    rows, columns = matrix_shape(shape)
    if row_weights.numel() != rows:
        raise InvalidFormat(f"sensitivities of {row_weights.numel()} rows for {rows}", where=str(fmt))
    return row_weights, torch.ones(columns)


def _value(fmt: TensorFormat, histogram: Histogram) -> float:
    """The exponent of power, or the exponent bits of float."""
    if fmt.fitted == "alpha":
        return fit.fit_alpha(histogram, fmt.codes, rounding=fmt.mode or "nearest").parameter
    return fit.fit_exponent_bits(histogram, int(fmt.bits), statistic=fmt.base_statistic).parameter


def _student(fmt: TensorFormat, block: int, histogram: Histogram) -> Fitted:
    """The cube-root codebook of the fitted nu; under rms times the multiplier that was fitted with it."""
    found = fit.fit_nu(histogram, fmt.base_statistic, fmt.mode, fmt.codes, block)
    values = element_table(fmt.with_fitted(found.parameter), block).values
    return Fitted(codebook_table(tuple(found.multiplier * value for value in values)), found.parameter)


def _lloyd(fmt: TensorFormat, block: int, histogram: Histogram) -> ElementTable:
    """Started from the cube-root codebook of the fitted nu."""
    start = replace(started(fmt), nu=None)
    values = _student(start, block, histogram).table.values
    return codebook_table(lloyd.lloyd(histogram, values, pinned=lloyd.pinned_codes(fmt.base_statistic, fmt.codes)))
