"""WaterSIC: successive rounding with a step for every input dimension, which waterfilling gives.

Steps c / L_ii make every column add the same distortion, so that the rate is 0.2546 bit above the limit whatever the
inputs are; the entropy coder pays each column what it needs (data-aware rounding, section 4). What goes beyond the
paper (section 5, and the search over several paths, which is not in it): codes by classes of columns, damping towards
zero, rows searched with several paths at a price for bits, scales of columns in a byte each. The paper's method is
`paths: 1, mmse_damping: 0, classes: false`; with one path, `columns: pivot` is the best order, with several it is the
natural one, which leaves correlated columns beside each other. Formats: grids with scales of columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from core.formats.stored import scale_dtype, stored_parts
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat
from core.rounding.grid_layer import GridLayer
from core.rounding.grids import GridRounding, GridSettings
from core.rounding.rescale import Fit, Numbers, scale_parts, stored_fit
from core.rounding.successive import Scales
from core.tensors.coded import as_part
from core.tensors.dtypes import SAFETENSORS_NAMES, TORCH_DTYPES
from core.tensors.encoded import EncodedTensor

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity

_LOW_RATE, _MMSE = 2.5, (0.5, 0.25)  # f up to that rate, and above it
_RESCALINGS = 8


def round_tensor(
    weight: torch.Tensor, fmt: TensorFormat, sensitivity: Sensitivity, spec: RoundingSpec, seed: int
) -> EncodedTensor:
    """A weight of any shape in a grid with scales of columns, in the bytes that the format plans."""
    chosen, shape = spec.filled, tuple(weight.shape)
    layer = GridLayer.of(weight, sensitivity, chosen)
    matrix, objective = layer.weight, layer.objective
    damping = chosen.mmse_damping
    settings = GridSettings(
        waterfilled=True,
        shrinks=bool(chosen.shrinkage),
        paths=chosen.paths or 1,
        mmse=_MMSE[fmt.bits > _LOW_RATE] if damping is None else damping,
        classes=bool(chosen.classes),
    )
    ones = Scales.ones(len(matrix), objective.inputs)
    room = stored_parts(fmt, shape)["codes"][1][0]
    found = GridRounding(matrix, objective, ones, settings, seed).solved(room)
    numbers = Numbers(matrix, torch.from_numpy(found.numbers), objective)
    fit = _fit(numbers, torch.from_numpy(found.values.copy()), fmt, rescales=bool(chosen.rescale))
    cost = numbers.cost(fit)
    fit = replace(fit, columns=fit.columns * layer.unit)
    scales = fit.rows if fmt.granularity == "channel" else torch.ones(1)
    parts = {
        "codes": as_part(found.data, room),
        "scales": scales.to(TORCH_DTYPES[scale_dtype(fmt)]),
        **scale_parts(fit, objective, matrix.shape[1]),
    }
    return layer.or_nearest(weight, EncodedTensor(fmt, shape, SAFETENSORS_NAMES[weight.dtype], parts), cost)


def _fit(numbers: Numbers, columns: torch.Tensor, fmt: TensorFormat, *, rescales: bool) -> Fit:
    """The scales of rows and columns, as they are stored, from those of columns by which numbers were rounded."""
    start = Fit(torch.ones(len(numbers.weight), dtype=torch.float64), columns)
    if not rescales or not numbers.numbers.numel():
        return start
    if fmt.granularity != "channel":
        return numbers.columns_stored(start)
    fit = stored_fit(numbers.fitted(start, rounds=_RESCALINGS), has_rows=False)
    fit = stored_fit(numbers.rows_fitted(fit), has_rows=True)
    return min((start, fit), key=numbers.excess)
