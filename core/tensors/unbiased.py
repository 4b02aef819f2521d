"""Scales freed of their bias: every row is decoded to what has the row's own inner product with it.

Rounding to the nearest value shrinks: <decoded, w> is a little less than <w, w>, by the share of the squared error that
is correlated with the weights, and all outputs of a layer shrink together. Multiplying the scales of a row by
<w, w> / <decoded, w> undoes it without a bit more; codes stay. Rows of zeros, and factors that no rounding explains,
stay. How little it gains where rounding shrinks little, docs/formats.md shows.
"""

from __future__ import annotations

import torch

from core.tensors.encoded import EncodedTensor

_MOST = 2.0


def unbiased(encoded: EncodedTensor, flat: torch.Tensor) -> EncodedTensor:
    """The same codes under corrected scales; `flat` is what was encoded (outliers taken out, rotated)."""
    rows = 1 if encoded.format.granularity == "tensor" else max(encoded.elements // encoded.grid.columns, 1)
    own, met = _inner_products(encoded, flat, rows)
    factors = torch.where(met > 0, own / met, torch.ones_like(own))
    factors = torch.where((factors < _MOST) & (factors > 1 / _MOST), factors, torch.ones_like(own)).float()
    scales = encoded.scales.reshape(rows, -1)
    changed = (scales.float() * factors[:, None]).to(scales.dtype)
    fits = (changed.float() * encoded.table.abs().max()).isfinite()
    kept = torch.where(fits, changed, scales).reshape(encoded.scales.shape)
    return EncodedTensor(encoded.format, encoded.shape, encoded.dtype, dict(encoded.stored) | {"scales": kept})


def _inner_products(encoded: EncodedTensor, flat: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(<w, w>, <decoded, w>) of each row, fp64."""
    grid = encoded.grid
    own = torch.zeros(rows, dtype=torch.float64, device=flat.device)
    met = torch.zeros_like(own)
    for piece in grid.pieces(encoded.group):
        weights = flat[piece.start : piece.stop].double()
        places = torch.arange(piece.start, piece.stop, device=flat.device) // max(encoded.elements // rows, 1)
        own.index_add_(0, places, weights * weights)
        met.index_add_(0, places, weights * encoded.decode_piece(grid, piece).double())
    return own, met
