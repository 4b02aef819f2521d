"""What benchmarks of one CPU core share: one thread pinned to it, work by turns, medians of processor time.

All work is done by turns within each round, so that a noisy machine disturbs all alike, and rounds alternate in order.
The first round warms up, and compiles, and is dropped.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import process_time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Work = Callable[[], object]


def medians(works: Mapping[str, tuple[Work, float]], rounds: int, size: float) -> dict[str, float]:
    """`size` per second of processor time of each; a work is given with the share of the size that it works on."""
    rates = []
    for number in range(rounds + 1):
        order = list(works.items())
        if number % 2:
            order.reverse()
        rates.append({name: size * share / _seconds(work) for name, (work, share) in order})
    return {name: statistics.median(row[name] for row in rates[1:]) for name in works}


def arguments(description: str, rows: int, formats: Sequence[str]) -> argparse.Namespace:
    """--rows, --columns, --rounds and --formats."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", type=int, default=rows)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--formats", nargs="+", default=list(formats))
    return parser.parse_args()


def weights(rows: int, columns: int) -> torch.Tensor:
    """A Normal bf16 matrix; from now on this process has one thread on one core."""
    import torch

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()


def _seconds(work: Work) -> float:
    """Processor time of one call: what others do on the machine counts little."""
    started = process_time()
    work()
    return process_time() - started
