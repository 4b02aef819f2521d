"""What tells that rounding to nearest costs more, without working it out: never more than it really costs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import TensorFormat, parse
from core.rounding import grid_layer
from core.rounding.base import Sensitivity, round_tensor
from core.rounding.descent import NEAREST_KEPT
from core.rounding.grid_layer import GridLayer
from core.tensors.encoded import EncodedTensor
from core.tensors.nearest import encode_nearest
from tests.golden.covariance_families import FAMILIES, family

FORMATS = ("grid1@tensor", "grid3@64", "grid4@channel")
WATERSIC = RoundingSpec.model_validate({"name": "watersic"})


def weights_of(kind: str, rows: int = 1024, columns: int = 256) -> torch.Tensor:
    chance = np.random.default_rng(1)
    found = chance.standard_normal((rows, columns)) if kind != "heavy tails" else chance.standard_t(3, (rows, columns))
    if kind == "uneven rows":
        found *= np.exp(1.5 * chance.standard_normal((rows, 1)))
    return torch.from_numpy(found).float()


def layer_of(
    weight: torch.Tensor, name: str, cross: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> GridLayer:
    covariance = torch.from_numpy(family(name, weight.shape[1]).copy())
    given = Sensitivity(covariance=covariance, cross=cross, residual=residual)
    return GridLayer.of(weight, given, WATERSIC.filled)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "uneven rows"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_nearest_never_costs_less_than_it_is_said_to(kind: str, name: str) -> None:
    weight = weights_of(kind)
    layer = layer_of(weight, name)
    for fmt in map(parse, FORMATS):
        least, real = layer.nearest_costs_at_least(weight, fmt), layer.cost(encode_nearest(weight, fmt))
        assert least <= real
        if kind == "normal" and name != "pow2_haar":
            assert least > 0.7 * real


def test_drift_and_residual_count() -> None:
    weight, chance = weights_of("normal"), np.random.default_rng(4)
    covariance = torch.from_numpy(family("pow1_haar", 256).copy())
    cross = covariance + 0.02 * torch.from_numpy(chance.standard_normal((256, 256))) / 256
    residual = 0.01 * torch.from_numpy(chance.standard_normal((1024, 256))) / 16
    layer, fmt = layer_of(weight, "pow1_haar", cross=cross, residual=residual), parse("grid3@tensor")
    encoded = encode_nearest(weight, fmt)
    decoded, wide = encoded.decode().double(), weight.double()
    pull = wide @ (cross - covariance) + residual
    error = wide - decoded
    wanted = float((((error @ covariance) + 2 * pull) * error).sum())
    unit = layer.unit**2 * 2.0 ** math.frexp(float(covariance.abs().max()))[1]
    assert layer.cost(encoded) == pytest.approx(wanted / unit, rel=1e-4)
    assert layer.nearest_costs_at_least(weight, fmt) <= layer.cost(encoded)


@pytest.mark.parametrize("method", ["gptq", "watersic"])
def test_weights_that_are_a_grid_themselves_are_kept(method: str) -> None:
    """Nothing is known of them beforehand, and nearest, which costs nothing, is what is stored."""
    weight = torch.from_numpy(np.random.default_rng(2).integers(-3, 4, (1024, 256))).float() / 8
    layer = layer_of(weight, "ar1_0.9")
    assert layer.nearest_costs_at_least(weight, parse("grid3@tensor")) == -math.inf
    spec, covariance = RoundingSpec.model_validate({"name": method}), torch.from_numpy(family("ar1_0.9", 256).copy())
    found = round_tensor(weight, parse("grid3@tensor"), spec, sensitivity=Sensitivity(covariance=covariance), seed=0)
    nearest = encode_nearest(weight, found.format)
    assert layer.cost(found) <= layer.cost(nearest)


def test_what_is_known_spares_rounding_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, asked = weights_of("normal"), list[TensorFormat]()

    def noted(given: torch.Tensor, fmt: TensorFormat) -> EncodedTensor:
        asked.append(fmt)
        return encode_nearest(given, fmt)

    monkeypatch.setattr(grid_layer, "encode_nearest", noted)
    for name, count in (("pow2_haar", 0), ("identity", 1)):
        covariance = torch.from_numpy(family(name, 256).copy())
        spec = RoundingSpec.model_validate({"name": "gptq"})
        given = Sensitivity(covariance=covariance)
        found = round_tensor(weight, parse("grid3@tensor"), spec, sensitivity=given, seed=0)
        assert len(asked) == count
        assert NEAREST_KEPT not in found.notes or name == "identity"
