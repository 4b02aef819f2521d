"""`bitmill layer measure`: the numbers by their definitions, and what a layer file must not be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cli.local import measure_layer, rounding_of
from cli.main import run
from core.errors import BitmillError, InvalidCheckpoint, InvalidFormat, InvalidRecipe, MissingFile
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import parse
from core.rounding.layer import Layer
from core.tensors.nearest import encode_nearest

OUT, IN = 24, 16


def tensors(rows: int = OUT, columns: int = IN, seed: int = 0) -> dict[str, torch.Tensor]:
    """A layer with correlated inputs of different scale."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64).cumsum(1)
    covariance = inputs.T @ inputs / len(inputs)
    return {"weight": torch.randn(rows, columns, generator=generator), "covariance": (covariance + covariance.T) / 2}


def layer_file(folder: Path, **changed: torch.Tensor | None) -> Path:
    """A layer file with some of its tensors changed, None for left out."""
    path = folder / "layer.safetensors"
    save_file({name: kept for name, kept in (tensors() | changed).items() if kept is not None}, path)
    return path


def measured(path: Path, text: str = "int4@8", rounding: str = "nearest", bits: float | None = None) -> dict[str, Any]:
    return measure_layer(rounding, text, path, bits)


def trace_of(error: torch.Tensor, covariance: torch.Tensor) -> float:
    """The definition, as it is written."""
    return float(torch.trace(error @ covariance @ error.T)) / error.numel()


@pytest.mark.parametrize("text", ["int4@8", "grid3@tensor", "int4@8+rans", "t7_4@8:signmax", "lloyd3@tensor:rms"])
def test_the_numbers_are_those_of_their_definitions(text: str, tmp_path: Path) -> None:
    given = tensors()
    found, encoded = measured(layer_file(tmp_path), text), encode_nearest(given["weight"], parse(text))
    rate = 8 * sum(part.numel() * part.element_size() for part in encoded.parts().values()) / (OUT * IN)
    distortion = trace_of(given["weight"].double() - encoded.decode().double(), given["covariance"])
    assert (found["rounding"], found["parameters"], found["format"]) == ("nearest", {}, str(parse(text)))
    assert found["bits_per_param"] == pytest.approx(rate)
    assert found["stored_bytes"] * 8 == pytest.approx(rate * OUT * IN)
    assert found["distortion"] == pytest.approx(distortion, rel=1e-12)
    power = trace_of(given["weight"].double(), given["covariance"])
    assert found["relative_distortion"] == pytest.approx(distortion / power, rel=1e-12)


def test_the_limit_and_the_gap_are_those_of_high_rates_when_all_components_are_coded(tmp_path: Path) -> None:
    """Then D = s^2 det^(1/n) 4^-R, Shannon's bound of the Gaussian."""
    given = tensors()
    found = measured(layer_file(tmp_path), "int8@tensor")
    mean = float(given["weight"].double().square().mean())
    at_no_bits = mean * math.exp(float(torch.linalg.slogdet(given["covariance"])[1]) / IN)
    assert found["limit"] == pytest.approx(at_no_bits * 4 ** -found["bits_per_param"], rel=1e-10)
    expected = found["bits_per_param"] - math.log2(at_no_bits / found["distortion"]) / 2
    assert found["gap_bits"] == pytest.approx(expected, abs=1e-10)


def test_rows_in_tiles_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = layer_file(tmp_path)
    whole = measured(path)["distortion"]
    monkeypatch.setattr("core.rounding.layer._TILE_BYTES", 8 * IN * 5)
    assert measured(path)["distortion"] == pytest.approx(whole, rel=1e-12)


def test_bits_give_the_format_another_width(tmp_path: Path) -> None:
    path = layer_file(tmp_path)
    assert measured(path, "int4@8", bits=6) == measured(path, "int6@8")
    assert measured(path, "grid4@tensor", bits=2.5) == measured(path, "grid2.5@tensor")


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("int4@8", 0.0),
        ("int4@8", 0.5),
        ("int4@8", 17.0),
        ("int4@8", math.nan),
        ("grid3@tensor", -1.0),
        ("grid3@tensor", 11.0),
        ("float4_e2m1@8", math.inf),
        ("q4_k", 5.0),
    ],
)
def test_bits_that_the_format_does_not_have_are_refused(text: str, bits: float, tmp_path: Path) -> None:
    with pytest.raises(InvalidFormat):
        measured(layer_file(tmp_path), text, bits=bits)


def test_all_that_is_known_of_the_inputs_reaches_the_method(tmp_path: Path) -> None:
    cross = torch.arange(IN * IN, dtype=torch.float32).reshape(IN, IN)
    layer = Layer.read(layer_file(tmp_path, cross=cross, tokens=torch.tensor([640])))
    given = layer.sensitivity
    assert given.covariance is not None
    assert torch.equal(given.covariance, tensors()["covariance"])
    assert given.cross is not None
    assert torch.equal(given.cross, cross.double())
    assert given.tokens == 640


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    given = Layer.read(layer_file(tmp_path)).sensitivity
    assert (given.cross, given.tokens, given.row_weights, given.residual) == (None, None, None, None)


def test_sums_in_another_order_are_symmetrised(tmp_path: Path) -> None:
    covariance = tensors()["covariance"].clone()
    covariance[0, 1] += 1e-7
    read = Layer.read(layer_file(tmp_path, covariance=covariance)).covariance
    assert read == pytest.approx(read.T, abs=0)


def zeros_but(value: float) -> torch.Tensor:
    covariance = torch.zeros(IN, IN)
    covariance[2, 2] = value
    return covariance


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"weight": None}, "`weight`"),
        ({"covariance": None}, "`covariance`"),
        ({"weight": torch.ones(IN)}, "`weight` of shape"),
        ({"weight": torch.ones(0, IN)}, "`weight` of shape"),
        ({"weight": torch.full((OUT, IN), math.nan)}, "`weight` holds NaN"),
        ({"weight": torch.full((OUT, IN), 1e300, dtype=torch.float64)}, "`weight` holds"),
        ({"covariance": torch.eye(IN + 1)}, "`covariance` of shape"),
        ({"covariance": torch.eye(IN)[:4]}, "`covariance` of shape"),
        ({"covariance": torch.ones(IN)}, "`covariance` of shape"),
        ({"covariance": zeros_but(math.nan)}, "`covariance` holds NaN"),
        ({"covariance": zeros_but(math.inf)}, "`covariance` holds"),
        ({"covariance": torch.eye(IN, dtype=torch.float64) * 1e300}, "`covariance` holds"),
        ({"covariance": torch.eye(IN).roll(1, 0)}, "not symmetric"),
        ({"covariance": torch.eye(IN) - zeros_but(1.5)}, "eigenvalue"),
        ({"covariance": -torch.eye(IN)}, "eigenvalue"),
        ({"cross": torch.ones(IN, IN - 1)}, "`cross` of shape"),
        ({"cross": zeros_but(math.nan)}, "`cross` holds"),
        ({"tokens": torch.tensor([0])}, "`tokens`"),
        ({"tokens": torch.tensor([2.5])}, "`tokens`"),
        ({"tokens": torch.tensor([1, 2])}, "`tokens`"),
        ({"tokens": torch.tensor([math.nan])}, "`tokens`"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(
    changed: dict[str, torch.Tensor | None], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = layer_file(tmp_path, **changed)
    with pytest.raises(InvalidCheckpoint, match=told):
        measured(path)
    assert run(["layer", "measure", "--rounding", "nearest", "--format", "int4@8", "--layer", str(path), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["where"] == str(path)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        measured(tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\x00")
    with pytest.raises(InvalidCheckpoint):
        measured(tmp_path / "torn.safetensors")


@pytest.mark.parametrize("shape", [(OUT, 1), (1, IN), (1, 1)])
def test_one_row_or_one_column_is_a_layer(shape: tuple[int, int], tmp_path: Path) -> None:
    found = measured(layer_file(tmp_path, **tensors(*shape)), "int4@tensor")
    assert found["distortion"] >= 0
    assert found["bits_per_param"] * shape[0] * shape[1] == 8 * found["stored_bytes"]


def test_inputs_that_are_always_zero_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = layer_file(tmp_path, covariance=torch.zeros(IN, IN))
    assert run(["layer", "measure", "--rounding", "nearest", "--format", "int4@8", "--layer", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["distortion"], found["limit"]) == (0, 0)
    assert (found["relative_distortion"], found["gap_bits"]) == (None, None)


def test_an_exact_copy_has_no_distance_from_the_limit(tmp_path: Path) -> None:
    """A Gaussian has none in a finite number of bits."""
    weight = torch.tensor([-8.0, 7.0, 1.0, 0.0]).repeat(OUT, IN // 4)
    found = measured(layer_file(tmp_path, weight=weight), "int4@8:signmax")
    assert (found["distortion"], found["relative_distortion"], found["gap_bits"]) == (0, 0, None)
    assert found["limit"] > 0


def test_inputs_that_span_a_part_of_the_space_only_have_a_limit(tmp_path: Path) -> None:
    direction = torch.arange(1.0, IN + 1, dtype=torch.float64)
    found = measured(layer_file(tmp_path, covariance=torch.outer(direction, direction)), "int4@8")
    mean = float(tensors()["weight"].double().square().mean())
    level = mean * float(direction.square().sum())
    assert found["limit"] == pytest.approx(level * 4.0 ** (-IN * found["bits_per_param"]) / IN, rel=1e-6)


def test_a_method_is_a_name_or_an_object_with_parameters() -> None:
    assert rounding_of("nearest") == rounding_of('{"name": "nearest"}') == RoundingSpec(name="nearest")
    given = '{"name": "gptq", "columns": "pivot", "paths": 2}'
    assert rounding_of(given) == RoundingSpec(name="gptq", columns="pivot", paths=2)


def test_parameters_are_shown_as_they_were_given(tmp_path: Path) -> None:
    found = measured(layer_file(tmp_path), rounding='{"name": "gptq", "damping": 0.1}')
    assert (found["rounding"], found["parameters"], found["notes"]) == ("gptq", {"damping": 0.1}, [])


def test_what_was_done_otherwise_than_asked_is_told(tmp_path: Path) -> None:
    """Few tokens, and an input that is always zero, which gets no column to round."""
    covariance = tensors()["covariance"]
    covariance[3] = covariance[:, 3] = 0
    path = layer_file(tmp_path, covariance=covariance, tokens=torch.tensor([100]))
    notes = measured(path, rounding="gptq")["notes"]
    assert [any(part in note for note in notes) for part in ("100 tokens", "always zero")] == [True, True]
    assert measured(path)["notes"] == []


@pytest.mark.parametrize("rounding", ["gptq", "watersic", "error_diffusion", "signround"])
def test_methods_that_know_the_inputs_leave_less_error_at_the_same_size(rounding: str, tmp_path: Path) -> None:
    path, text = layer_file(tmp_path), "grid6@tensor" if rounding == "watersic" else "int3@8"
    nearest, found = measured(path, text), measured(path, text, rounding=rounding)
    assert found["stored_bytes"] == nearest["stored_bytes"]
    assert found["distortion"] < nearest["distortion"]


def test_a_format_that_the_method_cannot_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidFormat, match="watersic rounds to grids"):
        measured(layer_file(tmp_path), rounding="watersic")


@pytest.mark.parametrize(
    "text",
    [
        "nearst",
        "",
        "{",
        '{"name": "gptq", "steps": 3}',
        '{"name": "nearest", "colums": "pivot"}',
        '{"name": 3}',
        '{"a":' * 10**5,
        "[]",
    ],
)
def test_a_method_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(BitmillError) as refused:
        measured(layer_file(tmp_path), rounding=text)
    assert isinstance(refused.value, InvalidRecipe)


def test_weights_of_any_float_are_measured_as_they_are_stored(tmp_path: Path) -> None:
    weight = tensors()["weight"].bfloat16()
    found = measured(layer_file(tmp_path, weight=weight))
    assert found == measured(layer_file(tmp_path, weight=weight.float()))
    assert np.isfinite(found["gap_bits"])
