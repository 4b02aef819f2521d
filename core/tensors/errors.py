"""The error that an encoding makes, measured piece by piece in fp64."""

from __future__ import annotations

import math

import torch

from core.tensors.encoded import EncodedTensor


def squared_error(weight: torch.Tensor, encoded: EncodedTensor) -> tuple[float, float]:
    """(sum of squared errors, sum of squared weights) of a tensor and its encoding, fp64."""
    flat = weight.detach().reshape(-1)
    error = power = 0.0
    for piece, decoded in encoded.decoded_pieces():
        original = flat[piece.start : piece.stop].double()
        error += _sum_of_squares(original - decoded)
        power += _sum_of_squares(original)
    return error, power


def relative_rms_error(weight: torch.Tensor, encoded: EncodedTensor) -> float:
    """R = RMS(decoded - weight) / RMS(weight); 0 for a tensor of zeros that is decoded exactly."""
    error, power = squared_error(weight, encoded)
    return math.sqrt(error / power) if power else 0.0


def _sum_of_squares(values: torch.Tensor) -> float:
    return float(torch.dot(values, values))
