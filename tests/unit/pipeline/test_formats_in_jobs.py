"""Every kind of format goes through a whole job: budget held, artefact read back, evidence of what was fitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import InvalidCheckpoint
from core.exports.artefact import Artefact
from core.pipeline.local import run_recipe
from core.recipe.recipe import load_recipe
from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import folder_sources
from core.tensors.errors import relative_rms_error
from core.tensors.reader import read_tensor

FORMATS = [
    "bof4-s@64:search",
    "af4-l1@64",
    "sf4@32:absmax:dq8",
    "t_4@32:signmax",
    "power4@channel",
    "float4@32",
    "lloyd4@channel",
    "lloyd4-weighted@channel",
    "t7_4@32:signmax-search:e4m3",
    "nvfp4",
    "mxint8",
    "t7_4@64:signmax+unbiased",
    "normal4@tensor:rms+outliers0.01+rotate",
    "nf4@64+opq0.95",
    "int4@64+threshold2.5+hadamard",
    "q4_k",
    "higgs2.5-p2@64",
    "higgs2.333-p3@channel+outliers0.01+rotate",
    "grid4@tensor",
    "grid4.5@32:absmax:e4m3+outliers0.01+hadamard+huffman",
    "t7_4@64:signmax+rans",
    "lloyd4-weighted@channel+rans",
    "nf4@64:dq8+opq0.95+rotate+huffman",
]


def opened(folder: Path) -> CheckpointIndex:
    return CheckpointIndex.from_files(folder_sources(folder))


def quantised(source: Path, out: Path, text: str, **more: Any) -> dict[str, Any]:
    calibration = {"sequences": 2, "sequence_length": 32} if "weighted" in text else False
    recipe = {"format": text, "target": {"bits_per_param": 20}, "allocation": "uniform", "evaluation": False}
    return run_recipe(
        source, load_recipe({"version": 1, "calibration": calibration, **recipe, **more}), out, device="cpu"
    )


@pytest.mark.parametrize("text", FORMATS)
def test_a_job_in_any_format_ends_in_an_artefact_that_decodes_to_the_error_it_reports(
    text: str, llama: Path, tmp_path: Path
) -> None:
    report = quantised(llama, tmp_path / "out", text)
    source, artefact = opened(llama), Artefact.open(opened(tmp_path / "out"))
    stored = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert report["summary"]["size_bytes"] == stored
    encoded = [row for row in report["tensors"] if row["format"] != "keep"]
    assert encoded
    for row in encoded:
        tensor = artefact.encoded(row["name"])
        error = relative_rms_error(read_tensor(source, row["name"]), tensor)
        assert row["relative_rms_error"] == pytest.approx(error, rel=1e-4)
        assert str(tensor.format) == row["format"]
        assert row.get("fitted") == (None if tensor.fitted is None else pytest.approx(tensor.fitted, rel=1e-5))


def test_the_number_of_outliers_that_a_rule_found_stands_in_the_format(llama: Path, tmp_path: Path) -> None:
    report = quantised(llama, tmp_path / "out", "nf4@64+opq0.9", target={"bits_per_param": 4.9})
    assert report["summary"]["bits_per_param"] <= 4.9
    artefact = Artefact.open(opened(tmp_path / "out"))
    counts = set()
    for row in report["tensors"]:
        if row["format"] != "keep":
            found = artefact.encoded(row["name"]).parts()["outlier_values"].numel()
            assert f"opq0.9x{found}" in row["format"]
            counts.add(found)
    assert len(counts) > 1


def test_a_kl_target_is_reached_with_a_codebook_weighted_by_sensitivities(llama: Path, tmp_path: Path) -> None:
    calibration = {"sequences": 4, "sequence_length": 32}
    recipe = {"format": "lloyd4-weighted@channel", "target": {"kl": 0.05}, "allocation": "uniform", "evaluation": False}
    chosen = load_recipe({"version": 1, "calibration": calibration, **recipe})
    report = run_recipe(llama, chosen, tmp_path / "out", device="cpu")
    assert all("lloyd" in row["format"] for row in report["tensors"] if row["format"] != "keep")


def test_what_was_fitted_stands_in_the_manifest(llama: Path, tmp_path: Path) -> None:
    quantised(llama, tmp_path / "out", "t_4@32:signmax")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    fitted = [row["fitted"] for row in manifest["tensors"] if row["format"].startswith("t_")]
    assert fitted
    assert all(2 < nu <= 100.001 for nu in fitted)


def test_the_seed_of_a_rotation_is_the_tensors_own(llama: Path, tmp_path: Path) -> None:
    quantised(llama, tmp_path / "one", "normal4@64+rotate")
    quantised(llama, tmp_path / "same", "normal4@64+rotate")
    quantised(llama, tmp_path / "other", "normal4@64+rotate", seed=1)
    one, same, other = (Artefact.open(opened(tmp_path / name)) for name in ("one", "same", "other"))
    names = [name for name in one.tensors if not one.is_kept(name)]
    seeds = {int(one.encoded(name).parts()["seed"]) for name in names}
    assert len(seeds) == len(names)
    for name in names:
        assert torch.equal(one.decode(name), same.decode(name))
        assert not torch.equal(one.decode(name), other.decode(name))


@pytest.mark.parametrize("allocation", ["fisher", "uniform"])
def test_a_job_with_variable_length_codes_fills_its_budget_to_a_hundredth_of_a_bit(
    allocation: str, llama: Path, tmp_path: Path
) -> None:
    calibration = {"sequences": 2, "sequence_length": 32}
    target = {"bits_per_param": 3.35}
    report = quantised(
        llama, tmp_path / "out", "grid3@tensor", target=target, allocation=allocation, calibration=calibration
    )
    assert 3.34 <= report["summary"]["bits_per_param"] <= 3.35
    assert [row["format"] for row in report["coverage"] if row["format"] != "keep"] == ["grid@tensor:rms:bf16+rans"]
    rates = {row["format"] for row in report["tensors"] if row["format"] != "keep"}
    assert (len(rates) > 1) == (allocation == "fisher")


def test_the_bytes_that_an_entropy_code_takes_stand_in_the_format_and_hold_the_budget(
    llama: Path, tmp_path: Path
) -> None:
    report = quantised(llama, tmp_path / "out", "t7_4@64:signmax+rans", target={"bits_per_param": 4.6})
    assert report["summary"]["bits_per_param"] <= 4.6
    artefact = Artefact.open(opened(tmp_path / "out"))
    for row in report["tensors"]:
        if row["format"] != "keep":
            assert f"+ransx{artefact.encoded(row['name']).codes.numel()}" in row["format"]


def test_an_artefact_with_damaged_codes_names_the_tensor(llama: Path, tmp_path: Path) -> None:
    quantised(llama, tmp_path / "out", "grid4@tensor")
    file = next((tmp_path / "out").glob("*.safetensors"))
    artefact = Artefact.open(opened(tmp_path / "out"))
    name = next(name for name, stored in artefact.tensors.items() if stored.format != "keep")
    length, place = artefact.index.tensors[f"{name}.codes"].nbytes, artefact.index.tensors[f"{name}.codes"].start
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little")
    data[8 + header + place + length // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(InvalidCheckpoint, match="damaged") as refused:
        Artefact.open(opened(tmp_path / "out")).decode(name)
    assert refused.value.where == name
