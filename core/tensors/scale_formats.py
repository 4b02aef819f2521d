"""How scales are stored: rounding a block's statistic to a number format, and back.

The stored scale is what weights are divided by and what they are decoded with (optimal formats, section 5.2).

    bf16, fp16, fp32   nearest, ties to even; a block that is not 0 never gets a scale of 0, and no value of the table
                       times a scale exceeds fp32
    e8m0[-rule]        2^E, E by the rule (hardware formats, section 2), all of them exact; zero takes the smallest.
                       floor: floor(log2 a) - emax (OCP MX); ceil, even, midmax: one more where a lies above it;
                       rceil: the smallest E with a <= end 2^E, so that nothing is clipped
    e4m3               E4M3 of scale / g, at least 2^-9, with g = largest scale / 448 in fp32 (NVFP4's two levels)
    dq8                8-bit dynamic codes of scale - mean in blocks of 256 (bitsandbytes' double quantisation)

E8M0 keeps to its exponents where nothing else is said, so the rules that raise the exponent decode the top binade of
fp32 to infinity, as every reader of MX does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import lru_cache

import torch

from core.errors import InvalidFormat
from core.formats import floating
from core.formats.elements import ElementTable
from core.formats.stored import DOUBLE_BLOCK
from core.recipe.tensor_format import TensorFormat

_E8M0_BIAS = 127
_E8M0_LARGEST = 254
_FP32_MANTISSA = 23
_FP32_LARGEST = torch.finfo(torch.float32).max
_FP32_NORMAL = torch.finfo(torch.float32).smallest_normal
_E4M3_LARGEST = 448.0
_E4M3_SMALLEST = 2.0**-9
_FOUR_SIX_LARGEST = 256.0  # leaves room for the scale that puts a block's maximum at 4
_E4M3_MIDMAX = 464.0
_FP16_LARGEST = 65520.0  # rounds to infinity
_FP16_SMALLEST = 2.0**-24
_SPACING = 2.0**-23
_SEGMENT = 4096
_STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def end_of(fmt: TensorFormat, table: ElementTable) -> float:
    """The value of the table that the statistic is put at: an end of it; under rms 1, for integers highest / sqrt 3."""
    if fmt.base_statistic == "rms":
        return table.values[-1] / math.sqrt(3) if fmt.family == "int" else 1.0
    return table.signmax_end if fmt.base_statistic == "signmax" else table.absmax_end


def tensor_scale(fmt: TensorFormat, table: ElementTable, largest: torch.Tensor) -> torch.Tensor | None:
    """What all e4m3 scales of a tensor are multiplied with, (1,) fp32; None for other scale formats.

    `largest`: the largest magnitude of the tensor's statistics.
    """
    if fmt.scale_format != "e4m3":
        return None
    room = _FOUR_SIX_LARGEST if fmt.statistic == "fouroversix" else _E4M3_LARGEST
    quotient = largest.abs().reshape(1) / largest.new_tensor(room * abs(end_of(fmt, table)))
    constant = quotient.clamp_(max=_largest_scale(_E4M3_LARGEST * _outermost(table), torch.float32))
    rounded_up = torch.nextafter(constant, torch.full_like(constant, math.inf))
    constant = torch.where(constant < _FP32_NORMAL, rounded_up, constant)
    return torch.where(largest == 0, torch.ones_like(constant), constant)


def stored_scales(
    fmt: TensorFormat,
    table: ElementTable,
    extreme: torch.Tensor,
    constant: torch.Tensor | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """Statistics of blocks as stored scales, flat; `factor` multiplies them before they are rounded (a power of two
    for e8m0). dq8 scales stay fp32 here: `double_quantised` codes them together.
    """
    if fmt.scale_format.startswith("e8m0"):
        return _e8m0(fmt, table, extreme, round(math.log2(factor)))
    wanted = extreme / extreme.new_tensor(end_of(fmt, table))  # by a number, CUDA would multiply with its inverse
    wanted = wanted if factor == 1 else wanted * factor
    if fmt.scale_format == "e4m3":
        return _e4m3(wanted / _given(constant), keeps_zero=table.values[table.zero] != 0)
    return _rounded(wanted, extreme, table, _STORED.get(fmt.scale_format, torch.float32))


def decoded_scales(fmt: TensorFormat, stored: torch.Tensor, constant: torch.Tensor | None = None) -> torch.Tensor:
    """Stored scales as fp32, exactly but for e4m3's product with the tensor's own scale."""
    if fmt.scale_format.startswith("e8m0"):
        return _powers(stored)
    if fmt.scale_format == "e4m3":
        return stored.float() * _given(constant)
    return stored.float()


def double_quantised(scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """fp32 scales (n,) that are not negative -> parts `scales` (codes), `scale_offset`, `scale_absmax`."""
    offset = (_sum(scales.double()) / max(scales.numel(), 1)).float().reshape(1)
    padding = -scales.numel() % DOUBLE_BLOCK
    blocks = torch.nn.functional.pad(scales - offset, (0, padding)).view(-1, DOUBLE_BLOCK)
    largest = blocks.abs().amax(dim=1)
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    levels = torch.tensor(dynamic_code(), dtype=torch.float32, device=scales.device).double()
    codes = torch.bucketize(blocks.double() / unit.double()[:, None], (levels[1:] + levels[:-1]) / 2)
    return {
        "scales": codes.to(torch.uint8).reshape(-1)[: scales.numel()],
        "scale_offset": offset,
        "scale_absmax": largest,
    }


def undo_double(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The scales of `double_quantised` parts, flat fp32, none negative."""
    codes = parts["scales"].reshape(-1)
    levels = torch.tensor(dynamic_code(), dtype=torch.float32, device=codes.device)
    largest = parts["scale_absmax"].repeat_interleave(DOUBLE_BLOCK)[: codes.numel()]
    return (levels[codes.long()] * largest + parts["scale_offset"]).clamp_(min=0)


@lru_cache(maxsize=1)
def dynamic_code() -> tuple[float, ...]:
    """The 256 values of bitsandbytes' signed dynamic code, ascending (codebooks, section 1)."""
    positive = []
    for power in range(7):
        edges = [0.1 + 0.9 * step / (1 << power) for step in range((1 << power) + 1)]
        positive += [10.0 ** (power - 6) * (low + high) / 2 for low, high in itertools.pairwise(edges)]
    return tuple(sorted([-value for value in positive] + positive + [0.0, 1.0]))


def e4m3_values() -> torch.Tensor:
    """The 126 positive finite values of E4M3, ascending fp32."""
    return torch.tensor(floating.magnitudes(4, 3, "")[1:])


def _powers(stored: torch.Tensor) -> torch.Tensor:
    """E8M0 as fp32 by its bits: an exponent field, but for 2^-127, which is subnormal, and for NaN."""
    patterns = stored.to(torch.int32) << _FP32_MANTISSA
    patterns = torch.where(stored == 0, 1 << (_FP32_MANTISSA - 1), patterns)
    return torch.where(stored > _E8M0_LARGEST, torch.nan, patterns.view(torch.float32))


def _given(constant: torch.Tensor | None) -> torch.Tensor:
    return torch.ones(1) if constant is None else constant


def _rounded(wanted: torch.Tensor, extreme: torch.Tensor, table: ElementTable, dtype: torch.dtype) -> torch.Tensor:
    limit = _largest_scale(_outermost(table), dtype)
    rounded = wanted.clamp(-limit, limit).to(dtype)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    vanished = (rounded == 0) & (extreme != 0)  # of `wanted` itself a division may have left 0
    return torch.where(vanished, torch.full_like(rounded, smallest).copysign(wanted.to(dtype)), rounded)


def require_fp16(fmt: TensorFormat, table: ElementTable, largest: torch.Tensor) -> None:
    """InvalidFormat where fp16 cannot hold the scales of a tensor whose largest statistic this is.

    A block far below the others may lose its weights; a tensor whose largest scale is out of range may not.
    """
    wanted = float(largest.abs()) / abs(end_of(fmt, table))
    if fmt.scale_format == "fp16" and wanted and not _FP16_SMALLEST <= wanted < _FP16_LARGEST:
        raise InvalidFormat(
            f"the largest scale of the tensor, {wanted:.3g}, is out of the range of fp16",
            where=str(fmt),
            hint="bf16 scales",
        )


def _outermost(table: ElementTable) -> float:
    """The largest magnitude among the values."""
    return max(-table.values[0], table.values[-1])


@lru_cache(maxsize=256)
def _largest_scale(value: float, dtype: torch.dtype) -> float:
    """The largest number of a dtype whose product with `value` is finite in fp32."""
    decoded = float(torch.tensor(value, dtype=torch.float32))  # as tables are stored
    wanted = torch.tensor(min(_FP32_LARGEST / decoded, torch.finfo(dtype).max), dtype=torch.float64)
    rounded = wanted.to(dtype)
    if float(rounded) > float(wanted):
        integers = torch.int32 if dtype is torch.float32 else torch.int16
        rounded = (rounded.view(integers) - 1).view(dtype)
    return float(rounded)


def _e4m3(ratio: torch.Tensor, *, keeps_zero: bool) -> torch.Tensor:
    """`keeps_zero`: a block of zeros has scale 0, for tables without a zero."""
    clamped = ratio.abs().clamp(_E4M3_SMALLEST, _E4M3_LARGEST)
    signed = torch.where(ratio < 0, -clamped, clamped)
    return torch.where((ratio == 0) & keeps_zero, torch.zeros_like(signed), signed).to(torch.float8_e4m3fn)


def _e8m0(fmt: TensorFormat, table: ElementTable, extreme: torch.Tensor, shift: int) -> torch.Tensor:
    rule = fmt.scale_format.partition("-")[2] or ("floor" if _has_exponent(fmt) else "rceil")
    fraction, exponent = torch.frexp(extreme)  # extreme = fraction * 2^exponent, fraction in [0.5, 1)
    if rule == "rceil" or fmt.base_statistic == "rms":
        end_fraction, end_exponent = math.frexp(end_of(fmt, table))
        power = exponent - end_exponent + (fraction.double() > end_fraction).to(exponent.dtype)
    else:
        largest = table.values[-1]
        emax = math.frexp(largest)[1] - 1
        above = 2 * fraction >= _rise(rule, fmt, largest / 2.0**emax)
        power = exponent - 1 - emax + above.to(exponent.dtype)
    power = torch.where(extreme > 0, power + shift, torch.full_like(power, -_E8M0_BIAS))
    return (power + _E8M0_BIAS).clamp(0, _E8M0_LARGEST).to(torch.uint8)


def _rise(rule: str, fmt: TensorFormat, largest: float) -> float:
    """From which mantissa of the block's maximum on a rule takes the exponent above the floor's.

    `largest`: the mantissa of the table's last value. Both in [1, 2), where fp32 has a spacing of 2^-23.
    """
    if rule == "ceil":
        return 1 + _SPACING
    if rule == "even":
        return 2 - 2.0 ** -(_mantissa_bits(fmt) + 1)
    if rule == "midmax":
        is_fn = fmt.family == "float" and (fmt.exponent_bits, fmt.mantissa_bits, fmt.mode) == (4, 3, "")
        return (_E4M3_MIDMAX / 2.0**8 if is_fn else 1 + largest / 2) + _SPACING
    return 2.0


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Of a flat fp64 tensor, in segments, so that the order does not depend on threads."""
    while values.numel() > _SEGMENT:
        padded = torch.nn.functional.pad(values, (0, -values.numel() % _SEGMENT))
        values = padded.view(-1, _SEGMENT).sum(dim=1)
    return values.sum()


def _has_exponent(fmt: TensorFormat) -> bool:
    return fmt.family == "float" or (fmt.family == "int" and fmt.mode == "mx")


def _mantissa_bits(fmt: TensorFormat) -> int:
    return fmt.mantissa_bits or 0 if fmt.family == "float" else int(fmt.bits) - 2
