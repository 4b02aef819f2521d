"""Error diffusion on a small network against a reference run: errors and agreement on inputs that were not seen.

Layer by layer through the real coder: inputs of a layer are those that the layers before it, quantised, give. The codes
of the direct form, which holds the output error itself, are those of the Gram form.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import parse
from core.rounding.base import Sensitivity
from core.rounding.error_diffusion import round_tensor
from core.tensors.nearest import encode_nearest
from tests.golden.seeded_data import ENTRIES

FORMATS = {
    "MXINT4-floor": "mxint4",
    "MXFP4-floor": "mxfp4",
    "MXFP4-even": "float4_e2m1@32:absmax:e8m0-even",
    "INT4-g32-float-scale": "int3.91-sym@32:absmax:fp32",
    "NF4-g64": "nf4@64:absmax:fp32",
    "MXINT8-floor": "mxint8",
}
SIZES = (256, 512, 512, 10)
ROUNDINGS = {
    "ed": RoundingSpec(name="error_diffusion", refine=0),
    "ed_then_cd": RoundingSpec(name="error_diffusion"),
}
DATA = ("numpy", "torch")


class Network(NamedTuple):
    """Weights (out, in) and columns of inputs, float64."""

    weights: list[torch.Tensor]
    calibration: torch.Tensor
    test: torch.Tensor


class Result(NamedTuple):
    test_error: float
    agreement: float
    calibration_error: float


@lru_cache(maxsize=4)
def network(data: str, columns: int = 512) -> Network:
    generator, chance = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def normal(*size: int) -> torch.Tensor:
        if data == "torch":
            return torch.randn(*size, generator=generator, dtype=torch.float64)
        return torch.from_numpy(chance.standard_normal(size))

    weights = [normal(out, into) * (2 / into) ** 0.5 for into, out in pairwise(SIZES)]
    mixing = normal(256, 64) / 8
    return Network(weights, *(mixing @ normal(64, count) + 0.1 * normal(256, count) for count in (columns, 2048)))


def activated(weight: torch.Tensor, inputs: torch.Tensor, at: int) -> torch.Tensor:
    found = weight @ inputs
    return found if at == len(SIZES) - 2 else found.relu()


def compared(expected: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """Relative squared error and how often the largest output is the same."""
    error = float((found - expected).square().sum() / expected.square().sum())
    return error, float((found.argmax(0) == expected.argmax(0)).double().mean())


@lru_cache(maxsize=128)
def quantised(data: str, name: str, method: str, columns: int = 512) -> Result:
    """The network rounded by a method, each layer with the inputs that those before it give."""
    given, fmt = network(data, columns), parse(FORMATS[name])
    streams, quantised_streams = [given.calibration, given.test], [given.calibration, given.test]
    for at, weight in enumerate(given.weights):
        exact, inputs = streams[0], streams[0] if method == "ed_float_stream_only" else quantised_streams[0]
        sensitivity = Sensitivity(covariance=inputs @ inputs.T / columns, cross=exact @ inputs.T / columns)
        if method == "rtn":
            encoded = encode_nearest(weight, fmt)
        else:
            spec = ROUNDINGS["ed" if method == "ed_float_stream_only" else method]
            encoded = round_tensor(weight, fmt, sensitivity, spec, 0)
        decoded = encoded.decode().double()
        streams = [activated(weight, one, at) for one in streams]
        quantised_streams = [activated(decoded, one, at) for one in quantised_streams]
    error, agreement = compared(streams[1], quantised_streams[1])
    return Result(error, agreement, compared(streams[0], quantised_streams[0])[0])


@pytest.mark.parametrize("method", ["rtn", "ed", "ed_float_stream_only"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("data", DATA)
def test_the_network_errs_as_in_the_reference_run(data: str, name: str, method: str) -> None:
    entry: dict[str, Any] = ENTRIES[f"error-diffusion/mlp/{data}/{name}"]
    expected, found = entry["value"][method], quantised(data, name, method)
    assert found.test_error == pytest.approx(expected["test_error"], rel=entry["rel_tol"])
    assert found.calibration_error == pytest.approx(expected["calibration_error"], rel=entry["rel_tol"])
    assert found.agreement == pytest.approx(expected["agreement"], abs=entry["agreement_abs_tol"])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("data", DATA)
def test_coordinate_descent_after_it_errs_as_in_the_reference_run(data: str, name: str) -> None:
    entry: dict[str, Any] = ENTRIES[f"error-diffusion/ed-then-coordinate-descent/{data}"]
    expected, found = entry["value"][name], quantised(data, name, "ed_then_cd")
    assert found.test_error == pytest.approx(expected["test_error"], rel=entry["rel_tol"])
    assert found.agreement == pytest.approx(expected["agreement"], abs=entry["agreement_abs_tol"])


@pytest.mark.parametrize("name", ["MXINT4-floor", "MXFP4-floor", "INT4-g32-float-scale", "NF4-g64"])
@pytest.mark.parametrize("data", DATA)
def test_it_errs_about_half_as_much_as_rounding_to_nearest(data: str, name: str) -> None:
    assert quantised(data, name, "ed").test_error < 0.55 * quantised(data, name, "rtn").test_error


@pytest.mark.parametrize("method", ["rtn", "ed", "ed_float_stream_only"])
def test_more_calibration_helps_as_in_the_reference_run(method: str) -> None:
    entry: dict[str, Any] = ENTRIES["error-diffusion/mlp/torch-N2048/MXINT4-floor"]
    found = quantised("torch", "MXINT4-floor", method, 2048)
    assert found.test_error == pytest.approx(entry["value"][method]["test_error"], rel=entry["rel_tol"])


def directly(
    weight: torch.Tensor, inputs: torch.Tensor, quantised_inputs: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """B2 as it stands, for E2M1 with these scales (out, in): values (out, in)."""
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    levels = torch.cat((-positive.flip(0)[:-1], positive))
    limits = (levels[1:] + levels[:-1]) / 2
    residual, found = torch.zeros(weight.shape[0], inputs.shape[1], dtype=torch.float64), torch.zeros_like(weight)
    for t in range(weight.shape[1]):
        wanted = residual + torch.outer(weight[:, t], inputs[t])
        best = wanted @ quantised_inputs[t] / quantised_inputs[t].square().sum()
        found[:, t] = levels[torch.bucketize(best / scales[:, t], limits)] * scales[:, t]
        residual = wanted - torch.outer(found[:, t], quantised_inputs[t])
    return found


def test_the_gram_form_gives_the_codes_of_the_direct_form() -> None:
    given, fmt = network("numpy"), parse("mxfp4")
    inputs = given.calibration
    others = inputs + 0.01 * torch.from_numpy(np.random.default_rng(3).standard_normal(tuple(inputs.shape)))
    weight = given.weights[0].float().double()
    sensitivity = Sensitivity(covariance=others @ others.T, cross=inputs @ others.T)
    encoded = round_tensor(weight.float(), fmt, sensitivity, ROUNDINGS["ed"], 0)
    scales = encoded.scale_values.reshape(512, -1).repeat_interleave(32, dim=1).double()
    different = int((directly(weight, inputs, others, scales) != encoded.decode().double()).sum())
    assert different <= ENTRIES["error-diffusion/gram-form"]["rel_tol"] * weight.numel()
