"""What the benchmarks of GPU kernels share: time by the device's own clock."""

from __future__ import annotations

from collections.abc import Callable

import torch


def milliseconds(work: Callable[[], object]) -> float:
    """Device time of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
