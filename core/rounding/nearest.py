"""Rounding to the nearest code: needs no data; sensitivities and seed serve what the format itself leaves open."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat
from core.tensors.encoded import EncodedTensor
from core.tensors.nearest import encode_nearest

if TYPE_CHECKING:
    from core.rounding.base import Sensitivity


def round_tensor(
    weight: torch.Tensor,
    fmt: TensorFormat,
    sensitivity: Sensitivity,
    _spec: RoundingSpec,
    seed: int,
) -> EncodedTensor:
    """Every weight to its nearest code."""
    return encode_nearest(weight, fmt, seed=seed, row_weights=sensitivity.row_weights)
