"""How far rounding can go: the rate-distortion function of a layer's weights under the statistics of its inputs.

Weights are taken as independent N(0, s^2), s^2 = mean(W^2), and errors weighed by the covariance S of the inputs:
D = tr((W - Q) S (W - Q)^T) per weight. In the eigenbasis of S these are independent Gaussian components of variances
s^2 times the eigenvalues, and reverse waterfilling (Cover & Thomas, Elements of Information Theory, section 10.3.3)
is a bound for every code, also for one whose decoder knows S:

    D(tau) = mean min(v_i, tau)        R(tau) = mean max(0, log2(v_i / tau)) / 2

The water level tau of a rate or of a distortion is evaluated in closed form, without bisection. Rates are bits per
weight, distortions are per weight and in the units of the variances. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]

SHAPE_GAP = 0.5 * math.log2(2 * math.pi * math.e / 12)
"""Bits that cubes as cells lose to the limit at high rates, whatever the source."""

_TILE_ELEMENTS = 1 << 22


def distortion_at(variances: ArrayLike, rate: float) -> float:
    """The least distortion of independent Gaussian components of these variances (n,) at `rate` bits each.

    Variances may be 0; ValueError for negative ones or a negative rate.
    """
    level = water_level(variances, rate)
    return math.fsum(np.minimum(_descending(variances), level)) / max(np.size(variances), 1)


def water_level(variances: ArrayLike, rate: float) -> float:
    """The distortion of every component that is coded at all, at `rate` bits each; 0 where nothing is left over."""
    ordered = _descending(variances)
    if not rate >= 0:
        raise ValueError(f"a rate of {rate} bits")
    positive = ordered[ordered > 0]
    if not positive.size or math.isinf(rate):
        return 0.0
    logs, counts = np.log2(positive), np.arange(1, positive.size + 1)
    # Bits that bring the first k components down to the next one; the last k has no next one and takes any number.
    needed = np.append((np.cumsum(logs) - counts * np.append(logs[1:], 0.0))[:-1], np.inf)
    active = int(np.argmax(needed >= 2 * ordered.size * rate)) + 1
    return math.exp2((math.fsum(logs[:active]) - 2 * ordered.size * rate) / active)


def rate_at(variances: ArrayLike, distortion: float) -> float:
    """Bits per component below which no code reaches `distortion`: the inverse of `distortion_at`.

    0 from the mean of the variances on; infinite for a distortion of 0 or less, unless all variances are 0.
    """
    ordered = _descending(variances)
    total = distortion * ordered.size
    if total >= math.fsum(ordered):
        return 0.0
    if distortion <= 0:
        return math.inf
    beyond = np.append(np.cumsum(ordered[::-1])[::-1][1:], 0.0)
    # A component is active when the level that its own variance would be leaves more distortion than is asked for.
    active = max(1, int(np.count_nonzero(np.arange(1, ordered.size + 1) * ordered + beyond > total)))
    level = (total - math.fsum(ordered[active:])) / active
    return max(0.0, math.fsum(np.log2(ordered[:active] / level)) / (2 * ordered.size))


def predicted_gap(diagonal: ArrayLike) -> float:
    """Bits above the limit at high rate of successive rounding with one step for all columns and ideal entropy codes.

    `diagonal`: that of the lower Cholesky factor L of the covariance, positive, (n,). SHAPE_GAP plus half of
    log2(AM / GM) of L_ii^2; with steps in proportion to 1 / L_ii it is SHAPE_GAP alone.
    """
    squares = np.square(np.asarray(diagonal, dtype=np.float64))
    return SHAPE_GAP + 0.5 * (math.log2(np.mean(squares)) - float(np.mean(np.log2(squares))))


@dataclass(frozen=True)
class Limit:
    """The limit of one layer: `variances` (in,) of the components that its errors consist of."""

    variances: Vector

    @classmethod
    def of(cls, weight: NDArray[Any], covariance: ArrayLike) -> Limit:
        """Of a weight (out, in) and the covariance (in, in) of its inputs, which is symmetrised.

        Eigenvalues below 0 count as 0. ValueError where the shapes do not fit.
        """
        given = np.asarray(covariance, dtype=np.float64)
        if weight.ndim != 2 or not weight.size or given.shape != (weight.shape[1], weight.shape[1]):
            raise ValueError(f"a weight of {weight.shape} with a covariance of {given.shape}")
        return cls.of_spectrum(weight, np.linalg.eigvalsh((given + given.T) / 2))

    @classmethod
    def of_spectrum(cls, weight: NDArray[Any], eigenvalues: NDArray[Any]) -> Limit:
        """The same from the eigenvalues (in,) of the covariance."""
        return cls(mean_square(weight) * np.maximum(eigenvalues, 0.0))

    def distortion_at(self, rate: float) -> float:
        """The least distortion at that many bits per weight."""
        return distortion_at(self.variances, rate)

    def rate_at(self, distortion: float) -> float:
        """The least bits per weight at that distortion; infinite where only an exact copy has it."""
        return rate_at(self.variances, distortion)

    def gap(self, rate: float, distortion: float) -> float | None:
        """Bits that a code of that rate and distortion takes above the limit.

        None where the limit says nothing: errors cost nothing, or an exact copy took a finite number of bits.
        """
        needed = self.rate_at(distortion)
        return rate - needed if self.variances.any() and math.isfinite(needed) else None


def mean_square(weight: NDArray[Any]) -> float:
    """The mean of W^2 in float64, without a float64 copy of the whole matrix (out, in)."""
    step = max(1, _TILE_ELEMENTS // weight.shape[1])
    tiles = (weight[start : start + step].astype(np.float64) for start in range(0, weight.shape[0], step))
    return math.fsum(float(np.vdot(tile, tile)) for tile in tiles) / weight.size


def _descending(variances: ArrayLike) -> Vector:
    found = np.sort(np.asarray(variances, dtype=np.float64).reshape(-1))[::-1]
    if not found.size or not found[-1] >= 0 or not math.isfinite(found[0]):
        raise ValueError("variances are finite, not negative, and at least one")
    return found
