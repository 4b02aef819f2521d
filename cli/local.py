"""The pipeline without the service: the only module of the command line that reaches the numeric wing, and only inside
its functions, so that `bitmill --help` and the REST client never load torch.

Each function answers plain JSON values. Nothing here prints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidFormat, InvalidRecipe, MissingFile, UserError

if TYPE_CHECKING:
    from core.recipe.recipe import Recipe
    from core.recipe.rounding import RoundingSpec

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
    """Round one layer and compare its distortion with the information-theoretic limit at the bits it takes."""
    from core.recipe.tensor_format import MAX_BITS, parse
    from core.rounding.layer import Layer

    chosen, spec = parse(text), rounding_of(rounding)
    if bits is not None:
        if not 0 < bits <= MAX_BITS:
            raise InvalidFormat(f"{bits:g} bits", where="--bits", hint=f"at most {MAX_BITS} bits")
        chosen = chosen.with_bits(bits)
    return Layer.read(layer).measure(chosen, spec)


def rounding_of(text: str) -> RoundingSpec:
    """A method by its name, or with parameters as a JSON object; InvalidRecipe says what is wrong with it."""
    from pydantic import ValidationError

    from core.recipe.problems import recipe_error
    from core.recipe.rounding import RoundingSpec

    try:
        given = json.loads(text) if text.lstrip().startswith("{") else text
        return RoundingSpec.model_validate(given)
    except ValidationError as error:
        raise recipe_error(error, RoundingSpec) from None
    except (ValueError, RecursionError) as error:
        hint = 'a name, or a JSON object such as {"name": "nearest"}'
        raise InvalidRecipe(f"not JSON: {error}"[:200], where="--rounding", hint=hint) from None


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
