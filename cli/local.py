"""The pipeline without the service: the only module of the command line that reaches the numeric wing, and only inside
its functions, so that `bitmill --help` and the REST client never load torch.

Each function answers plain JSON values. Nothing here prints.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidCheckpoint, InvalidFormat, MissingFile, UserError

if TYPE_CHECKING:
    from core.recipe.recipe import Recipe
    from core.recipe.tensor_format import TensorFormat

Json = dict[str, Any]
Progress = Callable[[float, str], None]
Matrix = NDArray[np.float32]

MAX_SAMPLES = 1 << 32


def quantise(source: Path, recipe: Recipe, out: Path, device: str, progress: Progress) -> Json:
    """Run the whole pipeline here; the report of the artefact that is now in `out`."""
    from core.pipeline.local import run_recipe

    return run_recipe(_folder(source), recipe, out, device=_device(device), progress=progress)


def plan(source: Path, recipe: Recipe, device: str, progress: Progress) -> Json:
    """The allocation that a recipe leads to; no weights are written."""
    from core.pipeline.local import plan as plan_recipe

    return plan_recipe(_folder(source), recipe, device=_device(device), progress=progress)


def inspect(path: Path) -> Json:
    """A checkpoint's or an artefact's tensors, as its headers tell them."""
    from core.pipeline.local import inspect as inspect_folder

    return inspect_folder(_folder(path))


def dequantise(artefact: Path, out: Path, dtype: str) -> Json:
    """Decode an artefact into a plain checkpoint."""
    from core.pipeline.local import dequantise as dequantise_folder

    return dequantise_folder(_folder(artefact), out, dtype)


def evaluate(
    reference: Path, candidate: Path, text: str, sequences: int, length: int, device: str, progress: Progress
) -> Json:
    """Compare two folders on a text."""
    from core.pipeline.local import evaluate_folders

    return evaluate_folders(
        _folder(reference),
        _folder(candidate),
        text,
        sequences=sequences,
        sequence_length=length,
        device=_device(device),
        progress=progress,
    )


def data_to_measure(distribution: str, samples: int, seed: int, shape: str | None, data: Path | None) -> Matrix:
    """A (rows, columns) float32 array: the file's, or seeded draws of unit variance (one row without `shape`)."""
    if data is not None:
        return _array(data)
    rows, columns = _shape(shape) if shape else (1, samples)
    return draw(distribution, rows * columns, seed).reshape(rows, columns)


def draw(distribution: str, count: int, seed: int) -> Matrix:
    """`count` values of unit variance: normal, laplace, or student_t:NU with NU > 2."""
    generator = np.random.default_rng(seed)
    name, _, parameter = distribution.partition(":")
    if name == "normal":
        values = generator.standard_normal(count)
    elif name == "laplace":
        values = generator.laplace(scale=0.5**0.5, size=count)
    elif name == "student_t":
        nu = _degrees(parameter)
        values = generator.standard_t(nu, count) * ((nu - 2) / nu) ** 0.5
    else:
        raise UserError("no such distribution", where=distribution, hint="normal, laplace or student_t:NU")
    return values.astype(np.float32)


def _degrees(text: str) -> float:
    try:
        nu = float(text)
    except ValueError:
        nu = 0.0
    if not 2 < nu < np.inf:
        raise UserError("student_t needs a finite NU > 2 to have a variance", where=f"student_t:{text}")
    return nu


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition(",")
    if not (rows.strip().isdecimal() and columns.strip().isdecimal() and 0 < int(rows) * int(columns) <= MAX_SAMPLES):
        hint = f"--shape 512,4096; at most {MAX_SAMPLES} elements"
        raise UserError("a shape is two positive numbers", where=f"--shape {text[:80]}", hint=hint)
    return int(rows), int(columns)


def _array(path: Path) -> Matrix:
    try:
        values = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise MissingFile("no such file", where=str(path)) from None
    except (ValueError, EOFError) as error:
        raise UserError(f"not an array: {error}", where=str(path)) from None
    if not isinstance(values, np.ndarray) or not values.size:
        raise UserError("holds no single array with elements", where=str(path), hint="a 2-D float32 array")
    if values.ndim != 2 or values.dtype != np.float32:
        raise UserError(f"holds {values.dtype} of shape {values.shape}", where=str(path), hint="a 2-D float32 array")
    return np.asarray(values, dtype=np.float32)


def measure_format(text: str, values: Matrix, seed: int) -> Json:
    """Encode with the real coder and count its bytes; errors in float64."""
    import torch

    from core.recipe.tensor_format import parse
    from core.tensors.nearest import encode_nearest

    chosen = parse(text)
    encoded = encode_nearest(torch.from_numpy(values), chosen, seed=seed)
    difference = encoded.decode().double().numpy() - values.astype(np.float64)
    mse, power = float(np.mean(difference**2)), float(np.mean(values.astype(np.float64) ** 2))
    return {
        "format": str(chosen),
        "bits_per_param": 8 * encoded.nbytes / values.size,
        "stored_bytes": encoded.nbytes,
        "relative_rms_error": (mse / power) ** 0.5 if power else 0.0,
        "mse": mse,
        "seed": seed,
        "samples": values.size,
    }


def measure_layer(rounding: str, text: str, layer: Path, bits: float | None) -> Json:
    """Round one layer and compare its distortion with the information-theoretic limit at the bits it takes.

    distortion = tr((W - Q) S (W - Q)^T) / (out * in); limit: reverse waterfilling (see `waterfilling`).
    """
    import torch

    from core.recipe.rounding import RoundingSpec
    from core.recipe.tensor_format import MAX_BITS, parse
    from core.rounding.base import round_tensor

    weight, covariance = read_layer(layer)
    if bits is not None and not 1 <= bits <= MAX_BITS:
        raise InvalidFormat(f"{bits:g} bits", where="--bits", hint=f"1 to {MAX_BITS} bits")
    chosen: TensorFormat = parse(text) if bits is None else parse(text).with_bits(bits)
    encoded = round_tensor(torch.from_numpy(weight), chosen, RoundingSpec(name=rounding), sensitivity=None, seed=0)
    error = weight.astype(np.float64) - encoded.decode().double().numpy()
    distortion = float(np.einsum("oi,ij,oj->", error, covariance, error, optimize=True) / weight.size)
    rate = 8 * encoded.nbytes / weight.size
    variances = np.mean(weight.astype(np.float64) ** 2) * np.clip(np.linalg.eigvalsh(covariance), 0, None)
    return {
        "rounding": rounding,
        "format": str(chosen),
        "bits_per_param": rate,
        "stored_bytes": encoded.nbytes,
        "distortion": distortion,
        "limit": waterfilling(variances, rate),
        "gap_bits": rate - rate_at(variances, distortion),
    }


def read_layer(path: Path) -> tuple[Matrix, NDArray[np.float64]]:
    """`weight` (out, in) and the symmetric `covariance` (in, in) of a layer file."""
    from core.storage.checkpoint import CheckpointIndex
    from core.storage.sources import LocalFile
    from core.tensors.reader import read_tensor

    if not path.is_file():
        raise MissingFile("no such file", where=str(path))
    index = CheckpointIndex.from_files({path.name: LocalFile(path)})
    for name in ("weight", "covariance"):
        if name not in index.tensors:
            raise InvalidCheckpoint(f"holds no tensor `{name}`", where=str(path))
    weight = read_tensor(index, "weight").float().numpy()
    covariance = read_tensor(index, "covariance").double().numpy()
    if weight.ndim != 2 or covariance.shape != (weight.shape[1], weight.shape[1]):
        raise InvalidCheckpoint(f"shapes {weight.shape} and {covariance.shape} do not fit", where=str(path))
    if not weight.size or not np.isfinite(covariance).all():
        raise InvalidCheckpoint("an empty weight, or a covariance that is not finite", where=str(path))
    return weight, (covariance + covariance.T) / 2


def waterfilling(variances: NDArray[np.float64], rate: float) -> float:
    """The least mean distortion of independent Gaussians with these variances at `rate` bits each.

    Reverse waterfilling (Cover & Thomas, section 10.3.3): D(tau) = mean min(v, tau) at
    R(tau) = mean log2 max(1, v/tau)/2.
    In closed form: with k components active, log2 tau = (sum of their log2 v - 2 n R)/k; k is right when
    v_{k+1} <= tau <= v_k.
    """
    ordered = np.sort(variances[variances > 0])[::-1]
    if ordered.size == 0:
        return 0.0
    counts = np.arange(1, ordered.size + 1)
    levels = 2.0 ** ((np.cumsum(np.log2(ordered)) - 2 * variances.size * rate) / counts)
    following = np.append(ordered[1:], 0.0)
    level = float(levels[np.argmax((levels <= ordered) & (levels >= following))])
    return float(np.sum(np.minimum(ordered, level)) / variances.size)


def rate_at(variances: NDArray[np.float64], distortion: float) -> float:
    """The inverse of `waterfilling`: bits per component below which no code reaches `distortion`."""
    ordered = np.sort(variances)[::-1]
    if distortion >= float(np.mean(ordered)):
        return 0.0
    below = np.append(np.cumsum(ordered[::-1])[::-1][1:], 0.0)  # sum of the components after the k-th
    levels = (variances.size * distortion - below) / np.arange(1, ordered.size + 1)
    following = np.append(ordered[1:], 0.0)
    level = levels[np.argmax((levels <= ordered) & (levels >= following))]
    if level <= 0:
        return float("inf")
    return float(np.mean(0.5 * np.log2(np.maximum(1.0, ordered / level))))


def _device(name: str) -> str:
    """The device that `--device` names; UserError for one that this machine does not have."""
    import torch

    if name.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise UserError(f"no device {name!r}", where="--device", hint="cpu, cuda or auto")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device that torch can use", where="--device", hint="cpu or auto")
    return name


def _folder(path: Path) -> Path:
    if not path.exists():
        raise MissingFile("no such file or folder", where=str(path))
    return path
