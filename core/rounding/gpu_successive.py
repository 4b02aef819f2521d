"""Successive rounding on a GPU: one launch for BLOCK columns, then one product of matrices for all that come after.

Promise: the codes of the compiled loops for the CPU (`core.rounding.successive_jit`, `diffusion_jit`), in the same
precision, fp64 or fp32. Sums over the columns of a row are taken in another order, so a code may only differ where what
it is rounded from lies within the last digits of a limit, and then those that its row's error is passed on to. Each
function answers None for what the kernels do not take, and the caller goes by the CPU's loops; the reason is logged
once. Taken are CUDA devices of compute capability 8.0 and above, and any device in Triton's interpreter
(TRITON_INTERPRET=1 before the first call).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from core.rounding.levels import EXACT, QUOTIENTS, ROUNDED, Indices, Levels
from core.rounding.successive import Doubles, Numbers, Scales
from core.tensors.kernels.gpu import device_refusal, on_device
from core.tensors.kernels.gpu_launch import Arguments, Constants, Launch

BLOCK = 128
TOGETHER_ROWS = 512  # that one program holds, where all of them decide what a column is decoded as
LANES = 32  # rows of a program, each a lane's own
_MOSTLANESS = 8
_TOGETHER = 8  # columns in registers
_MOST = 1 << 31
_KINDS = {ROUNDED: "rounded", EXACT: "exact", QUOTIENTS: "quotients"}

log = structlog.get_logger()


class ColumnsLaunch(Launch):
    """A launch of `gpu_successive_kernel`."""

    def run(self) -> None:
        from core.rounding import gpu_successive_kernel

        kernel = getattr(gpu_successive_kernel, self.kernel)
        kernel[(self.programs,)](*self.arguments, **self.constants, num_warps=self.warps)


def round_to_steps(
    targets: torch.Tensor, factor: torch.Tensor, steps: Doubles, scales: Scales, gains: Doubles | None
) -> Numbers | None:
    """`core.rounding.successive.round_to_steps` of tensors on a GPU.

    Gains are found in one program, which holds at most TOGETHER_ROWS rows.
    """
    reason = device_refusal(targets.device) or _size_refusal(targets)
    if not reason and gains is None and targets.shape[1] > TOGETHER_ROWS:
        reason = f"gains of more than {TOGETHER_ROWS} rows"
    if reason:
        return _say_once("round_to_steps", reason)
    work = Stepping.of(targets, factor, steps, scales, gains)
    with on_device(targets.device):
        for low, high in reversed(_blocks(len(targets))):
            taken = work.taken[: high - low]
            work.launch(low, high).run()
            if low:
                work.targets[:low].addmm_(work.factor[low:high, :low].T, taken)
    return Numbers(work.numbers.cpu().numpy(), work.gains.cpu().numpy())


def spread(wanted: torch.Tensor, weights: torch.Tensor, ratios: torch.Tensor, levels: Levels) -> Indices | None:
    """`core.rounding.successive.spread` of tensors on a GPU."""
    reason = device_refusal(wanted.device) or _size_refusal(wanted)
    if reason:
        return _say_once("spread", reason)
    work, places = Spreading.of(wanted, weights, ratios, levels), len(wanted)
    with on_device(wanted.device):
        for low, high in _blocks(places):
            work.launch(low, high).run()
            if high < places:
                work.wanted[high:].addmm_(work.ratios[low:high, high:].T, work.errors[: high - low])
    found: Indices = work.indices.cpu().numpy()
    return found


@dataclass(frozen=True)
class Stepping:
    """What `numbers_kernel` works on, all on one device, named as there."""

    targets: torch.Tensor
    factor: torch.Tensor
    units: torch.Tensor
    steps: torch.Tensor
    scales: torch.Tensor
    blocks: torch.Tensor
    gains: torch.Tensor
    numbers: torch.Tensor
    taken: torch.Tensor
    shrinks: bool

    @classmethod
    def of(
        cls, targets: torch.Tensor, factor: torch.Tensor, steps: Doubles, scales: Scales, gains: Doubles | None
    ) -> Stepping:
        """From what `round_to_steps` is given."""
        device, dtype, (places, rows) = targets.device, targets.dtype, targets.shape
        return cls(
            targets=targets.contiguous(),
            factor=factor.contiguous(),
            units=(_moved(steps, device) * factor.diagonal()).to(dtype),
            steps=_moved(steps, device),
            scales=_moved(scales.values, device).to(dtype),
            blocks=_moved(scales.blocks, device),
            gains=_moved(np.ones(places) if gains is None else gains, device),
            numbers=torch.empty((places, rows), dtype=torch.int32, device=device),
            taken=torch.empty((min(BLOCK, places), rows), dtype=dtype, device=device),
            shrinks=gains is None,
        )

    def launch(self, low: int, high: int) -> ColumnsLaunch:
        """Of the places of one block."""
        given = (self.targets, self.factor, self.units, self.steps, self.scales, self.blocks, self.gains)
        return _launch(
            "numbers_kernel",
            (*given, self.numbers, self.taken),
            self.targets,
            (low, high),
            {"SHRINKS": self.shrinks},
            self.shrinks,
        )


@dataclass(frozen=True)
class Spreading:
    """What `spread_kernel` works on, likewise."""

    wanted: torch.Tensor
    weights: torch.Tensor
    ratios: torch.Tensor
    scales: torch.Tensor
    blocks: torch.Tensor
    table: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    indices: torch.Tensor
    errors: torch.Tensor
    levels: Levels

    @classmethod
    def of(cls, wanted: torch.Tensor, weights: torch.Tensor, ratios: torch.Tensor, levels: Levels) -> Spreading:
        """From what `spread` is given."""
        device, (places, rows) = wanted.device, wanted.shape
        spare = (1 << levels.limits.size.bit_length()) - len(levels.values)
        limits = np.pad(levels.limits, (0, spare), constant_values=np.inf)
        table = (np.pad(levels.values, (0, spare)), limits, np.pad(levels.upper_on_tie.astype(np.int32), (0, spare)))
        return cls(
            wanted=wanted.contiguous(),
            weights=weights.contiguous(),
            ratios=ratios.contiguous(),
            scales=_moved(levels.scales.T, device),
            blocks=_moved(levels.blocks, device),
            table=(_moved(table[0], device), _moved(table[1], device), _moved(table[2], device)),
            indices=torch.empty((places, rows), dtype=torch.int32, device=device),
            errors=torch.empty((min(BLOCK, places), rows), dtype=torch.float64, device=device),
            levels=levels,
        )

    def launch(self, low: int, high: int) -> ColumnsLaunch:
        """Of the places of one block."""
        given = (self.wanted, self.weights, self.ratios, self.scales, self.blocks, *self.table)
        rule: Constants = {"HALVINGS": self.levels.limits.size.bit_length(), "KIND": _KINDS[self.levels.kind]}
        extent = (low, high, self.levels.zero)
        return _launch("spread_kernel", (*given, self.indices, self.errors), self.wanted, extent, rule, False)


def _launch(
    kernel: str, tensors: Arguments, values: torch.Tensor, extent: tuple[int, ...], constants: Constants, is_one: bool
) -> ColumnsLaunch:
    """A warp for LANES rows of `values` (places, rows) each, or one program for all of them."""
    places, rows = values.shape
    tile = max(LANES, 1 << (rows - 1).bit_length()) if is_one else LANES
    arguments = (*tensors, rows, places, *extent)
    warps = min(tile // LANES, _MOSTLANESS)
    is_full = (extent[1] - extent[0]) % _TOGETHER == 0
    lanes: Constants = {"TOGETHER": _TOGETHER, "IS_FULL": is_full, "ROWS": tile}
    return ColumnsLaunch(kernel, arguments, constants | lanes, -(-rows // tile), warps)


def _blocks(places: int) -> list[tuple[int, int]]:
    """Counted from the last place, so that a short block comes where little is left to do."""
    return [(max(0, high - BLOCK), high) for high in range(places, 0, -BLOCK)][::-1]


def _moved(values: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def _size_refusal(values: torch.Tensor) -> str | None:
    if not values.numel():
        return "no weights"
    return "rows or columns that 32 bits do not count" if max(values.shape) >= _MOST else None


@lru_cache(maxsize=64)
def _say_once(what: str, reason: str) -> None:
    log.info("gpu_kernel_not_taken", what=what, reason=reason)
