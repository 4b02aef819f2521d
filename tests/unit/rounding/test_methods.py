"""Data-aware rounding through the real coder: what every method promises, and what each one gains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import BitmillError, InvalidCheckpoint, InvalidFormat
from core.recipe.rounding import PARAMETERS, RoundingSpec
from core.recipe.tensor_format import parse
from core.rounding import grids, successive
from core.rounding.base import Sensitivity, round_tensor
from core.rounding.levels import Levels
from core.rounding.limit import Limit
from core.rounding.objective import Objective
from core.rounding.successive import Scales, round_to_steps
from core.tensors.column_scales import LARGEST, as_stored, nearest_codes, scales_of, stored_values
from core.tensors.encoded import EncodedTensor
from core.tensors.frame import Frame
from core.tensors.indices import nearest_indices
from core.tensors.nearest import encode_nearest
from tests.golden.covariance_families import family, weights

FORMATS = {
    "gptq": (
        "int4@32",
        "t5_4@64:signmax",
        "mxfp4",
        "normal4@channel+hadamard",
        "int3-asym@tensor",
        "grid3@channel",
        "grid4@tensor+huffman",
    ),
    "watersic": ("grid3@tensor", "grid2.5@channel"),
    "error_diffusion": ("mxint4", "nf4@64"),
    "power_learned": ("power4@channel", "power0.7_3@channel"),
    "squeezellm": ("lloyd3-rows@channel",),
    "signround": ("int4@32",),
}
CASES = [(name, text) for name, texts in FORMATS.items() for text in texts]


def spec(name: str, **parameters: Any) -> RoundingSpec:
    return RoundingSpec.model_validate({"name": name, **parameters})


def layer(rows: int = 96, columns: int = 128, name: str = "pow1_haar") -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.from_numpy(weights(rows, columns).copy()).float(),
        torch.from_numpy(family(name, columns).copy()),
    )


def output_error(weight: torch.Tensor, encoded: EncodedTensor, covariance: torch.Tensor) -> float:
    error = weight.double() - encoded.decode().double()
    return float(((error @ covariance) * error).sum() / error.numel())


def again(encoded: EncodedTensor) -> EncodedTensor:
    """The tensor that its stored parts give."""
    return EncodedTensor.from_parts(encoded.format, encoded.shape, encoded.dtype, encoded.parts())


@pytest.mark.parametrize(("name", "text"), CASES)
def test_errors_of_outputs_are_smaller_than_of_nearest_rounding_in_no_more_bytes(name: str, text: str) -> None:
    weight, covariance = layer()
    encoded = round_tensor(weight, parse(text), spec(name), sensitivity=Sensitivity(covariance=covariance), seed=1)
    nearest = encode_nearest(weight, parse(text), seed=1)
    assert encoded.format == spec(name).stored_format(parse(text))
    assert encoded.nbytes <= nearest.nbytes
    assert torch.equal(again(encoded).decode(), encoded.decode())
    assert output_error(weight, encoded, covariance) < output_error(weight, nearest, covariance)


@pytest.mark.parametrize(("name", "text"), CASES)
@pytest.mark.parametrize("shape", [(1, 128), (40, 1), (1, 1), (0, 16), (3, 5), (2, 3, 32)])
def test_odd_shapes(name: str, text: str, shape: tuple[int, ...]) -> None:
    weight = torch.from_numpy(np.random.default_rng(5).standard_normal(shape)).float()
    covariance = torch.eye(shape[-1], dtype=torch.float64) + 0.5
    found = round_tensor(weight, parse(text), spec(name), sensitivity=Sensitivity(covariance=covariance), seed=0)
    decoded = again(found).decode()
    assert decoded.shape == shape
    assert bool(torch.isfinite(decoded).all())


@pytest.mark.parametrize(("name", "text"), CASES)
def test_without_statistics_all_inputs_count_alike_and_the_result_says_so(name: str, text: str) -> None:
    weight, _ = layer(24, 64)
    found = round_tensor(weight, parse(text), spec(name), sensitivity=None, seed=1)
    assert any("no statistics" in note for note in found.notes)


@pytest.mark.parametrize(("name", "text"), CASES)
@pytest.mark.parametrize("kind", ["zero", "rank one", "one dead input"])
def test_singular_statistics(name: str, text: str, kind: str) -> None:
    weight, covariance = layer(24, 64)
    if kind == "zero":
        covariance = torch.zeros_like(covariance)
    elif kind == "rank one":
        vector = torch.linspace(0.5, 1.5, 64, dtype=torch.float64)
        covariance = torch.outer(vector, vector)
    else:
        covariance[3], covariance[:, 3] = 0.0, 0.0
    given = Sensitivity(covariance=covariance, tokens=512)
    found = round_tensor(weight, parse(text), spec(name), sensitivity=given, seed=0)
    assert bool(torch.isfinite(found.decode()).all())


@pytest.mark.parametrize("name", ["gptq", "watersic", "power_learned"])
@pytest.mark.parametrize("kind", ["indefinite", "lopsided", "not a number"])
def test_what_are_no_statistics_is_refused(name: str, kind: str) -> None:
    weight, covariance = layer(8, 32)
    if kind == "indefinite":
        covariance[0, 1] = covariance[1, 0] = 50.0
    elif kind == "lopsided":
        covariance[0, 1] += 1
    else:
        covariance[2, 2] = float("nan")
    given = Sensitivity(covariance=covariance)
    with pytest.raises(InvalidCheckpoint):
        round_tensor(weight, parse(FORMATS[name][0]), spec(name), sensitivity=given, seed=0)


@pytest.mark.parametrize(("name", "text"), CASES)
@pytest.mark.parametrize("size", [16, 64])
def test_statistics_of_another_number_of_inputs_are_refused(name: str, text: str, size: int) -> None:
    weight, _ = layer(8, 32)
    given = Sensitivity(covariance=torch.eye(size, dtype=torch.float64))
    with pytest.raises(InvalidFormat, match=r"covariance of .* for a weight"):
        round_tensor(weight, parse(text), spec(name), sensitivity=given, seed=0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("watersic", "int4@128"),
        ("watersic", "grid3@128"),
        ("watersic", "grid3@tensor+huffman"),
        ("gptq", "q4_k"),
        ("gptq", "int4@32+outliers0.01"),
        ("gptq", "grid3@tensor+columns"),
        ("gptq", "grid3@tensor+hadamard"),
        ("error_diffusion", "grid3@tensor"),
        ("power_learned", "int4@32"),
        ("power_learned", "q4_k"),
        ("signround", "nf4@64"),
    ],
)
def test_formats_that_a_method_cannot_use(name: str, text: str) -> None:
    with pytest.raises(InvalidFormat) as refused:
        spec(name).stored_format(parse(text))
    assert refused.value.hint


def test_every_method_has_parameters_and_a_default_for_each() -> None:
    assert set(PARAMETERS) == set(RoundingSpec.KNOWN)
    for name, known in PARAMETERS.items():
        assert {key: getattr(spec(name).filled, key) for key in known} == known


class TestSuccessiveRounding:
    @given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 100))
    @settings(max_examples=20, deadline=None)
    def test_residuals_stay_in_their_box(self, rows: int, columns: int, seed: int) -> None:
        """|((W - Z A) L)_ki| <= alpha_i L_ii / 2."""
        objective, weight, steps = self.problem(rows, columns, seed)
        found = round_to_steps(objective.targets(weight), objective.factor, steps, *plain(rows, columns))
        left = (weight - torch.from_numpy(found.numbers.T * steps)) @ objective.factor
        box = torch.from_numpy(steps) * objective.units / 2
        assert bool((left.abs() <= box * (1 + 1e-7)).all())

    def test_a_shift_by_whole_steps_shifts_the_numbers(self) -> None:
        objective, weight, steps = self.problem(20, 48, 3)
        shift = torch.from_numpy(np.random.default_rng(1).integers(-3, 4, (20, 48)).astype(np.float64))
        one = round_to_steps(objective.targets(weight), objective.factor, steps, *plain(20, 48))
        moved = weight + shift * torch.from_numpy(steps)
        two = round_to_steps(objective.targets(moved), objective.factor, steps, *plain(20, 48))
        assert np.array_equal(two.numbers - one.numbers, shift.numpy().T.astype(np.int32))

    @pytest.mark.parametrize("shrinks", [False, True])
    def test_blocks_change_nothing(self, monkeypatch: pytest.MonkeyPatch, shrinks: bool) -> None:
        objective, weight, steps = self.problem(50, 130, 4)
        found = []
        for block in (7, 32, 200):
            monkeypatch.setattr(successive, "BLOCK", block)
            scales, gains = plain(50, 130)
            given = (objective.targets(weight), objective.factor, steps, scales)
            found.append(round_to_steps(*given, None if shrinks else gains))
        assert all(np.array_equal(found[0].numbers, other.numbers) for other in found[1:])

    @staticmethod
    def problem(rows: int, columns: int, seed: int) -> tuple[Objective, torch.Tensor, Any]:
        chance = np.random.default_rng(seed)
        inputs = chance.standard_normal((4 * columns, columns)) @ chance.standard_normal((columns, columns))
        covariance = torch.from_numpy(inputs.T @ inputs / len(inputs))
        weight = torch.from_numpy(chance.standard_normal((rows, columns)))
        return Objective.of(Sensitivity(covariance=covariance)), weight, chance.uniform(0.1, 1.0, columns)


def plain(rows: int, columns: int) -> tuple[Scales, Any]:
    return Scales.ones(rows, columns), np.ones(columns)


class TestGptq:
    @pytest.mark.parametrize("text", ["int4@32", "t5_4@64:signmax", "mxfp4", "nf4@100", "int8-sym@channel"])
    def test_independent_inputs_give_nearest_rounding(self, text: str) -> None:
        weight, _ = layer(40, 128)
        covariance = torch.diag(torch.linspace(0.5, 2.0, 128, dtype=torch.float64))
        given = Sensitivity(covariance=covariance)
        found = round_tensor(weight, parse(text), spec("gptq"), sensitivity=given, seed=0)
        assert torch.equal(found.decode(), encode_nearest(weight, parse(text)).decode())

    @pytest.mark.parametrize("text", ["int3@64", "nf4@64", "grid3@tensor"])
    def test_more_paths_are_better(self, text: str) -> None:
        weight, covariance = layer(128, 128, "ar1_0.9")
        given = Sensitivity(covariance=covariance)
        errors = [
            output_error(weight, round_tensor(weight, parse(text), one, sensitivity=given, seed=0), covariance)
            for one in (spec("gptq"), spec("gptq", paths=16))
        ]
        assert errors[1] < 0.95 * errors[0]


class TestWatersic:
    @pytest.mark.parametrize("name", ["ar1_0.9", "pow2_haar", "scaled_ar1", "factor_mix"])
    @pytest.mark.parametrize("bits", [2, 3])
    def test_stored_bits_lie_close_to_the_limit(self, name: str, bits: int) -> None:
        """1024 x 256: .255 and what scales, models and the rest of small tensors take."""
        weight, covariance = layer(1024, 256, name)
        given = Sensitivity(covariance=covariance)
        found = round_tensor(weight, parse(f"grid{bits}@tensor"), spec("watersic"), sensitivity=given, seed=0)
        stored = 8 * found.nbytes / weight.numel()
        assert bits - 0.01 <= stored <= bits
        gap = Limit.of(weight.numpy(), covariance.numpy()).gap(stored, output_error(weight, found, covariance))
        assert gap is not None
        assert gap < 0.285

    @pytest.mark.parametrize("name", ["watersic", "gptq"])
    @pytest.mark.parametrize(("of_weights", "of_inputs"), [(-20, 0), (7, 0), (60, 0), (0, 200), (0, -200), (-6, 9)])
    def test_units_change_nothing(self, name: str, of_weights: int, of_inputs: int) -> None:
        weight, covariance = layer(256, 96, "scaled_ar1")
        found = [
            round_tensor(
                weight * 2.0**w,
                parse("grid2@tensor"),
                spec(name),
                sensitivity=Sensitivity(covariance=covariance * 2.0**s),
                seed=0,
            )
            for w, s in ((0, 0), (of_weights, of_inputs))
        ]
        assert torch.equal(found[0].codes, found[1].codes)
        assert torch.equal(found[0].decode() * 2.0**of_weights, found[1].decode())

    @pytest.mark.parametrize("name", ["watersic", "gptq"])
    @pytest.mark.parametrize("case", ["a few large inputs", "log-normal inputs", "one large weight", "tiny columns"])
    def test_no_layer_is_worse_than_rounded_to_nearest(self, name: str, case: str) -> None:
        weight, covariance = layer(64, 128)
        scales = torch.ones(128, dtype=torch.float64)
        if case == "a few large inputs":
            scales[:2] = 1000
        elif case == "log-normal inputs":
            scales = torch.from_numpy(np.exp(2 * np.random.default_rng(3).standard_normal(128)))
        elif case == "one large weight":
            weight[5, 7] = 1e4
        else:
            weight[:, ::2] *= 1e-20
        covariance = covariance * scales[:, None] * scales
        given = Sensitivity(covariance=covariance)
        found = round_tensor(weight, parse("grid3@channel"), spec(name), sensitivity=given, seed=0)
        nearest = encode_nearest(weight, found.format)
        assert output_error(weight, found, covariance) <= output_error(weight, nearest, covariance)
        assert found.nbytes <= nearest.nbytes

    @pytest.mark.parametrize("bits", [2, 3])
    def test_inputs_that_depend_on_each_other_cost_no_more_than_there_are(self, bits: int) -> None:
        """Of 128 inputs 64 are free: the limit knows that half of the eigenvalues are 0."""
        chance = np.random.default_rng(2)
        inputs = chance.standard_normal((4096, 64)) @ chance.standard_normal((64, 128))
        covariance, (weight, _) = torch.from_numpy(inputs.T @ inputs / 4096), layer(256, 128)
        given = Sensitivity(covariance=covariance)
        gaps = {}
        for name in ("gptq", "watersic"):
            found = round_tensor(weight, parse(f"grid{bits}@tensor"), spec(name), sensitivity=given, seed=0)
            limit, error = Limit.of(weight.numpy(), covariance.numpy()), output_error(weight, found, covariance)
            gaps[name] = limit.gap(8 * found.nbytes / weight.numel(), error) or 0.0
        assert gaps["watersic"] < min(0.65, gaps["gptq"])

    @pytest.mark.parametrize("distance", [1e-3, 1e-5, 1e-7])
    def test_two_inputs_that_are_nearly_the_same(self, distance: float) -> None:
        weight, covariance = layer(128, 64)
        covariance[1] = (1 - distance) * covariance[0]
        covariance[:, 1] = covariance[1]
        covariance[1, 1] = covariance[0, 0]
        paper = spec("watersic", paths=1, mmse_damping=0.0, classes=False)
        given = Sensitivity(covariance=covariance)
        found = round_tensor(weight, parse("grid4@tensor"), paper, sensitivity=given, seed=0)
        power = float(((weight.double() @ covariance) * weight).sum() / weight.numel())
        assert output_error(weight, found, covariance) < 0.05 * power

    def test_a_price_for_bits_lowers_the_error_in_the_same_bytes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight, covariance = layer(512, 128, "ar1_0.9")
        given, errors = Sensitivity(covariance=covariance), []
        for price in (grids._PRICE, 0.0):
            monkeypatch.setattr(grids, "_PRICE", price)
            found = round_tensor(weight, parse("grid2@tensor"), spec("watersic"), sensitivity=given, seed=0)
            errors.append(output_error(weight, found, covariance))
        assert errors[0] < 0.98 * errors[1]

    @pytest.mark.parametrize("bits", [0.3, 0.5, 1, 6, 8])
    def test_any_rate(self, bits: float) -> None:
        weight, covariance = layer(256, 128)
        given = Sensitivity(covariance=covariance, tokens=4096)
        found = round_tensor(weight, parse(f"grid{bits}@tensor"), spec("watersic"), sensitivity=given, seed=0)
        assert bits - 0.03 <= 8 * found.nbytes / weight.numel() <= bits

    def test_rows_have_scales_where_the_format_has_them(self) -> None:
        weight, covariance = layer(64, 512)
        given = Sensitivity(covariance=covariance)
        found = round_tensor(weight, parse("grid3@channel"), spec("watersic"), sensitivity=given, seed=0)
        assert found.scales.dtype == torch.float16
        assert float(found.scales.float().abs().mean()) == pytest.approx(1, abs=1e-3)

    def test_the_same_seed_gives_the_same_bytes(self) -> None:
        weight, covariance = layer(700, 64)
        given = Sensitivity(covariance=covariance)
        one, two = (
            round_tensor(weight, parse("grid3@tensor"), spec("watersic"), sensitivity=given, seed=4) for _ in range(2)
        )
        assert torch.equal(one.codes, two.codes)

    def test_few_tokens_are_noted(self) -> None:
        weight, covariance = layer(32, 64)
        given = Sensitivity(covariance=covariance, tokens=100)
        found = round_tensor(weight, parse("grid3@tensor"), spec("watersic"), sensitivity=given, seed=0)
        assert any("100 tokens for 64 inputs" in note for note in found.notes)


class TestFrame:
    @pytest.mark.parametrize(
        "text", ["int4@128", "t5_4@64:signmax", "mxfp4", "nvfp4", "int4@100", "normal4@64+hadamard", "t5_4@64+rans"]
    )
    def test_nearest_indices_give_what_nearest_stores(self, text: str) -> None:
        weight, _ = layer(40, 160)
        frame = Frame.of(weight, parse(text), seed=3)
        whole = frame.scales.repeat_interleave(frame.width, 1)[:, :160].reshape(-1)
        indices = nearest_indices(frame.matrix.reshape(-1, 1), whole, frame.format, frame.table)
        found, wanted = frame.encoded(indices.reshape(40, 160)), encode_nearest(weight, parse(text), seed=3)
        assert np.array_equal(Levels.of(frame).nearest(frame.matrix.double()), indices.reshape(40, 160).numpy())
        assert all(torch.equal(found.stored[name], part) for name, part in wanted.stored.items())


class TestScalesOfColumns:
    def test_codes_are_ascending_scales_and_come_back(self) -> None:
        codes = torch.arange(256, dtype=torch.uint8)
        scales = scales_of(codes)
        assert scales[0] == 0
        assert scales[-1] == LARGEST
        assert bool((scales.diff() > 0).all())
        assert np.array_equal(nearest_codes(scales.double().numpy()), codes.numpy())

    @given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=20))
    def test_stored_values_are_within_a_half_step(self, values: list[float]) -> None:
        wanted = np.array(values)
        found = stored_values(wanted)
        near = wanted > wanted.max() * 2.0**-15
        assert np.all(np.abs(found - wanted)[near] <= wanted[near] / 32 * (1 + 1e-6))
        assert np.all(found > 0)

    def test_nothing_but_zeros(self) -> None:
        step, codes = as_stored(np.zeros(3))
        assert (step, codes.tolist()) == (1.0, [0, 0, 0])


def test_weights_that_are_not_finite_are_refused_by_every_method() -> None:
    weight, covariance = layer(8, 32)
    weight[3, 4] = float("inf")
    for name, text in CASES:
        given = Sensitivity(covariance=covariance)
        with pytest.raises(BitmillError, match="NaN or infinity"):
            round_tensor(weight, parse(text), spec(name), sensitivity=given, seed=0)
