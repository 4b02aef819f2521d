"""The nearest value of a table for every weight: the readable reference that all kernels are tested against.

Nearest to the real number weight / scale, decided exactly: limits are products of fp64 table limits with the scale,
compared with the weight itself (optimal formats, section 5.3). For codebooks the index is `#{k : x > fl32(t_k s)}`; for
integers and floats ties go to even. Floats with e4m3 scales take the nearest to fl32(x / s), as every producer of NVFP4
does.
"""

from __future__ import annotations

import torch

from core.formats import integer
from core.formats.elements import ElementTable
from core.recipe.tensor_format import TensorFormat

_FEW = 33  # up to this many values, counting limits is faster than searching


def nearest_indices(blocks: torch.Tensor, scales: torch.Tensor, fmt: TensorFormat, table: ElementTable) -> torch.Tensor:
    """Indices into `table.values` nearest to blocks / scales: (blocks, width) fp32, (blocks,) fp32 -> integers.

    Where a scale is 0 the index is that of the value nearest to 0.
    """
    factors = scales.abs()
    if fmt.base_statistic == "signmax":
        blocks = torch.where(scales[:, None] < 0, -blocks, blocks)
    if uses_quotients(fmt):
        blocks, factors = (blocks / factors[:, None]).nan_to_num_(0.0), torch.ones_like(factors)
    if fmt.family == "int":
        indices = _integer_indices(blocks, factors, fmt)
    elif len(table.values) <= _FEW:
        indices = _counted(blocks, factors, fmt, table)
    else:
        indices = _searched(blocks, factors, fmt, table)
    dead = scales == 0
    if bool(dead.any()):
        indices[dead] = table.zero
    return indices


def uses_quotients(fmt: TensorFormat) -> bool:
    """Whether the fp32 quotient is rounded, and not the real one."""
    return fmt.family == "float" and fmt.scale_format == "e4m3"


def limits_of(
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


def _integer_indices(blocks: torch.Tensor, factors: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """Half to even on the integers' own grid: the quotient in fp64 shows every tie of fp32 numbers exactly.

    Between halves the limits are whole numbers, of which even ones belong below. (Rounding quotient + 1/2 would take
    the least positive quotients for 0.)
    """
    lowest = integer.lowest(fmt.mode, fmt.codes)
    first = 1 if fmt.mode == "mx" else 0  # the stored code that index 0 has
    step = integer.step(fmt.mode, fmt.codes)
    quotients = blocks.double().div_(factors.double()[:, None] * step).nan_to_num_(0.0)
    if lowest == int(lowest):
        levels = quotients.round_()
    else:
        levels = quotients.floor()
        levels.sub_(((levels == quotients) & (levels.remainder(2) == 0)).double()).add_(0.5)
    indices = levels.sub_(lowest).clamp_(first, fmt.codes - 1).sub_(first)
    return indices.to(torch.uint8 if fmt.codes <= 256 else torch.int32)


def _counted(blocks: torch.Tensor, factors: torch.Tensor, fmt: TensorFormat, table: ElementTable) -> torch.Tensor:
    """How many limits lie below each element."""
    indices = torch.zeros(blocks.shape, dtype=torch.uint8, device=blocks.device)
    for middle, upper in zip(table.limits, table.upper_on_tie, strict=True):
        limits = limits_of(middle, factors, upper, exact=not fmt.is_codebook)
        indices += blocks > limits[:, None]
    return indices


def _searched(blocks: torch.Tensor, factors: torch.Tensor, fmt: TensorFormat, table: ElementTable) -> torch.Tensor:
    """A search in the quotients, then steps down or up where the exact limit says so."""
    count = len(table.values)
    middles = torch.tensor(table.limits, dtype=torch.float64, device=blocks.device)
    upper = torch.tensor(table.upper_on_tie, device=blocks.device)
    quotients = (blocks / factors[:, None]).nan_to_num_(0.0)
    indices = torch.bucketize(quotients, middles.float(), out_int32=True)

    def above(which: torch.Tensor) -> torch.Tensor:
        """Whether the element lies above limit `which`."""
        inside = which.clamp(0, count - 2)
        limits = limits_of(middles[inside], factors[:, None], upper[inside], exact=not fmt.is_codebook)
        return blocks > limits

    while bool(
        (down := (indices > 0) & ~above(indices - 1)).any()
    ):  # once, but for scales so small that limits coincide
        indices -= down.int()
    while bool((up := (indices < count - 1) & above(indices)).any()):
        indices += up.int()
    return indices
