"""Every rounding method goes through a whole job: budget held, artefact read back, what was degraded stands in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import InvalidRecipe
from core.exports.artefact import Artefact
from core.pipeline.local import run_recipe
from core.recipe.recipe import load_recipe
from core.recipe.rounding import RoundingSpec
from core.recipe.tensor_format import parse
from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import folder_sources
from core.tensors.nearest import encode_nearest
from core.tensors.reader import read_tensor

METHODS = [
    ("gptq", "int4@32"),
    ("gptq", "grid4@tensor"),
    ("watersic", "grid4@tensor"),
    ("error_diffusion", "mxint4"),
    ("power_learned", "power4@channel"),
    ("squeezellm", "lloyd4-rows@channel"),
    ("signround", "int4@32"),
]


def recipe(name: str, text: str, **more: Any) -> dict[str, Any]:
    return {
        "target": {"bits_per_param": 6.0},
        "format": text,
        "rounding": {"name": name, "steps": 5} if name == "signround" else name,
        "allocation": "uniform",
        "calibration": {"text": "builtin", "sequences": 8, "sequence_length": 32},
        "evaluation": {"text": "builtin", "sequences": 2, "sequence_length": 32},
        **more,
    }


@pytest.mark.parametrize(("name", "text"), METHODS)
def test_a_job_with_each_method(llama: Path, tmp_path: Path, name: str, text: str) -> None:
    report = run_recipe(llama, load_recipe(recipe(name, text)), tmp_path / "out", device="cpu", threads=1)
    assert report["summary"]["bits_per_param"] <= 6.0
    artefact = Artefact.open(CheckpointIndex.from_files(folder_sources(tmp_path / "out")))
    table = json.loads((tmp_path / "out/manifest.json").read_bytes())["tensors"]
    notes = {row["name"]: row.get("notes", []) for row in table}
    assert any("no statistics of its inputs" in note for note in notes["model.embed_tokens.weight"])
    linear = "model.layers.0.mlp.gate_proj.weight"
    assert not any("no statistics" in note for note in notes[linear])
    weight = read_tensor(CheckpointIndex.from_files(folder_sources(llama)), linear)
    fmt = parse(next(row["format"] for row in table if row["name"] == linear))
    assert not torch.equal(artefact.decode(linear), encode_nearest(weight, fmt).decode(weight.dtype))
    for tensor in notes:
        assert artefact.decode(tensor).isfinite().all()


SEQUENTIAL = [
    ("gptq", "int4@32"),
    ("watersic", "grid4@tensor"),
    ("error_diffusion", "mxint4"),
    ("signround", "int4@32"),
]


@pytest.mark.parametrize(("name", "text"), SEQUENTIAL)
def test_a_job_whose_layers_are_rounded_one_after_another(llama: Path, tmp_path: Path, name: str, text: str) -> None:
    given = recipe(name, text)
    rounding = RoundingSpec.model_validate(given["rounding"]).canonical() | {"layers": "sequential"}
    errors = {}
    for layers, settings in {"parallel": given["rounding"], "sequential": rounding}.items():
        chosen = load_recipe(given | {"rounding": settings})
        report = run_recipe(llama, chosen, tmp_path / layers, device="cpu", threads=1)
        assert report["summary"]["bits_per_param"] <= 6.0
        table = json.loads((tmp_path / layers / "manifest.json").read_bytes())["tensors"]
        assert [row["name"] for row in table] == sorted(row["name"] for row in table)
        errors[layers] = {row["name"]: row["relative_rms_error"] for row in table}
    first, later = "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"
    assert errors["parallel"][first] == errors["sequential"][first]
    assert errors["parallel"][later] != errors["sequential"][later]


def test_what_cannot_be_followed_through_quantised_layers_says_so(moe: Path, tmp_path: Path) -> None:
    sequential = {"name": "gptq", "layers": "sequential"}
    run_recipe(moe, load_recipe(recipe("gptq", "int4@32", rounding=sequential)), tmp_path / "out", device="cpu")
    table = json.loads((tmp_path / "out/manifest.json").read_bytes())["tensors"]
    noted = {row["name"] for row in table if any("those of the reference" in note for note in row.get("notes", []))}
    assert noted
    assert all("experts" in name for name in noted)


def test_a_method_that_needs_statistics_needs_a_text(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match="gptq needs calibration"):
        load_recipe(recipe("gptq", "int4@32", calibration=False))


def test_an_override_that_the_method_cannot_use_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(BaseException, match="watersic") as refused:
        load_recipe(recipe("watersic", "grid4@tensor", overrides=[{"match": "*", "format": "int4@32"}]))
    assert "overrides.0.format" in str(getattr(refused.value, "where", ""))
