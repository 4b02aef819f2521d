"""GPTQ: columns in order, each rounded to the nearest, its error carried on to the columns that are still to come.

On formats with fixed scales this is GPTQ (its scales those of the original weights, as with static groups), from the
first column to the last; on grids it is HPTQ, one step for all columns and an entropy code, from the last column to the
first, as the theory of the gap has it (data-aware rounding, section 9.1). `paths` above one searches the codes of a row
together, which neither has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from core.formats.stored import CENTROIDS, stored_parts
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat
from core.rounding.grid_layer import GridLayer
from core.rounding.grids import GridRounding, GridSettings
from core.rounding.levels import Levels
from core.rounding.objective import Objective, tiles
from core.rounding.successive import Scales, best_indices, spread
from core.tensors.coded import as_part
from core.tensors.dtypes import SAFETENSORS_NAMES
from core.tensors.encoded import EncodedTensor
from core.tensors.frame import Frame
from core.tensors.nearest import Encoder

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity


def round_tensor(
    weight: torch.Tensor, fmt: TensorFormat, sensitivity: Sensitivity, spec: RoundingSpec, seed: int
) -> EncodedTensor:
    """A weight of any shape, in a grid or a format with a frame (`core.tensors.frame`)."""
    chosen = spec.filled
    if fmt.is_grid:
        return _on_grid(weight, fmt, sensitivity, chosen, seed)
    frame = Frame.of(weight, fmt, seed=seed, row_weights=sensitivity.row_weights)
    indices, notes = frame_codes(frame, sensitivity, chosen)
    return frame.encoded(indices).with_notes(notes)


def frame_codes(frame: Frame, sensitivity: Sensitivity, spec: RoundingSpec) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Indices int32 (rows, columns) of a frame that is given, and what to note."""
    chosen = spec.filled
    objective = Objective.of(
        sensitivity.turned(frame.turned, frame.turned_outputs),
        columns="reversed" if chosen.columns in (None, "natural") else chosen.columns,
        damping=chosen.damping or 0.0,
        diagonal=chosen.diagonal,
    )
    return frame_indices(frame, objective, chosen.paths or 1), objective.notes


def frame_indices(frame: Frame, objective: Objective, paths: int = 1) -> torch.Tensor:
    """Indices int32 (rows, columns) into the frame's table; inputs that are always zero take the nearest value."""
    from core.tensors.entropy.tables_jit import transpose

    levels, (rows, columns) = Levels.of(frame), frame.matrix.shape
    indices = np.empty((rows, columns), np.int32)
    ratios = (objective.factor / objective.units).flip(0, 1)  # what the error of a place is worth to an earlier one
    for first, last in tiles(rows, columns):
        here, weight = levels.rows(first, last), objective.rows(frame.matrix, first, last)
        turned = np.empty((columns, last - first), np.int32)
        if len(objective.dead):
            dead = objective.dead.cpu().numpy()
            turned[dead] = here.nearest(frame.matrix[first:last].cpu().double()).T[dead]
        if paths == 1:
            wanted = objective.optimum(weight, first).flip(1).T.contiguous()
            places = objective.order.flip(0)
            found = spread(wanted.clone(), wanted, ratios, here.ordered(places))
        else:
            targets = objective.targets(weight, first)
            places = objective.order
            found = best_indices(targets, objective.factor, here.ordered(places), paths)
        turned[places.cpu().numpy()] = found
        transpose(turned, indices[first:last])
    return torch.from_numpy(indices).to(frame.matrix.device)


def _on_grid(
    weight: torch.Tensor, fmt: TensorFormat, sensitivity: Sensitivity, chosen: RoundingSpec, seed: int
) -> EncodedTensor:
    shape, layer = tuple(weight.shape), GridLayer.of(weight, sensitivity, chosen)
    matrix, objective = layer.weight, layer.objective
    encoder = Encoder(weight.detach().reshape(-1), fmt, shape, None, None)
    stored, factors = encoder.chosen_scales()
    scales = _grid_scales(factors.double() / layer.unit, encoder.grid.width, matrix, objective.order)
    paths, code = chosen.paths or 1, fmt.entropy_code or "rans"
    settings = GridSettings(waterfilled=False, shrinks=None, paths=paths, mmse=0.0, classes=True, code=code)
    room = stored_parts(fmt, shape)["codes"][1][0]
    found = GridRounding(matrix, objective, scales, settings, seed).solved(room)
    parts = {"codes": as_part(found.data, room), **stored}
    step = torch.from_numpy(found.values[:1].copy()).float() if objective.inputs else torch.ones(1)
    parts |= {"step": step, "centroids": torch.zeros(CENTROIDS).half()}
    encoded = EncodedTensor(fmt, shape, SAFETENSORS_NAMES[weight.dtype], parts)
    return layer.or_nearest(weight, encoded, layer.cost(encoded))


def _grid_scales(factors: torch.Tensor, width: int, matrix: torch.Tensor, order: torch.Tensor) -> Scales:
    rows, columns = matrix.shape
    if factors.numel() == 1:
        return Scales(np.full((1, rows), float(factors)), np.zeros(len(order), np.int64))
    blocks = -(-columns // max(min(width, columns), 1))
    values = np.ascontiguousarray(factors.double().reshape(rows, blocks).cpu().numpy().T)
    return Scales(values, (order // max(min(width, columns), 1)).cpu().numpy().astype(np.int64))
