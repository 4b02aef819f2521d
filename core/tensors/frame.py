"""All of an encoded tensor but its codes: the table and the scales that rounding to nearest would take, fixed.

Data-aware rounding chooses codes column by column while what is stored around them stands still. Promise: `encoded` of
the nearest indices is, bit for bit, what `encode_nearest` makes (but under dq8, where that rounds by the scales before
they are quantised themselves, and of fp64 weights, which that rounds to fp32 first), and a code stands for fl32(value *
scale), as it is decoded. Formats whose weights are not each a value of one table times a scale have no frame:
InvalidFormat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from core.errors import InvalidFormat
from core.formats.elements import ElementTable, stored_codes
from core.formats.stored import matrix_shape
from core.recipe.tensor_format import TensorFormat
from core.tensors import rotation
from core.tensors.blocks import BlockGrid
from core.tensors.dtypes import FLOATING, SAFETENSORS_NAMES
from core.tensors.encoded import EncodedTensor
from core.tensors.kernels import cpu_packing
from core.tensors.nearest import Encoder, entropy_coded, prepared
from core.tensors.packing import pack_planes
from core.tensors.passes import require_finite

_BYTE = 256


@dataclass(frozen=True)
class Frame:
    """`matrix`: the weights as they are coded, fp32 (rows, columns), rotated where the format rotates; fp64 of fp64
    weights that are not rotated. `scales`: as decoded, fp32 (rows, blocks of a row); column j lies in block j // width.
    `table`: values and limits for scale 1.
    """

    format: TensorFormat
    shape: tuple[int, ...]
    dtype: str
    matrix: torch.Tensor
    table: ElementTable
    scales: torch.Tensor
    width: int
    parts: Mapping[str, torch.Tensor]

    @classmethod
    def of(
        cls, weight: torch.Tensor, fmt: TensorFormat, *, seed: int = 0, row_weights: torch.Tensor | None = None
    ) -> Frame:
        """The frame of a floating tensor of any shape; NonFiniteWeights, InvalidFormat."""
        require_frame(fmt)
        shape, dtype = tuple(weight.shape), SAFETENSORS_NAMES[weight.dtype]
        if dtype not in FLOATING:
            raise InvalidFormat(f"weights of {dtype}", hint=f"one of {', '.join(FLOATING)}")
        require_finite(weight)
        flat, extra = prepared(weight.detach().reshape(-1), fmt, shape, seed, None)
        encoder = Encoder(flat, fmt.without_code, shape, row_weights, None)
        stored, factors = encoder.chosen_scales()
        grid, (rows, columns) = BlockGrid.of(fmt, shape), matrix_shape(shape)
        if grid.one_scale:
            factors = factors.reshape(1).expand(rows)
        return cls(
            format=fmt,
            shape=shape,
            dtype=dtype,
            matrix=(flat if flat.dtype is torch.float64 else flat.float()).reshape(rows, columns),
            table=encoder.table,
            scales=factors.reshape(rows, 1 if grid.one_scale else grid.blocks_per_row),
            width=columns if grid.one_scale else grid.width,
            parts=extra | stored | encoder.table_parts(),
        )

    def turned(self, inputs: torch.Tensor) -> torch.Tensor:
        """Statistics of inputs, (..., columns) along the last dimension, in the basis in which weights are coded."""
        return turned_inputs(inputs, self.format, self.parts, self.shape)

    def turned_outputs(self, outputs: torch.Tensor) -> torch.Tensor:
        """What has a row for each output, (rows, anything), likewise: mixed as the rows of the weights are."""
        if self.format.rotation != "rotate":
            return outputs
        turn = rotation.RandomRotation.of(int(self.parts["seed"]), self.shape)
        return turn.rotate_outputs(outputs)

    def encoded(self, indices: torch.Tensor) -> EncodedTensor:
        """The tensor with these indices into the table's values, integers (rows, columns)."""
        fmt, plain = self.format, self.format.without_code
        patterns = stored_codes(plain, len(self.table.values))
        flat = indices.reshape(-1)
        if patterns is not None:
            flat = torch.tensor(patterns, device=flat.device)[flat.long()]
        codes = torch.cat(_packed(flat, plain.codes)) if flat.numel() else flat.to(torch.uint8)
        encoded = EncodedTensor(plain, self.shape, self.dtype, {"codes": codes, **self.parts})
        return encoded if plain == fmt else entropy_coded(encoded, fmt)


def turned_inputs(
    inputs: torch.Tensor, fmt: TensorFormat, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]
) -> torch.Tensor:
    """Statistics of inputs along the last dimension in the basis of a format's rotation."""
    if fmt.rotation == "hadamard":
        return rotation.rotate_rows(inputs)
    if fmt.rotation == "rotate":
        turn = rotation.RandomRotation.of(int(parts["seed"]), shape)
        return turn.rotate_inputs(inputs)
    return inputs


def require_frame(fmt: TensorFormat) -> None:
    """InvalidFormat for what cannot be rounded column by column in fixed scales."""
    reason = ""
    if fmt.is_block_type:
        reason = "a block type, whose scales are chosen with its codes"
    elif fmt.is_grid:
        reason = "a grid, whose step follows from its codes"
    elif fmt.has_row_codebooks:
        reason = "a codebook of every row"
    elif fmt.is_vector_grid:
        reason = "codes that stand for several weights at once"
    elif fmt.outlier_rule or fmt.is_unbiased:
        reason = "outliers or corrected scales"
    if reason:
        raise InvalidFormat(f"{fmt} has {reason}", where=str(fmt), hint="int4@128, t5_4@64:signmax, or nearest")


def _packed(codes: torch.Tensor, radix: int) -> list[torch.Tensor]:
    if codes.device.type == "cpu" and radix <= _BYTE:
        return cpu_packing.pack_planes(codes.to(torch.uint8).contiguous(), radix)
    return pack_planes(codes, radix)
