"""Input covariances and weights that the reference numbers of rounding with data were computed on, drawn anew.

Recipes: `data_aware.json`, key `recipes`. Everything is numpy float64 and checked by the fingerprints there.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

DATA_AWARE: dict[str, Any] = json.loads((Path(__file__).parent / "data_aware.json").read_text())
FAMILIES = ("identity", "ar1_0.9", "pow1_diag", "pow1_haar", "pow2_haar", "scaled_ar1", "factor_mix")


@lru_cache(maxsize=16)
def family(name: str, n: int) -> Matrix:
    """The covariance (n, n) of a family, of trace n and read-only; KeyError for another name.

    The number after `ar1_` is the correlation of neighbours, the one after `pow` how fast the spectrum decays.
    """
    made = _made(name, n)
    made.setflags(write=False)
    return made


def _made(name: str, n: int) -> Matrix:
    kind, _, rest = name.partition("_")
    if name == "identity":
        return np.eye(n)
    if kind == "ar1":
        return autoregressive(float(rest), n)
    if kind.startswith("pow") and rest in ("diag", "haar"):
        spectrum = np.arange(1, n + 1) ** -float(kind.removeprefix("pow"))
        spectrum = spectrum / spectrum.mean()
        basis = haar(n, 1)
        return np.diag(spectrum) if rest == "diag" else (basis * spectrum) @ basis.T
    if name == "scaled_ar1":
        scales = np.exp(0.6 * np.random.default_rng(11).standard_normal(n))
        return _of_trace(scales[:, None] * autoregressive(0.9, n) * scales)
    if name == "factor_mix":
        return _factor_mix(n)
    raise KeyError(name)


def autoregressive(correlation: float, n: int) -> Matrix:
    """AR(1): correlation ** |i - j|."""
    places = np.arange(n)
    found: Matrix = correlation ** np.abs(places[:, None] - places)
    return found


def haar(n: int, seed: int) -> Matrix:
    """An orthogonal matrix, uniformly distributed."""
    basis, triangle = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    found: Matrix = basis * np.sign(np.diag(triangle))
    return found


def _factor_mix(n: int) -> Matrix:
    generator = np.random.default_rng(21)
    scales = np.exp(0.5 * generator.standard_normal(n))
    factors = generator.standard_normal((n, 16)) / 4
    mixed = np.eye(n) + factors @ factors.T
    deviations = np.sqrt(np.diag(mixed))
    return _of_trace(scales[:, None] * (mixed / deviations[:, None] / deviations) * scales)


def _of_trace(covariance: Matrix) -> Matrix:
    found: Matrix = covariance * (len(covariance) / np.trace(covariance))
    return found


def weights(rows: int, n: int) -> Matrix:
    """The leading rows, at most 4096, of the weights (4096, n) of unit variance."""
    assert rows <= 4096
    return np.random.default_rng(1234).standard_normal((4096, n))[:rows]
