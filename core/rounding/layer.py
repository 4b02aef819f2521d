"""One layer on its own: read with the statistics of its inputs, rounded, and compared with what is possible.

A layer file is safetensors with `weight` (out, in), `covariance` (in, in), and where they are known `cross` (in, in),
the E[x h^T] of core.rounding.base.Sensitivity, and `tokens` (1,), over how many inputs all were taken. What is read is
finite, symmetric and without negative eigenvalues, up to the rounding of fp32; anything else is InvalidCheckpoint.
Distortion is tr((W - Q) S (W - Q)^T) / (out in) in float64, Q as decoded from what is stored, S the given covariance
without damping. Bits per parameter are those of all stored bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import InvalidCheckpoint, MissingFile
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat
from core.rounding.base import Sensitivity, round_tensor
from core.rounding.limit import Limit
from core.storage.checkpoint import CheckpointIndex
from core.storage.safetensors_header import TensorEntry
from core.storage.sources import LocalFile
from core.tensors.dtypes import FLOATING
from core.tensors.reader import read_tensor

Matrix = NDArray[np.float64]

_ASYMMETRY = 1e-5  # of the largest magnitude: what sums in fp32, taken in another order, may differ by
_INDEFINITE = 1e-6  # of the largest eigenvalue
_LARGEST = 1e100  # magnitude of a statistic; products with squares of fp32 weights then stay finite
_TILE_BYTES = 64 << 20


@dataclass(frozen=True)
class Layer:
    """`weight` (out, in) fp32; `covariance` (in, in) and `cross` as in Sensitivity, fp64; `tokens` None if not told."""

    weight: torch.Tensor
    covariance: Matrix
    cross: Matrix | None = None
    tokens: int | None = None

    @classmethod
    def read(cls, path: Path) -> Layer:
        """From a layer file. MissingFile, or InvalidCheckpoint with what is wrong with which tensor."""
        if not path.is_file():
            raise MissingFile("no such file", where=str(path))
        try:
            index = CheckpointIndex.from_files({path.name: LocalFile(path)})
            _check_shapes(index.tensors)
            _check_dtypes(index.tensors)
            return cls._of({name: read_tensor(index, name) for name in _wanted(index.tensors)})
        except InvalidCheckpoint as error:
            raise error.at(str(path)) from None

    @classmethod
    def _of(cls, tensors: Mapping[str, torch.Tensor]) -> Layer:
        weight = tensors["weight"].float()
        if not weight.isfinite().all():
            raise InvalidCheckpoint("`weight` holds NaN, infinity or more than fp32 can")
        cross = _statistic(tensors, "cross") if "cross" in tensors else None
        layer = cls(weight, _symmetric(_statistic(tensors, "covariance")), cross, _tokens(tensors.get("tokens")))
        lowest, largest = float(layer.spectrum[0]), float(np.abs(layer.spectrum).max())
        if lowest < -_INDEFINITE * largest:
            reason = f"`covariance` has the eigenvalue {lowest:.3g} beside {largest:.3g}: no inputs have it"
            raise InvalidCheckpoint(reason, hint="E[x x^T], kept in fp32 or fp64")
        return layer

    @cached_property
    def spectrum(self) -> Matrix:
        """The eigenvalues of the covariance, ascending."""
        return np.asarray(np.linalg.eigvalsh(self.covariance), dtype=np.float64)

    @cached_property
    def limit(self) -> Limit:
        """What no code can beat on this layer."""
        return Limit.of_spectrum(self.weight.numpy(), self.spectrum)

    @property
    def sensitivity(self) -> Sensitivity:
        """The statistics as methods take them."""
        cross = None if self.cross is None else torch.from_numpy(self.cross)
        return Sensitivity(covariance=torch.from_numpy(self.covariance), tokens=self.tokens, cross=cross)

    def distortion(self, decoded: torch.Tensor | None = None) -> float:
        """Of a decoded weight (out, in) per weight; without one that of zeros, the power of the layer's output."""
        rows, columns = self.weight.shape
        step, total = max(1, _TILE_BYTES // (8 * columns)), 0.0
        for start in range(0, rows, step):
            tile = self.weight[start : start + step].double()
            if decoded is not None:
                tile -= decoded[start : start + step].double()
            error = tile.numpy()
            total += float(np.vdot(error @ self.covariance, error))
        return max(0.0, total / (rows * columns))

    def measure(self, fmt: TensorFormat, spec: RoundingSpec, seed: int = 0) -> dict[str, Any]:
        """Round, decode and compare: the numbers of `bitmill layer measure` as plain JSON values.

        `gap_bits` is None where the limit says nothing, `relative_distortion` where the layer's output is 0. `notes`:
        what rounding had to do otherwise than asked.
        """
        encoded = round_tensor(self.weight, fmt, spec, sensitivity=self.sensitivity, seed=seed)
        rate, distortion = 8 * encoded.nbytes / encoded.elements, self.distortion(encoded.decode())
        power = self.distortion()
        return {
            "rounding": spec.name,
            "parameters": {key: value for key, value in spec.canonical().items() if key != "name"},
            "format": str(encoded.format),
            "bits_per_param": rate,
            "stored_bytes": encoded.nbytes,
            "distortion": distortion,
            "relative_distortion": distortion / power if power else None,
            "limit": self.limit.distortion_at(rate),
            "gap_bits": self.limit.gap(rate, distortion),
            "notes": list(encoded.notes),
        }


def _check_dtypes(tensors: Mapping[str, TensorEntry]) -> None:
    for name in ("weight", "covariance", "cross"):
        if name in tensors and tensors[name].dtype not in FLOATING:
            raise InvalidCheckpoint(f"`{name}` of {tensors[name].dtype}", hint=f"one of {', '.join(FLOATING)}")


def _wanted(tensors: Mapping[str, TensorEntry]) -> list[str]:
    return [name for name in ("weight", "covariance", "cross", "tokens") if name in tensors]


def _check_shapes(tensors: Mapping[str, TensorEntry]) -> None:
    """Before anything is read: InvalidCheckpoint for a tensor that is missing or of a shape that does not fit."""
    for name in ("weight", "covariance"):
        if name not in tensors:
            raise InvalidCheckpoint(f"holds no tensor `{name}`", hint="`weight` (out, in) and `covariance` (in, in)")
    shape = tensors["weight"].shape
    if len(shape) != 2 or 0 in shape:
        raise InvalidCheckpoint(f"`weight` of shape {list(shape)}", hint="(out, in), neither of them 0")
    for name in ("covariance", "cross"):
        if name in tensors and tensors[name].shape != (shape[1], shape[1]):
            reason = f"`{name}` of shape {list(tensors[name].shape)} with a weight of {list(shape)}"
            raise InvalidCheckpoint(reason, hint=f"({shape[1]}, {shape[1]}), as the weight has columns")
    if "tokens" in tensors and tensors["tokens"].elements != 1:
        raise InvalidCheckpoint(f"`tokens` of shape {list(tensors['tokens'].shape)}", hint="one number")


def _statistic(tensors: Mapping[str, torch.Tensor], name: str) -> Matrix:
    values = tensors[name].double().numpy()
    if not (np.abs(values) <= _LARGEST).all():
        raise InvalidCheckpoint(f"`{name}` holds NaN, infinity or magnitudes beyond {_LARGEST:g}")
    return values


def _symmetric(covariance: Matrix) -> Matrix:
    apart = float(np.abs(covariance - covariance.T).max())
    if apart > _ASYMMETRY * float(np.abs(covariance).max()):
        raise InvalidCheckpoint(f"`covariance` is not symmetric: elements differ by {apart:.3g}", hint="E[x x^T]")
    found: Matrix = (covariance + covariance.T) / 2
    return found


def _tokens(given: torch.Tensor | None) -> int | None:
    if given is None:
        return None
    count = float(given.double())
    if not 1 <= count < 1 << 53 or count != int(count):
        raise InvalidCheckpoint(f"`tokens` is {count:g}", hint="a whole number of at least 1")
    return int(count)
