"""Statistics of blocks: what a block's scale is computed from, before it is rounded to how scales are stored.

In fp32 from the unrounded weights; sums of squares in fp64, in an order that does not depend on threads (optimal
formats, section 5.1). How scales are stored: `core.tensors.scale_formats`.
"""

from __future__ import annotations

import torch


def extreme_of(blocks: torch.Tensor, statistic: str) -> torch.Tensor:
    """The largest magnitude of each row of (blocks, width), fp32; signed under signmax."""
    return signed_extreme(blocks) if statistic == "signmax" else absmax(blocks)


def absmax(blocks: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row of (blocks, width), fp32."""
    if blocks.shape[1] == 0:
        return blocks.new_zeros(blocks.shape[0])
    low, high = torch.aminmax(blocks, dim=1)
    return torch.maximum(high, -low) + 0.0  # zeros give +0


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
    return extreme + 0.0


def sum_of_squares(blocks: torch.Tensor) -> torch.Tensor:
    """Of each row, fp64: neighbours are added in pairs until one number is left, an odd one out stays as it is.

    Only additions of elements, so the same on any device and for any number of threads.
    """
    squares = blocks.double().square_()
    while squares.shape[1] > 1:
        if squares.shape[1] % 2:
            squares = torch.nn.functional.pad(squares, (0, 1))
        squares = squares[:, 0::2] + squares[:, 1::2]
    return squares.reshape(len(blocks)) if squares.shape[1] else squares.sum(dim=1)
