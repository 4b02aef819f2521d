"""What rounding on a GPU promises, run by `test_gpu_successive` in a process of its own: interpreted, or on a GPU.

The oracle is the compiled loop of the CPU, which the golden tests hold to published numbers. Blocks of 16 columns stand
for those of 128, but where it says so: the interpreter needs milliseconds for one operation.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from structlog.testing import capture_logs

from core.recipe.tensor_format import parse
from core.rounding import gpu_successive, successive
from core.rounding.levels import Levels
from core.rounding.successive import Numbers, Scales
from core.tensors.frame import Frame
from tests.golden.covariance_families import FAMILIES, family, weights

Doubles = NDArray[np.float64]
DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
SHAPES = [(rows, columns) for rows in (1, 3, 130) for columns in (1, 15, 16, 17, 40)]
PRECISIONS = [torch.float64, torch.float32]


@pytest.fixture(autouse=True)
def short_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "whole_blocks" not in request.fixturenames:
        monkeypatch.setattr(gpu_successive, "BLOCK", 16)


@pytest.fixture
def whole_blocks() -> None:
    """Leaves them as they are."""
    assert gpu_successive.BLOCK == 128


def factor_of(columns: int, seed: int = 0) -> torch.Tensor:
    inputs = np.random.default_rng(seed).standard_normal((columns, 2 * columns + 8))
    factor: torch.Tensor = torch.linalg.cholesky(torch.from_numpy(inputs @ inputs.T / (2 * columns + 8)))
    return factor


def layer(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Y^T and L."""
    factor = factor_of(columns)
    weight = np.random.default_rng(1).standard_normal((rows, columns))
    return (factor.T @ torch.from_numpy(weight).T).contiguous(), factor


def both(
    targets: torch.Tensor, factor: torch.Tensor, steps: Doubles, scales: Scales, gains: Doubles | None
) -> tuple[Numbers, Numbers]:
    """What is found here, and by the CPU."""
    found = gpu_successive.round_to_steps(targets.to(DEVICE, copy=True), factor.to(DEVICE), steps, scales, gains)
    assert found is not None
    return found, successive.round_to_steps(targets.clone(), factor, steps, scales, gains)


def assert_same(found: Numbers, expected: Numbers, tolerance: float = 1e-12) -> None:
    assert np.array_equal(found.numbers, expected.numbers)
    np.testing.assert_allclose(found.gains, expected.gains, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shrinks", [False, True])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_numbers_and_gains_are_those_of_the_cpu(rows: int, columns: int, shrinks: bool) -> None:
    targets, factor = layer(rows, columns)
    gains = None if shrinks else np.linspace(0.9, 1.1, columns)
    steps = 0.4 / factor.diagonal().numpy()
    assert_same(*both(targets, factor, steps, Scales.ones(rows, columns), gains))


@pytest.mark.parametrize("shrinks", [False, True])
def test_in_fp32_too(shrinks: bool) -> None:
    targets, factor = layer(37, 40)
    gains = None if shrinks else np.linspace(0.9, 1.1, 40)
    single = targets.float(), factor.float()
    found, expected = both(*single, 0.4 / factor.diagonal().numpy(), Scales.ones(37, 40), gains)
    assert_same(found, expected, tolerance=1e-5)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_ties_go_to_even_where_all_arithmetic_is_exact(dtype: torch.dtype) -> None:
    random = np.random.default_rng(3)
    factor = torch.from_numpy(np.tril(random.integers(-2, 3, (24, 24)) / 4, -1) + np.eye(24)).to(dtype)
    targets = torch.from_numpy(random.integers(-20, 21, (24, 33)) / 2).to(dtype)
    found, expected = both(targets, factor, np.ones(24), Scales.ones(33, 24), np.ones(24))
    assert_same(found, expected, tolerance=0.0)
    assert_same(expected, by_hand(targets.double().numpy(), factor.double().numpy()), tolerance=0.0)


def by_hand(targets: Doubles, factor: Doubles) -> Numbers:
    """Row after row in Python's own rounding, steps 1."""
    numbers = np.empty(targets.shape, np.int32)
    for row in range(targets.shape[1]):
        left = targets[:, row].copy()
        for at in reversed(range(len(left))):
            numbers[at, row] = round(float(left[at] / factor[at, at]))
            left[:at] -= factor[at, :at] * numbers[at, row]
    return Numbers(numbers, np.ones(len(targets)))


def test_scales_of_blocks_and_columns_whose_step_or_scale_is_0() -> None:
    targets, factor = layer(35, 40)
    values = np.exp2(np.random.default_rng(4).integers(-3, 3, (5, 35)).astype(np.float64))
    values[2, 7] = values[:, 9] = 0.0
    steps = 0.3 / factor.diagonal().numpy()
    steps[[0, 21]] = 0.0
    for gains in (None, np.where(np.arange(40) == 5, 0.0, 1.0)):
        found, expected = both(targets, factor, steps, Scales(values, np.arange(40) // 8), gains)
        assert_same(found, expected)
        assert not found.numbers[[0, 21]].any()
        assert not found.numbers[:, 9].any()


def test_a_factor_that_is_not_contiguous_and_blocks_in_any_order() -> None:
    targets, factor = layer(5, 40)
    blocks = np.random.default_rng(5).integers(0, 3, 40)
    scales = Scales(1 + np.arange(15.0).reshape(3, 5), blocks)
    turned = factor.T.contiguous().T
    assert_same(*both(targets.T.contiguous().T, turned, np.full(40, 0.2), scales, np.ones(40)))


@pytest.mark.usefixtures("whole_blocks")
@pytest.mark.parametrize("columns", [127, 129])
def test_numbers_of_whole_blocks(columns: int) -> None:
    targets, factor = layer(3, columns)
    assert_same(*both(targets, factor, 0.4 / factor.diagonal().numpy(), Scales.ones(3, columns), np.ones(columns)))


@pytest.mark.usefixtures("whole_blocks")
def test_numbers_and_gains_of_several_whole_blocks() -> None:
    targets, factor = layer(130, 300)
    assert_same(*both(targets, factor, 0.4 / factor.diagonal().numpy(), Scales.ones(130, 300), None))


@pytest.mark.parametrize("name", FAMILIES)
def test_golden_families_differ_nowhere(name: str) -> None:
    covariance = torch.from_numpy(family(name, 48).copy())
    factor = torch.linalg.cholesky(covariance)
    weight = torch.from_numpy(weights(96, 48).copy())
    targets, steps = (factor.T @ weight.T).contiguous(), 0.25 / factor.diagonal().numpy()
    assert_same(*both(targets, factor, steps, Scales.ones(96, 48), None))


FORMATS = [
    "int4@16",
    "int4-sym@16:signmax",
    "nf4@8",
    "t5_4@16:signmax",
    "float4_e2m1@16:absmax:e4m3",
    "float4_e2m1@32:absmax:e8m0",
    "int3@channel",
    "int8@16",
    "normal8@channel",
    "int2@tensor",
    "int3.58@16",
]


def frame_of(text: str, rows: int, columns: int) -> Frame:
    weight = torch.randn((rows, columns), generator=torch.Generator().manual_seed(6))
    if rows > 2:
        weight[1] = 0.0
        weight[2, : columns // 2] = 0.0
    return Frame.of(weight, parse(text))


def assert_spread_alike(frame: Frame, ratios: torch.Tensor, levels: Levels, ahead: float = 0.0) -> None:
    weights_ = frame.matrix.double().T.contiguous()
    wanted = weights_ + ahead
    on_device = (wanted.to(DEVICE, copy=True), weights_.to(DEVICE), ratios.to(DEVICE))
    found = gpu_successive.spread(*on_device, levels)
    assert found is not None
    assert np.array_equal(found, successive.spread(wanted.clone(), weights_, ratios, levels))


@pytest.mark.parametrize("text", FORMATS)
def test_levels_are_those_of_the_cpu_in_every_kind_of_format(text: str) -> None:
    frame, factor = frame_of(text, 35, 40), factor_of(40)
    ratios = (factor / factor.diagonal()).flip(0, 1)
    assert_spread_alike(frame, ratios, Levels.of(frame))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_levels_are_those_of_the_cpu_in_every_shape(rows: int, columns: int) -> None:
    frame, factor = frame_of("int4@8", rows, columns), factor_of(columns)
    covariance = factor @ factor.T
    assert_spread_alike(frame, covariance / covariance.diagonal(), Levels.of(frame), ahead=0.01)


@pytest.mark.parametrize("text", ["int4@16", "nf4@16", "float4_e2m1@16:absmax:e4m3"])
def test_without_errors_to_spread_levels_are_the_nearest_ties_included(text: str) -> None:
    frame = frame_of(text, 20, 32)
    levels = Levels.of(frame)
    scales = frame.scales.repeat_interleave(frame.width, dim=1)
    places = torch.arange(20 * 32).reshape(20, 32) % len(levels.limits)
    halfway = (torch.from_numpy(levels.limits)[places] * scales.double()).float()
    assert_spread_alike(Frame(**vars(frame) | {"matrix": halfway}), torch.zeros(32, 32).double(), levels)


def test_levels_in_an_order_of_their_own() -> None:
    frame, factor = frame_of("nf4@8", 9, 40), factor_of(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(7))
    assert_spread_alike(frame, factor / factor.diagonal(), Levels.of(frame).ordered(order))


@pytest.mark.usefixtures("whole_blocks")
@pytest.mark.parametrize("columns", [128, 129])
def test_levels_of_whole_blocks(columns: int) -> None:
    frame, factor = frame_of("int4@channel", 3, columns), factor_of(columns)
    assert_spread_alike(frame, (factor / factor.diagonal()).flip(0, 1), Levels.of(frame))


def test_what_kernels_do_not_take_is_left_to_the_cpu_and_said_once() -> None:
    many, factor = gpu_successive.TOGETHER_ROWS + 1, torch.eye(2, dtype=torch.float64, device=DEVICE)
    targets, ones = torch.ones(2, many, dtype=torch.float64, device=DEVICE), np.ones(2)
    with capture_logs() as logs:
        for _ in range(2):
            assert gpu_successive.round_to_steps(targets, factor, ones, Scales.ones(many, 2), None) is None
        assert gpu_successive.round_to_steps(targets[:0], factor[:0, :0], ones[:0], Scales.ones(many, 0), ones) is None
    assert [log["reason"] for log in logs] == [f"gains of more than {many - 1} rows", "no weights"]
    assert gpu_successive.round_to_steps(targets, factor, ones, Scales.ones(many, 2), ones) is not None
