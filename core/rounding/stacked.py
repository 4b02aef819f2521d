"""Rounding of tensors that are not one layer's matrix (out, in): inputs stored as rows, or a stack of experts.

A tensor (in, out) is rounded as the layer's matrix, its scales and codes stay where they are stored. A stack (experts,
out, in) or (experts, in, out) is rounded expert by expert, each by the inputs that were routed to it; what the format
has once for the tensor (a table, a common scale, an entropy code) is common to all of them. An expert that no token
reached takes all its inputs for equal and independent.

Promise: what is stored has the same parts as when the tensor is rounded whole. Where a method cannot do it in a format,
`round_parts` answers the reason and no codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from core.formats.stored import matrix_shape, stored_parts
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat
from core.rounding.framed import frame_codes, has_frame_codes
from core.rounding.stacked_grid import round_on_grid
from core.rounding.turned import TurnedFrame
from core.rounding.views import Notes, of_experts, views
from core.tensors.dtypes import SAFETENSORS_NAMES
from core.tensors.encoded import EncodedTensor
from core.tensors.frame import Frame
from core.tensors.nearest import encode_nearest, entropy_coded
from core.tensors.packing import pack_planes
from core.tensors.rotation import RandomRotation

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity

Method = Callable[[torch.Tensor, TensorFormat, "Sensitivity", RoundingSpec, int], EncodedTensor]
_ONE_ROW_ONE_INPUT = "a codebook's weights share one input, which makes none of them count more"
_ROW_PARTS = ({"codes", "scales"}, {"codes", "scales", "codebook"})


def round_parts(
    weight: torch.Tensor, fmt: TensorFormat, sensitivity: Sensitivity, spec: RoundingSpec, seed: int, method: Method
) -> EncodedTensor | str:
    """The tensor rounded by the statistics of its layers, or why `spec`'s method cannot in this format.

    `method` rounds one layer's matrix. Raises what it raises.
    """
    shape = tuple(weight.shape)
    mixed = fmt.rotation == "rotate" and RandomRotation.of(0, shape).both_sides
    if mixed and sensitivity.experts is not None:
        return "the rotation mixes its experts"
    if spec.name == "squeezellm" and (sensitivity.transposed or not fmt.has_row_codebooks):
        encoded = encode_nearest(weight, fmt, seed=seed, row_weights=sensitivity.row_weights)
        return encoded.with_notes((_ONE_ROW_ONE_INPUT,)) if fmt.has_row_codebooks else encoded
    if has_frame_codes(spec) and not fmt.is_grid:
        return _in_one_frame(weight, fmt, sensitivity, spec, seed)
    if fmt.is_grid:
        return round_on_grid(weight, fmt, sensitivity, spec)
    if sensitivity.transposed:
        return f"{spec.name} fits scales to inputs, which are its rows"
    return _joined(weight, fmt, sensitivity, spec, seed, method)


def _in_one_frame(
    weight: torch.Tensor, fmt: TensorFormat, sensitivity: Sensitivity, spec: RoundingSpec, seed: int
) -> EncodedTensor:
    frame = Frame.of(weight, fmt, seed=seed, row_weights=sensitivity.row_weights)
    indices, notes = torch.empty(tuple(frame.matrix.shape), dtype=torch.int32), list[Notes]()
    for view in views(frame.shape, sensitivity):
        rows = slice(view.first, view.last)
        part = replace(frame, matrix=frame.matrix[rows], scales=frame.scales[rows])
        found, said = frame_codes(TurnedFrame.seen(part) if view.transposed else part, view.sensitivity, spec)
        indices[rows] = found.T if view.transposed else found
        notes.append(view.notes or said)
    return frame.encoded(indices).with_notes(of_experts(notes))


def _joined(
    weight: torch.Tensor, fmt: TensorFormat, sensitivity: Sensitivity, spec: RoundingSpec, seed: int, method: Method
) -> EncodedTensor | str:
    """Experts encoded one by one and put together, where everything but the codes belongs to single rows."""
    shape, plain = tuple(weight.shape), fmt.without_code
    if fmt.outlier_rule or fmt.granularity == "tensor":
        return "what its format has once for all experts"
    if set(stored_parts(plain, shape)) != _ROW_PARTS[fmt.has_row_codebooks]:
        return "what its format has once for all experts"
    matrix, found, notes = weight.reshape(matrix_shape(shape)), list[EncodedTensor](), list[Notes]()
    for view in views(shape, sensitivity):
        one = method(view.layer(matrix), plain, view.sensitivity, spec, seed)
        found.append(one)
        notes.append((*view.notes, *one.notes))
    codes = torch.cat([one.all_codes() for one in found])
    parts = {"codes": torch.cat(pack_planes(codes, plain.codes)) if codes.numel() else codes.to(torch.uint8)}
    for name in set(found[0].stored) - {"codes"}:
        parts[name] = torch.cat([one.stored[name] for one in found])
    encoded = EncodedTensor(plain, shape, SAFETENSORS_NAMES[weight.dtype], parts)
    encoded = encoded if plain == fmt else entropy_coded(encoded, fmt)
    return encoded.with_notes(of_experts(notes))
