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

from core.formats.stored import CENTROIDS, matrix_shape, stored_parts
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat
from core.rounding.grids import GridRounding, GridSettings
from core.rounding.objective import Objective, tiles
from core.rounding.successive import Scales, Table, best_indices, round_to_table
from core.tensors.coded import as_part
from core.tensors.dtypes import SAFETENSORS_NAMES
from core.tensors.encoded import EncodedTensor
from core.tensors.frame import Frame
from core.tensors.nearest import Encoder
from core.tensors.passes import require_finite

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
    columns = "reversed" if chosen.columns == "natural" else chosen.columns or "reversed"
    objective = Objective.of(
        sensitivity.turned(frame.turned, frame.turned_outputs),
        columns=columns,
        damping=chosen.damping or 0.0,
        diagonal=chosen.diagonal,
    )
    indices = frame_indices(frame, objective, chosen.paths or 1)
    return frame.encoded(indices).with_notes(objective.notes)


def frame_indices(frame: Frame, objective: Objective, paths: int = 1) -> torch.Tensor:
    """Indices int32 (rows, columns) into the frame's table; inputs that are always zero take the nearest value."""
    table, rows = Table.of(frame.table), len(frame.matrix)
    is_whole = len(objective.dead) == 0
    empty = torch.empty(frame.matrix.shape, dtype=torch.int32)
    indices = empty if is_whole else torch.from_numpy(nearest(frame, table))
    scales = frame_scales(frame, objective.order)
    for first, last in tiles(rows, objective.inputs):
        targets = objective.targets(objective.rows(frame.matrix, first, last), first)
        given = (objective.factor, table, scales.of_rows(first, last))
        found = round_to_table(targets, *given) if paths == 1 else best_indices(targets, *given, paths)
        indices[first:last, objective.order] = torch.from_numpy(found).T
    return indices


def frame_scales(frame: Frame, order: torch.Tensor) -> Scales:
    """The frame's scales for places in that order of columns."""
    values = np.ascontiguousarray(frame.scales.double().cpu().numpy().T)
    return Scales(values, (order // max(frame.width, 1)).cpu().numpy().astype(np.int64))


def nearest(frame: Frame, table: Table) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """Every weight's nearest index."""
    from core.rounding.successive_jit import nearest_indices

    matrix, scales = frame.matrix.cpu().numpy(), np.ascontiguousarray(frame.scales.double().cpu().numpy())
    found = np.empty(matrix.shape, np.int32)
    nearest_indices(np.ascontiguousarray(matrix), scales, max(frame.width, 1), table.limits, table.upper_on_tie, found)
    return found


def _on_grid(
    weight: torch.Tensor, fmt: TensorFormat, sensitivity: Sensitivity, chosen: RoundingSpec, seed: int
) -> EncodedTensor:
    require_finite(weight)
    shape = tuple(weight.shape)
    matrix = weight.detach().reshape(matrix_shape(shape)).float()
    objective = Objective.of(
        sensitivity, columns=chosen.columns or "natural", damping=chosen.damping or 0.0, diagonal=chosen.diagonal
    )
    encoder = Encoder(matrix.reshape(-1), fmt, shape, None, None)
    stored, factors = encoder.chosen_scales()
    scales = _grid_scales(factors, encoder.grid.width, matrix, objective.order)
    settings = GridSettings(waterfilled=False, shrinks=None, paths=chosen.paths or 1, mmse=0.0, classes=True)
    room = stored_parts(fmt, shape)["codes"][1][0]
    found = GridRounding(matrix, objective, scales, settings, seed).solved(room)
    parts = {"codes": as_part(found.data, room), **stored}
    step = torch.from_numpy(found.values[:1].copy()).float() if objective.inputs else torch.ones(1)
    parts |= {"step": step, "centroids": torch.zeros(CENTROIDS).half()}
    return EncodedTensor(fmt, shape, SAFETENSORS_NAMES[weight.dtype], parts, objective.notes)


def _grid_scales(factors: torch.Tensor, width: int, matrix: torch.Tensor, order: torch.Tensor) -> Scales:
    rows, columns = matrix.shape
    if factors.numel() == 1:
        return Scales(np.full((1, rows), float(factors)), np.zeros(len(order), np.int64))
    blocks = -(-columns // max(min(width, columns), 1))
    values = np.ascontiguousarray(factors.double().reshape(rows, blocks).cpu().numpy().T)
    return Scales(values, (order // max(min(width, columns), 1)).cpu().numpy().astype(np.int64))
