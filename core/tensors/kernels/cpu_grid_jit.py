"""The compiled loops of rounding to a grid. See `cpu_jit` for the style."""

from __future__ import annotations

import numpy as np

from core.tensors.entropy.loops_jit import Numbers
from core.tensors.kernels.cpu_jit import Bits, Doubles, Floats, Starts, compiled


@compiled
def grid_numbers(weights: Floats, starts: Starts, scales: Floats, step: float, most: float, out: Bits) -> None:
    """out = rint(weight / (scale * step)) within +-most, 0 under a scale of 0."""
    cast_ = out.dtype.type
    for block in range(scales.size):
        unit = np.float64(scales[block]) * step
        if unit == 0.0:
            unit = np.float64(np.inf)
        for i in range(starts[block], starts[block + 1]):
            out[i] = cast_(min(max(np.rint(np.float64(weights[i]) / unit), -most), most))


@compiled
def grid_sums(weights: Floats, starts: Starts, scales: Floats, step: float, numbers: Numbers, sums: Doubles) -> None:
    """Sums of scale^2 (|k| - |weight / (scale * step)|), then of scale^2, over the numbers k of each cell.

    Cells are |k| = 1, 2, ..., and the last of them and all beyond it; `sums` (2 * cells,) grows.
    """
    count = sums.size // 2
    for block in range(scales.size):
        unit = np.float64(scales[block]) * step
        weight = np.float64(scales[block]) * np.float64(scales[block])
        for i in range(starts[block], starts[block + 1]):
            distance = np.abs(np.int64(numbers[i]))
            if distance > 0:
                cell = min(distance, count)
                sums[cell - 1] += weight * (np.float64(distance) - np.abs(np.float64(weights[i]) / unit))
                sums[count + cell - 1] += weight
