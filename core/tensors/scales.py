"""Statistics of blocks: what a block's scale is computed from, before it is rounded to how scales are stored.

In fp32 from the unrounded weights; sums of squares in fp64, in an order that does not depend on threads (optimal
formats, section 5.1). How scales are stored: `core.tensors.scale_formats`.
"""

from __future__ import annotations

import torch

_SEGMENT = 4096


def statistic_of(blocks: torch.Tensor, name: str, counts: torch.Tensor | int) -> torch.Tensor:
    """absmax, signmax (signed) or rms of each row of (blocks, width), fp32; `counts` are the real elements of a row."""
    if name == "rms":
        return (sum_of_squares(blocks) / counts).sqrt().float()
    return signed_extreme(blocks) if name == "signmax" else absmax(blocks)


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
