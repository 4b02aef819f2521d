"""Grids of vectors on tensors: p weights in a row share a code, the number of the point nearest to them.

The elements of a tensor in row-major order, each over the scale of its block, are cut into vectors of p; a vector may
reach into the next block or row, and the last one is filled up with zeros. So any shape takes ceil(N / p) codes, and
decoding looks a vector up and multiplies each of its numbers with its own block's scale.

Promise: the nearest point in fp64, on the CPU by a tree, elsewhere by products with all points, some vectors at a time;
they differ at most where two points are equally near. Memory is that of a piece in fp64, a few times.
"""

from __future__ import annotations

import torch

from core.formats.vector_grid import stored_grid
from core.recipe.tensor_format import TensorFormat
from core.tensors.blocks import BlockGrid, Piece
from core.tensors.kernels import cpu_packing
from core.tensors.packing import pack_planes

_BYTE = 256
_PRODUCTS = 1 << 22  # of vectors with points that are in memory at once


def codebook_of(fmt: TensorFormat, device: torch.device) -> torch.Tensor:
    """The points of a format, fp16 (codes, p), as they are stored."""
    return torch.from_numpy(stored_grid(fmt.vector, fmt.codes)).to(device)


def nearest_codes(
    flat: torch.Tensor, grid: BlockGrid, piece: Piece, scales: torch.Tensor, codebook: torch.Tensor
) -> list[torch.Tensor]:
    """Packed codes of each plane of a piece that begins with a vector; `scales`: decoded, of all blocks.

    Weights of blocks whose scale is 0 count as 0.
    """
    blocks = grid.to_blocks(flat[piece.start : piece.stop].float()).double()
    factors = scales[piece.first : piece.last, None].double()
    values = grid.from_blocks(blocks / torch.where(factors > 0, factors, torch.inf))
    size = codebook.shape[1]
    vectors = torch.nn.functional.pad(values, (0, -values.numel() % size)).view(-1, size)
    find = _by_tree if flat.device.type == "cpu" else nearest_points
    codes, radix = find(vectors, codebook.double()), len(codebook)
    if flat.device.type == "cpu" and radix <= _BYTE:
        return cpu_packing.pack_planes(codes.to(torch.uint8), radix)
    return pack_planes(codes, radix)


def nearest_points(vectors: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The number of the point nearest to each of `vectors`, fp64 (k, p), among `points`, fp64 (n, p): int64 (k,).

    |v - g|^2 = |v|^2 - (2 v g - |g|^2), so the largest of 2 v g - |g|^2; of equals the first.
    """
    squares, step = points.square().sum(1), max(1, _PRODUCTS // len(points))
    found = [(2 * part @ points.T).sub_(squares).argmax(1) for part in torch.split(vectors, step)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=vectors.device)


def values_of(codes: torch.Tensor, table: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` numbers that codes stand for, flat fp32; `table` has a number or a vector for each code.

    Codes beyond the table take its last entry: hostile bytes cannot read there.
    """
    return table.index_select(0, codes.int().clamp_(max=len(table) - 1)).reshape(-1)[:count]


def _by_tree(vectors: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """`nearest_points` on the CPU."""
    from scipy.spatial import cKDTree

    return torch.from_numpy(cKDTree(points.numpy()).query(vectors.numpy())[1])
