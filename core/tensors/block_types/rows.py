"""Tensors in block types: rows are padded with zeros to whole blocks, and cropped after decoding.

Any floating dtype, shape and device goes in; bytes and decoded weights are on the CPU. A tensor is worked on in pieces
of whole rows, so beyond the result memory is one piece.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from core.errors import InvalidFormat, NonFiniteWeights
from core.formats.block_types import block_type
from core.tensors.block_types.codec import CHUNK, decode_blocks, encode_blocks
from core.tensors.block_types.fields import Bytes, Floats
from core.tensors.block_types.tile_scales import ScaleRule


def encode_rows(
    name: str, weight: torch.Tensor, importance: torch.Tensor | None = None, *, rule: ScaleRule = "midmax"
) -> torch.Tensor:
    """(..., columns) -> uint8 (..., bytes of a row).

    `importance`: non-negative, of a shape that broadcasts to the weight's, such as (columns,). NonFiniteWeights for NaN
    or infinity among the weights, also where only fp32 has none; InvalidFormat for importance that does not fit.
    """
    kind = block_type(name)
    columns = weight.shape[-1]
    rows = weight.detach().reshape(weight.shape[:-1].numel(), columns)
    weights = None if importance is None else _fitted(importance, weight).reshape(rows.shape)
    out = torch.empty((len(rows), kind.row_bytes(columns)), dtype=torch.uint8)
    for here in _pieces(len(rows), columns):
        blocks = _padded(_finite(rows[here]), kind.elements)
        factors = None if weights is None else _padded(_numbers(weights[here]), kind.elements)
        data = encode_blocks(name, blocks, factors, rule=rule)
        out[here] = torch.from_numpy(data).reshape(-1, out.shape[1])
    return out.reshape(*weight.shape[:-1], out.shape[1])


def decode_rows(name: str, data: torch.Tensor, columns: int) -> torch.Tensor:
    """uint8 (..., bytes of a row) -> fp32 (..., columns); InvalidFormat for rows of other length."""
    kind = block_type(name)
    if data.dtype != torch.uint8 or data.shape[-1] != kind.row_bytes(columns):
        raise InvalidFormat(f"a row of {columns} weights in {name} is {kind.row_bytes(columns)} bytes", where=name)
    out = torch.empty((data.shape[:-1].numel(), columns))
    rows = data.reshape(len(out), data.shape[-1])
    for here in _pieces(len(out), columns):
        blocks: Bytes = rows[here].cpu().numpy().reshape(-1, kind.nbytes)
        out[here] = torch.from_numpy(decode_blocks(name, blocks)).reshape(len(rows[here]), -1)[:, :columns]
    return out.reshape(*data.shape[:-1], columns)


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, 8 * CHUNK // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows if columns else 0, step))


def _numbers(piece: torch.Tensor) -> Floats:
    found: Floats = piece.float().cpu().numpy()
    return found


def _finite(piece: torch.Tensor) -> Floats:
    numbers = _numbers(piece)
    if not np.isfinite(numbers).all():
        raise NonFiniteWeights(
            "NaN or infinity among the weights", hint="the checkpoint is damaged: train or copy anew"
        )
    return numbers


def _padded(rows: Floats, elements: int) -> Floats:
    """(rows, columns) -> (blocks, elements)."""
    missing = -rows.shape[1] % elements
    whole = np.pad(rows, ((0, 0), (0, missing))) if missing else rows
    return whole.reshape(-1, elements)


def _fitted(importance: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
        raise InvalidFormat("importance weights must be finite and not negative")
    try:
        return importance.detach().expand(weight.shape)
    except RuntimeError as error:
        raise InvalidFormat(
            f"importance of shape {tuple(importance.shape)} does not fit weights of {tuple(weight.shape)}"
        ) from error
