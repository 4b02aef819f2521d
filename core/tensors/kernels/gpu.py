"""Encoding and decoding on a GPU by Triton kernels: the same bits as the reference in torch, in one pass.

Each function answers None for what the kernels do not take, and the caller falls back to the reference; the reason is
logged once. Taken are codes of 1 to 8 bits whose number is a power of two, on CUDA devices of compute capability 8.0
and above, and on any device in Triton's interpreter (TRITON_INTERPRET=1 before the first call). Nothing here waits for
the device: whether all weights are finite is found on the way and left to the caller to ask.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import structlog
import torch

from core.formats import integer
from core.formats.elements import ElementTable
from core.formats.stored import packed_bytes, scale_dtype, scale_shape
from core.recipe.tensor_format import TensorFormat
from core.tensors.blocks import BlockGrid
from core.tensors.dtypes import TORCH_DTYPES
from core.tensors.kernels import gpu_plan
from core.tensors.kernels.gpu_launch import GIVEN_SCALES, OUTPUTS, WEIGHTS, Encoding, decoding
from core.tensors.kernels.gpu_plan import Element, Geometry, ScaleRounding

if TYPE_CHECKING:
    from core.tensors.encoded import EncodedTensor

log = structlog.get_logger()

_OLDEST = (8, 0)


class GpuCodes(NamedTuple):
    """`codes`: packed, uint8. `scales`: as stored, in their shape. `finite`: bool (), False for NaN or infinity."""

    codes: torch.Tensor
    scales: torch.Tensor
    finite: torch.Tensor


def encode(weight: torch.Tensor, fmt: TensorFormat, table: ElementTable) -> GpuCodes | None:
    """Codes and scales of a dense tensor (outliers set aside, rotated already); None where kernels do not take it.

    `table`: the element's, fitted where the format leaves that open. Where `finite` is False the codes mean nothing.
    """
    grid = BlockGrid.of(fmt, tuple(weight.shape))
    if reason := _encoding_refusal(weight, fmt, grid) or gpu_plan.statistic_refusal(fmt, grid):
        return _say_once("encode", reason)
    work, rounding = _encoding(weight, fmt, table, grid), ScaleRounding.of(fmt, table)
    codes = _empty_codes(work, grid)
    scales = torch.empty(
        scale_shape(fmt, tuple(weight.shape)), dtype=TORCH_DTYPES[scale_dtype(fmt)], device=weight.device
    )
    damaged = torch.zeros(1, dtype=torch.int32, device=weight.device)
    with on_device(weight.device):
        if work.geometry.chunks == 1:
            work.whole(rounding, codes, scales, damaged).run()
        else:
            factors = torch.empty(grid.blocks, dtype=torch.float32, device=weight.device)
            work.scales(rounding, scales, factors, damaged).run()
            work.codes(factors, codes).run()
    return GpuCodes(codes, scales, damaged[0] == 0)


def encode_codes(
    weight: torch.Tensor, fmt: TensorFormat, table: ElementTable, factors: torch.Tensor
) -> torch.Tensor | None:
    """Packed codes for scales that were chosen already: `factors` are the decoded ones, (blocks,) fp32.

    For scales that are searched, coded twice or shared by the whole tensor. None where kernels do not take it.
    """
    grid = BlockGrid.of(fmt, tuple(weight.shape))
    if reason := _encoding_refusal(weight, fmt, grid):
        return _say_once("encode", reason)
    work = _encoding(weight, fmt, table, grid)
    codes = _empty_codes(work, grid)
    with on_device(weight.device):
        work.codes(factors.contiguous(), codes).run()
    return codes


def decode(encoded: EncodedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """The flat dense elements, fp32 or bf16, before rotation and outliers; None where kernels do not take it."""
    fmt, grid, device = encoded.format, encoded.grid, encoded.codes.device
    reason = device_refusal(device) or gpu_plan.refusal(fmt, grid)
    if not reason and dtype not in OUTPUTS:
        reason = f"no output of {dtype}"
    if reason:
        return _say_once("decode", reason)
    out = torch.empty(grid.elements, dtype=dtype, device=device)
    scales = encoded.scale_values if fmt.scale_format in GIVEN_SCALES else encoded.scales
    with on_device(device):
        table = _table_by_code(encoded)
        decoding(fmt, Geometry.for_decoding(grid), encoded.codes, scales.reshape(-1), table, out).run()
    return out


def _encoding(weight: torch.Tensor, fmt: TensorFormat, table: ElementTable, grid: BlockGrid) -> Encoding:
    flat = weight.detach().reshape(-1)
    return Encoding(flat, fmt, Geometry.of(grid), Element.of(fmt, table))


def _empty_codes(work: Encoding, grid: BlockGrid) -> torch.Tensor:
    return torch.empty(packed_bytes(work.fmt.codes, grid.elements), dtype=torch.uint8, device=work.flat.device)


def _table_by_code(encoded: EncodedTensor) -> torch.Tensor:
    """fp32 values of all codes; those that no table has take its last value."""
    fmt = encoded.format
    if fmt.family == "int":
        levels = torch.arange(fmt.codes, dtype=torch.float32, device=encoded.codes.device)
        return (levels + integer.lowest(fmt.mode, fmt.codes)) * integer.step(fmt.mode, fmt.codes)
    return torch.cat((encoded.table, encoded.table[-1:].expand(fmt.codes - encoded.table.numel())))


def _encoding_refusal(weight: torch.Tensor, fmt: TensorFormat, grid: BlockGrid) -> str | None:
    if weight.dtype not in WEIGHTS:
        return f"weights of {weight.dtype}"
    return device_refusal(weight.device) or gpu_plan.encoding_refusal(fmt, grid)


def device_refusal(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"{device.type} is not a CUDA device"
    found = torch.cuda.get_device_capability(device)
    return None if found >= _OLDEST else f"compute capability {found[0]}.{found[1]} is below 8.0"


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=256)
def _say_once(what: str, reason: str) -> None:
    log.info("gpu_kernel_not_taken", what=what, reason=reason)
