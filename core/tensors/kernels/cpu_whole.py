"""Encoding in one pass on the CPU: statistic, scale, codes and nibbles of a tile of blocks before the next one.

Equal bit for bit to statistics, scales and codes one after the other; what it saves is memory traffic and calls. For
formats whose scales depend on their blocks alone and whose codes the loop of limits finds (`Method.COUNT`): all of up
to 16 values, and codebooks of up to 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from core.formats.elements import ElementTable, stored_codes
from core.recipe.tensor_format import TensorFormat
from core.tensors.blocks import BlockGrid
from core.tensors.indices import uses_quotients
from core.tensors.kernels import cpu, cpu_packing
from core.tensors.kernels.cpu_rule import Method, RoundingRule, rounding_rule
from core.tensors.kernels.gpu_plan import ScaleRounding, statistic_refusal

_NIBBLES = 16
_MANTISSA, _BIAS = 23, 127
_SCALES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_E8M0 = 3
_STATISTICS = {"absmax": 0, "signmax": 1, "rms": 2}


@dataclass(frozen=True, eq=False)
class OnePass:
    """What the loop needs to know of a format: `statistic` and `scaling` as numbers, see `cpu_jit.round_scales`."""

    radix: int
    statistic: int
    scaling: tuple[int, float, int, int, int]
    rule: RoundingRule

    def encode(
        self,
        flat: torch.Tensor,
        start: int,
        stop: int,
        blocks: tuple[int, int],
        scales: torch.Tensor,
        planes: list[torch.Tensor],
    ) -> int | None:
        """Stored scales and packed codes of `flat[start:stop]`; the index of the first NaN or infinity, if any.

        `blocks`: columns and width (`cpu`). `scales`: flat, in their stored dtype. `planes`: the bytes of each plane.
        """
        from core.tensors.kernels import cpu_jit

        fits = not any(count % cpu.ROOM for count in blocks)
        bits = cpu.bits_of(flat[start:stop] if fits else cpu.roomy(flat, start, stop))
        starts, factors = cpu.starts_of(stop - start, *blocks), np.empty(scales.numel(), np.float32)
        packs, rule = self.radix == _NIBBLES, self.rule
        out = planes[0].numpy() if packs else np.empty(stop - start + cpu.ROOM, np.uint8)
        given = (bits, starts, cpu.KINDS[flat.dtype], self.statistic, self.scaling)
        rounding = (rule.exact, rule.zero, rule.middle, rule.first)
        largest = cpu_jit.encode_blocks(*given, rounding, rule.limits, rule.upper_on_tie, factors, packs, out)
        if largest >= cpu.INFINITY[flat.dtype]:
            return cpu.first_not_finite(flat[start:stop])
        decoded = torch.from_numpy(factors)
        scales.copy_(decoded.view(torch.int32) >> _MANTISSA if self.scaling[0] == _E8M0 else decoded)
        if not packs:
            found = cpu_packing.pack_planes(torch.from_numpy(out[: stop - start]), self.radix)
            for target, plane in zip(planes, found, strict=True):
                target.copy_(plane)
        return None


def one_pass(fmt: TensorFormat, table: ElementTable, grid: BlockGrid) -> OnePass | None:
    """The pass of a format with that table; None where it takes more than one, or there is nothing to do.

    fp16 scales take two: whether they can hold the tensor is decided by all its statistics.
    """
    if statistic_refusal(fmt, grid) or fmt.scale_format == "fp16" or not grid.elements:
        return None
    return _one_pass(fmt, table)


@lru_cache(maxsize=64)
def _one_pass(fmt: TensorFormat, table: ElementTable) -> OnePass | None:
    patterns = stored_codes(fmt, len(table.values))
    rule = rounding_rule(table, exact=not fmt.is_codebook, stored=patterns, quotients=uses_quotients(fmt))
    if rule.method is not Method.COUNT or rule.stored is not None:
        return None
    return OnePass(fmt.codes, _STATISTICS[fmt.base_statistic], _scaling(ScaleRounding.of(fmt, table)), rule)


def _scaling(rounding: ScaleRounding) -> tuple[int, float, int, int, int]:
    if rounding.kind == "e8m0":
        return _E8M0, 1.0, 0, rounding.rise, rounding.offset + _BIAS
    dtype = _SCALES[rounding.kind]
    integers = torch.int32 if dtype is torch.float32 else torch.int16
    largest = torch.tensor([rounding.largest], dtype=integers).view(dtype).float()
    return cpu.KINDS[dtype], rounding.end, int(largest.view(torch.int32)), 0, 0
