"""One layer on power grids against a reference run: rounding, GPTQ and coordinate descent, on inputs not seen before.

Through the real coder, with fp32 scales. The exponents are those of the run, the best of the grid for rounding in the
power domain.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import parse
from core.rounding.base import Sensitivity
from core.rounding.power_learned import round_tensor
from core.tensors.encoded import EncodedTensor
from core.tensors.nearest import encode_nearest
from tests.golden.seeded_data import ENTRIES

KEYS = [f"{data}/{kind}/b={bits}" for data in ("numpy", "torch") for kind in ("gauss", "heavy") for bits in (4, 3)]
GPTQ = RoundingSpec(name="power_learned", refine=0)
LEARNED = RoundingSpec(name="power_learned")
# The golden number, the method and the element: exponent 1 or the run's, rounding in the power domain or to nearest.
ROWS = {
    "rtn_a1": (None, "power1_{bits}"),
    "rtn": (None, "power{alpha}_{bits}-power"),
    "gptq_a1": (GPTQ, "power1_{bits}"),
    "gptq": (GPTQ, "power{alpha}_{bits}-power"),
    "gptq_nearest": (GPTQ, "power{alpha}_{bits}"),
    "gptq_then_coordinate_descent": (LEARNED, "power{alpha}_{bits}-power"),  # its GPTQ rounds in the power domain
}


class Layer(NamedTuple):
    """Weight (128, 256), fp64, and columns of inputs."""

    weight: torch.Tensor
    calibration: torch.Tensor
    test: torch.Tensor


@lru_cache(maxsize=4)
def layer(data: str, kind: str) -> Layer:
    return of_numpy(kind) if data == "numpy" else of_torch(kind)


def of_numpy(kind: str) -> Layer:
    chance = np.random.default_rng(0)
    drawn = chance.standard_normal((128, 256)) if kind == "gauss" else chance.standard_t(5, (128, 256))
    mixing = chance.standard_normal((256, 48)) / 7

    def columns(count: int) -> torch.Tensor:
        made = mixing @ chance.standard_normal((48, count)) + 0.2 * chance.standard_normal((256, count))
        return torch.from_numpy(made)

    return Layer(torch.from_numpy(drawn / 16), columns(512), columns(4096))


def of_torch(kind: str) -> Layer:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    weight, mixing = normal(128, 256) / 16, normal(256, 48) / 7
    if kind == "heavy":
        spread = normal(128, 256, 5).square().mean(-1)
        weight = normal(128, 256) / spread.sqrt() / 16

    def columns(count: int) -> torch.Tensor:
        return (mixing @ normal(48, count) + 0.2 * normal(256, count)).double()

    return Layer(weight.double(), columns(512), columns(4096))


def output_error(given: Layer, encoded: EncodedTensor) -> float:
    """Relative squared error of the layer's output on inputs not seen before."""
    error = (encoded.decode().double() - given.weight) @ given.test
    return float(error.square().sum() / (given.weight @ given.test).square().sum())


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("key", KEYS)
def test_the_layer_errs_as_in_the_reference_run(key: str, row: str) -> None:
    entry: dict[str, Any] = ENTRIES[f"power/layer-reconstruction/{key}"]
    data, kind, bits = key.split("/")
    given, (spec, element) = layer(data, kind), ROWS[row]
    name = element.format(bits=bits.removeprefix("b="), alpha=entry["value"]["a_star"])
    fmt = parse(f"{name}@channel:absmax:fp32")
    known = Sensitivity(covariance=given.calibration @ given.calibration.T / 512)
    weight = given.weight.float()
    encoded = encode_nearest(weight, fmt) if spec is None else round_tensor(weight, fmt, known, spec, 0)
    found = output_error(given, encoded)
    is_descent = row == "gptq_then_coordinate_descent"
    tolerance = entry["coordinate_descent_rel_tol"] if is_descent else entry["rel_tol"]
    assert found == pytest.approx(entry["value"][row], rel=tolerance)


@pytest.mark.parametrize("key", KEYS)
def test_from_the_nearest_levels_descent_ends_lower_than_in_the_run(key: str) -> None:
    data, kind, bits = key.split("/")
    given, expected = layer(data, kind), ENTRIES[f"power/layer-reconstruction/{key}"]["value"]
    fmt = parse(f"power{expected['a_star']}_{bits.removeprefix('b=')}@channel:absmax:fp32")
    known = Sensitivity(covariance=given.calibration @ given.calibration.T / 512)
    found = output_error(given, round_tensor(given.weight.float(), fmt, known, LEARNED, 0))
    assert found < 0.99 * expected["gptq_then_coordinate_descent"]


@pytest.mark.parametrize("key", KEYS)
def test_the_exponent_that_is_found_without_data_is_that_of_the_run(key: str) -> None:
    data, kind, bits = key.split("/")
    fmt = parse(f"power{bits.removeprefix('b=')}-power@channel:absmax:fp32")
    found = encode_nearest(layer(data, kind).weight.float(), fmt).fitted
    assert found == pytest.approx(ENTRIES[f"power/layer-reconstruction/{key}"]["value"]["a_star"], abs=1e-9)
