"""What is expected of a method before anything is rounded, against what it then leaves over."""

from __future__ import annotations

import pytest
import torch

from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import parse
from core.rounding.base import Sensitivity, round_tensor
from core.rounding.expected import ExpectedShare
from tests.golden.covariance_families import family

ROWS, COLUMNS = 512, 96
PAPER = RoundingSpec(name="watersic", paths=1, mmse_damping=0.0)


def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def cost(spec: RoundingSpec, text: str, given: Sensitivity) -> float:
    fmt = parse(text)
    rounded = round_tensor(weight(), fmt, spec, sensitivity=given, seed=0)
    error, covariance = rounded.decode().double() - weight().double(), given.covariance
    assert covariance is not None
    return float(((error @ covariance) * error).sum())


@pytest.mark.parametrize("kind", ["ar1_0.9", "pow1_haar", "scaled_ar1"])
@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (PAPER, "grid4@tensor"),
        (PAPER, "grid2@tensor"),
        (RoundingSpec(name="gptq"), "grid4@tensor"),
        (RoundingSpec(name="gptq"), "int4@32"),
        (RoundingSpec(name="error_diffusion"), "int4@32"),
    ],
    ids=["watersic 4 bits", "watersic 2 bits", "gptq grid", "gptq int", "error diffusion"],
)
def test_the_expected_share_is_what_is_left_of_the_error_of_nearest_rounding(
    kind: str, spec: RoundingSpec, text: str
) -> None:
    given = Sensitivity(covariance=torch.from_numpy(family(kind, COLUMNS).copy()))
    left = cost(spec, text, given) / cost(RoundingSpec(name="nearest"), text, given)
    assert left < 0.6
    # Empirical, this seed: scales of blocks, clipping and cells that are not small against the weights.
    assert ExpectedShare(spec, given).at(parse(text).element_bits) == pytest.approx(left, rel=0.3)


@pytest.mark.parametrize("columns", ["natural", "ascending", "descending", "pivot"])
@pytest.mark.parametrize("text", ["grid4@tensor", "int4@32"])
def test_the_order_of_columns_and_damping_count(columns: str, text: str) -> None:
    given = Sensitivity(covariance=torch.from_numpy(family("scaled_ar1", COLUMNS).copy()))
    spec = RoundingSpec.model_validate({"name": "gptq", "columns": columns, "damping": 0.05})
    left = cost(spec, text, given) / cost(RoundingSpec(name="nearest"), text, given)
    expected = ExpectedShare(spec, given, is_grid=parse(text).is_grid).at(4.0)
    assert expected == pytest.approx(left, rel=0.35)  # empirical, this seed


def test_a_stack_has_the_mean_of_its_experts() -> None:
    known = [Sensitivity(covariance=torch.from_numpy(family(kind, 16).copy())) for kind in ("ar1_0.9", "scaled_ar1")]
    single = [ExpectedShare(PAPER, one).at(3.0) for one in known]
    stack = Sensitivity(experts=[*known, Sensitivity()])
    assert ExpectedShare(PAPER, stack).at(3.0) == pytest.approx((sum(single) + 1) / 3)


@pytest.mark.parametrize("name", ["gptq", "watersic"])
def test_nothing_is_expected_where_inputs_are_independent_and_alike(name: str) -> None:
    given = Sensitivity(covariance=3 * torch.eye(16, dtype=torch.float64))
    assert ExpectedShare(RoundingSpec(name=name), given).at(3.0) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["nearest", "squeezellm", "signround"])
def test_nothing_is_expected_of_methods_that_are_not_foreseen(name: str) -> None:
    given = Sensitivity(covariance=torch.from_numpy(family("scaled_ar1", 16).copy()))
    assert ExpectedShare(RoundingSpec(name=name), given).at(3.0) == 1.0
    assert ExpectedShare(RoundingSpec(name="gptq"), Sensitivity()).at(3.0) == 1.0


def test_inputs_that_are_always_zero_are_no_obstacle() -> None:
    zeros = Sensitivity(covariance=torch.zeros(4, 4, dtype=torch.float64))
    assert ExpectedShare(PAPER, zeros).at(3.0) == 1.0
