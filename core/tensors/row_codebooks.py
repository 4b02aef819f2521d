"""Codebooks of rows: every row of a tensor has the values of least squared error for it, and scales only bring them
into the range of fp16.

Exact, not a local minimum: clusters of a line are found by dynamic programming, O(codes n log n) a row, so nothing
depends on a start or a seed. Each weight counts alike, or as much as its input does. Weights go to the nearest of the
values as decoded, of two equally near ones to the lower. Source: SqueezeLLM (Kim and others, arXiv 2306.07629), which
uses Lloyd's iterations.

Promise: the same codebooks on every device (they are computed on the CPU) and for any number of threads. Memory is that
of a piece in fp64, a few times.
"""

from __future__ import annotations

import torch

from core.errors import InvalidFormat
from core.tensors.blocks import BlockGrid, Piece
from core.tensors.kernels import cpu, cpu_packing
from core.tensors.packing import pack_planes


def row_codebooks(
    flat: torch.Tensor,
    grid: BlockGrid,
    scales: torch.Tensor,
    codes: int,
    *,
    input_weights: torch.Tensor | None = None,
    absent: torch.Tensor | None = None,
) -> torch.Tensor:
    """The best `codes` values of each row of weight / scale, ascending, fp16 (rows, codes), on the tensor's device.

    `scales`: decoded, (rows,). `input_weights`: what the squared error of each input's weights counts, (columns,), not
    negative; None, or nothing above 0, for all alike. `absent`: flat places, ascending, that count nothing.
    InvalidFormat for another number of input weights.
    """
    if input_weights is not None and input_weights.numel() != grid.columns:
        raise InvalidFormat(f"sensitivities of {input_weights.numel()} inputs for {grid.columns}")
    weights = None if input_weights is None else input_weights.detach().reshape(-1).double().cpu()
    pieces = list(grid.pieces(1))
    found = cpu.over_pieces(
        lambda piece: _best(_scaled(flat, grid, piece, scales, absent).cpu(), weights, codes), pieces
    )
    made = torch.cat(found) if found else torch.empty((0, codes), dtype=torch.float16)
    return made.to(flat.device)


def nearest_codes(
    flat: torch.Tensor, grid: BlockGrid, piece: Piece, scales: torch.Tensor, codebook: torch.Tensor
) -> list[torch.Tensor]:
    """Packed codes of each plane of a piece, which is a run of whole rows."""
    values = decoded_values(codebook, scales)[piece.first : piece.last].double()
    limits = (values[:, :-1] + values[:, 1:]) / 2
    weights = flat[piece.start : piece.stop].view(-1, grid.columns).double()
    found = torch.searchsorted(limits, weights).to(torch.uint8).reshape(-1)
    pack = cpu_packing.pack_planes if flat.device.type == "cpu" else pack_planes
    return pack(found, codebook.shape[1])


def decode_rows(codes: torch.Tensor, values: torch.Tensor, columns: int, out: torch.Tensor) -> None:
    """Decoded weights of whole rows to `out`, flat, rounded to its dtype; `values` (rows, codes) are those of the rows.

    Codes beyond the last value take it.
    """
    places = codes.view(-1, columns).long().clamp_(max=values.shape[1] - 1)
    torch.gather(values.to(out.dtype), 1, places, out=out.view(-1, columns))


def decoded_values(codebook: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """fl32(value * scale), (rows, codes)."""
    return codebook.float() * scales[:, None]


def _scaled(
    flat: torch.Tensor, grid: BlockGrid, piece: Piece, scales: torch.Tensor, absent: torch.Tensor | None
) -> torch.Tensor:
    """weight / scale of a piece's rows, fp64 (rows, columns): infinite where absent, 0 under a scale of 0."""
    factors = scales[piece.first : piece.last, None].double()
    scaled = flat[piece.start : piece.stop].view(-1, grid.columns) / torch.where(factors > 0, factors, torch.inf)
    if absent is not None and absent.numel():
        ends = torch.searchsorted(absent, torch.tensor([piece.start, piece.stop], device=absent.device))
        scaled.view(-1)[absent[int(ends[0]) : int(ends[1])] - piece.start] = torch.inf
    return scaled


def _best(scaled: torch.Tensor, weights: torch.Tensor | None, codes: int) -> torch.Tensor:
    from core.tensors.kmeans_jit import best_codebooks

    values, order = scaled.sort(dim=1)
    counts = torch.ones_like(values) if weights is None else weights[order]
    out = torch.empty((len(values), codes), dtype=torch.float64)
    best_codebooks(values.numpy(), counts.numpy(), out.numpy())
    return out.to(torch.float16)
