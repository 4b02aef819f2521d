"""The door of rounding: a tensor, a format and a method go in, codes come out.

Methods are a closed set, one file each: `round(weight, format, sensitivity, params) -> EncodedTensor`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat
from core.rounding import nearest
from core.tensors.encoded import EncodedTensor


@dataclass(frozen=True)
class Sensitivity:
    """What tells a method how much an error costs; None for what was not gathered.

    `row_weights`: Fisher information of an element of each output row, (out,). `covariance`: E[x x^T] of the layer's
    inputs, (in, in).
    """

    row_weights: torch.Tensor | None = None
    covariance: torch.Tensor | None = None

    @classmethod
    def by_rows(cls, sums: torch.Tensor | None, rows: int) -> Sensitivity:
        """For a matrix of that many rows from sums over rows of the tensor, each of which may be several of the matrix.

        Rows of a tensor that calibration did not reach, or reached in another shape, count alike.
        """
        if sums is None or not sums.numel() or rows % sums.numel():
            return cls(row_weights=torch.ones(rows, dtype=torch.float64))
        return cls(row_weights=sums.double().repeat_interleave(rows // sums.numel()))


_METHODS: dict[str, Callable[[torch.Tensor, TensorFormat, Sensitivity | None, RoundingSpec, int], EncodedTensor]] = {
    "nearest": nearest.round_tensor,
}


def round_tensor(
    weight: torch.Tensor, fmt: TensorFormat, spec: RoundingSpec, *, sensitivity: Sensitivity | None, seed: int
) -> EncodedTensor:
    """Encode `weight` (any shape, floating) by the method that `spec` names. `seed` is the tensor's own."""
    return _METHODS[spec.name](weight, fmt, sensitivity, spec, seed)
