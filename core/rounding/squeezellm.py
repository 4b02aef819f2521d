"""SqueezeLLM: codebooks of rows in which a squared error counts as much as the weight is sensitive.

What it costs to move weight (o, i) is taken for f_o S_ii: the Fisher information of the row's weights, and the mean
square of the input. The paper (Kim and others, arXiv 2306.07629) has the diagonal of the Fisher matrix; this is its
approximation of rank one, of which calibration keeps the factors. Within a row f_o is the same everywhere, so S_ii
alone decides. Inputs that are always 0 count nothing; where all are, where the covariance is not known, and after a
rotation, which makes inputs alike, all count the same: then it is nearest rounding.

Clusters are exact (`core.tensors.row_codebooks`) where the paper iterates from random starts. Its dense-and-sparse
decomposition is an option of the format: `+iqr1.6` by quartiles, `+outliers0.0045` by magnitude.
"""

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
    sensitivity: Sensitivity | None,
    _spec: RoundingSpec,
    seed: int,
) -> EncodedTensor:
    """Codebooks of rows fitted by sensitivity, every weight to its nearest value; other formats are rounded to nearest.

    InvalidFormat for a covariance of another number of inputs than the tensor has columns.
    """
    rows = None if sensitivity is None else sensitivity.row_weights
    inputs = _input_weights(sensitivity) if fmt.has_row_codebooks and fmt.rotation is None else None
    return encode_nearest(weight, fmt, seed=seed, row_weights=rows, input_weights=inputs)


def _input_weights(sensitivity: Sensitivity | None) -> torch.Tensor | None:
    """Mean squares of the inputs, (in,)."""
    if sensitivity is None or sensitivity.covariance is None:
        return None
    return sensitivity.covariance.diagonal().clamp(min=0)
