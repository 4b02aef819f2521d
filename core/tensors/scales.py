"""Scales of blocks: the statistic, and its rounding to the number format in which scales are stored.

Statistics are computed in fp32 from the unrounded weights (sums of squares in fp64, in an order that does not depend on
threads); the stored scale is what weights are divided by and what they are decoded with (optimal formats, section 5).
"""

from __future__ import annotations

import torch

from core.formats import floating
from core.formats.elements import ElementTable
from core.recipe.tensor_format import TensorFormat

_SEGMENT = 4096
_E8M0_BIAS = 127
_E8M0_LARGEST = 254
_STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def absmax(blocks: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row of (blocks, width), fp32."""
    if blocks.shape[1] == 0:
        return blocks.new_zeros(blocks.shape[0])
    low, high = torch.aminmax(blocks, dim=1)
    return torch.maximum(high, -low)


def signed_extreme(blocks: torch.Tensor) -> torch.Tensor:
    """The element of largest magnitude of each row, with its sign; the first one of equals."""
    if blocks.shape[1] == 0:
        return blocks.new_zeros(blocks.shape[0])
    low, high = torch.aminmax(blocks, dim=1)
    extreme = torch.where(high > -low, high, low)
    tied = (high == -low) & (high > 0)
    if bool(tied.any()):
        rows = blocks[tied]
        first = (rows.abs() == high[tied][:, None]).to(torch.uint8).argmax(dim=1, keepdim=True)
        extreme[tied] = rows.gather(1, first).squeeze(1)
    return extreme


def sum_of_squares(blocks: torch.Tensor) -> torch.Tensor:
    """Of each row, fp64; row segments are summed on their own first, so the order is the same for any thread count."""
    squares = blocks.double().square_()
    while squares.shape[1] > _SEGMENT:
        padding = -squares.shape[1] % _SEGMENT
        squares = torch.nn.functional.pad(squares, (0, padding)).view(squares.shape[0], -1, _SEGMENT).sum(dim=2)
    return squares.sum(dim=1)


def wanted_scales(
    fmt: TensorFormat, table: ElementTable, extreme: torch.Tensor, squares: torch.Tensor, counts: torch.Tensor | int
) -> torch.Tensor:
    """Scales before rounding, fp32. `extreme`: absmax, or the signed one under signmax; unused under rms."""
    if fmt.statistic == "rms":
        return (squares / counts).sqrt().float()
    if fmt.statistic == "signmax":
        return extreme / table.signmax_end
    if fmt.scale_format == "e8m0" and fmt.family == "float":
        return extreme  # the OCP rule starts from the absmax itself
    return extreme / table.absmax_end


def stored_scales(fmt: TensorFormat, wanted: torch.Tensor) -> torch.Tensor:
    """Scales in the dtype in which they are stored: bf16, fp16, fp32, or uint8 for e8m0.

    bf16 and fp16: nearest, ties to even, finite; a scale that is not 0 does not become 0. e8m0: 2^ceil(log2 s), for
    floats the OCP rule 2^(floor(log2 absmax) - emax); zero takes the smallest.
    """
    if fmt.scale_format == "e8m0":
        return _e8m0(fmt, wanted)
    dtype = _STORED[fmt.scale_format]
    limit = torch.finfo(dtype).max
    rounded = wanted.clamp(-limit, limit).to(dtype)
    if dtype is torch.float32:
        return rounded
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    vanished = (rounded == 0) & (wanted != 0)
    return torch.where(vanished, torch.sign(wanted).to(dtype) * smallest, rounded)


def decoded_scales(fmt: TensorFormat, stored: torch.Tensor) -> torch.Tensor:
    """Stored scales as fp32, exactly."""
    if fmt.scale_format != "e8m0":
        return stored.float()
    exponent = stored.to(torch.int32) - _E8M0_BIAS
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _e8m0(fmt: TensorFormat, wanted: torch.Tensor) -> torch.Tensor:
    fraction, exponent = torch.frexp(wanted)  # wanted = fraction * 2^exponent, fraction in [0.5, 1)
    if fmt.family == "float":
        power = exponent - 1 - floating.largest_exponent(fmt.exponent_bits or 0, fmt.mantissa_bits or 0, fmt.mode)
    else:
        power = exponent - (fraction == 0.5).to(exponent.dtype)
    power = torch.where(wanted > 0, power, torch.full_like(power, -_E8M0_BIAS))
    return (power + _E8M0_BIAS).clamp(0, _E8M0_LARGEST).to(torch.uint8)
