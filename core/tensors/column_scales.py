"""Scales of input dimensions in a byte each: (1 + m / 16) 2^(e - 15), e the upper four bits and m the lower; 0 is 0.

A relative step of 3 to 6 % is enough, because a data-aware rounding chooses its own steps to fit the scales that are
stored: what is lost is that of uneven distortions, 0.0003 bits. Exact in fp32, by integers alone.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

LARGEST = 1.9375
_MANTISSA, _TOP = 16, 15
_LEAST = 2.0**-_TOP * (1 + 1 / _MANTISSA)


def scales_of(codes: torch.Tensor) -> torch.Tensor:
    """fp32 scales of uint8 codes."""
    numbers = codes.int()
    scales = torch.ldexp(1 + (numbers & (_MANTISSA - 1)).float() / _MANTISSA, (numbers >> 4) - _TOP)
    return torch.where(numbers > 0, scales, 0.0).float()


def nearest_codes(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Codes of the nearest scales, at most `LARGEST`; what is above 0 gets a scale above 0."""
    clipped = np.clip(values, _LEAST, LARGEST)
    exponents = np.floor(np.log2(clipped))
    mantissas = np.rint((clipped / 2.0**exponents - 1) * _MANTISSA)
    codes = (exponents + _TOP) * _MANTISSA + mantissas  # a mantissa of 16 is the next exponent
    return np.where(values > 0, np.minimum(codes, 255), 0).astype(np.uint8)


def as_stored(values: NDArray[np.float64]) -> tuple[float, NDArray[np.uint8]]:
    """(step, codes) of scales that are not negative: the largest is step * `LARGEST`, the step as fp32 holds it."""
    largest = float(values.max(initial=0.0))
    if not largest > 0:
        return 1.0, np.zeros(values.shape, np.uint8)
    step = float(np.float32(min(max(largest / LARGEST, 2.0**-120), 2.0**120)))
    return step, nearest_codes(values / step)


def stored_values(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest that can be stored to all of them."""
    step, codes = as_stored(values)
    return scales_of(torch.from_numpy(codes)).double().numpy() * step
