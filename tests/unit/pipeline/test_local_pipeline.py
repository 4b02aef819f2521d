"""The whole pipeline in one process, on a random model: what comes out, and that it is the same whatever the way."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from core.errors import (
    BitmillError,
    InfeasibleTarget,
    InvalidCheckpoint,
    MissingFile,
    NonFiniteWeights,
    UnsupportedArchitecture,
    UserError,
)
from core.pipeline import local
from core.recipe.recipe import Recipe, load_recipe
from tests.unit.pipeline.conftest import llama_weights, write_llama

DATA_FREE: dict[str, Any] = {
    "version": 1,
    "target": {"bits_per_param": 6.5},
    "format": "int4@32",
    "allocation": "uniform",
    "calibration": False,
    "evaluation": False,
}
TEXT = {"text": "builtin", "sequences": 2, "sequence_length": 64}
MEASURED = DATA_FREE | {"allocation": "fisher", "calibration": TEXT, "evaluation": TEXT}


def recipe(base: dict[str, Any] = DATA_FREE, **changes: Any) -> Recipe:
    return load_recipe(base | changes)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stored_bits(folder: Path, parameters: int) -> float:
    return 8 * sum(path.stat().st_size for path in folder.glob("model-*.safetensors")) / parameters


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A source, its artefact from a recipe with calibration and evaluation, and the report."""
    work = tmp_path_factory.mktemp("measured")
    source = write_llama(work / "llama")
    report = local.run_recipe(source, recipe(MEASURED), work / "out", device="cpu")
    return source, work / "out", report


def test_the_budget_is_met_by_the_bytes_on_disk(measured: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, report = measured
    parameters = sum(tensor.numel() for tensor in llama_weights().values())
    assert report["summary"]["bits_per_param"] == pytest.approx(stored_bits(out, parameters), rel=1e-5)
    assert 6.2 < stored_bits(out, parameters) <= 6.5


def test_the_folder_stands_alone(measured: tuple[Path, Path, dict[str, Any]]) -> None:
    source, out, report = measured
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "README.source.md").read_bytes() == (source / "README.md").read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitmill"
    assert {key: value for key, value in config.items() if key != "quantization_config"} == json.loads(
        (source / "config.json").read_text()
    )
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    assert "license: mit" in card
    assert "base_model: someone/something" in card
    assert json.loads((out / "report.json").read_text())["summary"] == report["summary"]


def test_the_digests_cover_every_file_and_hold(measured: tuple[Path, Path, dict[str, Any]]) -> None:
    _, out, _ = measured
    lines = [line.split("  ") for line in (out / "SHA256SUMS").read_text().splitlines()]
    listed = {path: digest for digest, path in lines}
    found = digests(out)
    del found["SHA256SUMS"]
    assert listed == found
    manifest = json.loads((out / "manifest.json").read_text())
    outputs = {one["path"]: one["sha256"] for one in manifest["outputs"]}
    assert outputs == {path: sha for path, sha in found.items() if path != "manifest.json"}


def test_the_manifest_says_what_the_result_was_made_from(measured: tuple[Path, Path, dict[str, Any]]) -> None:
    source, out, _ = measured
    manifest = json.loads((out / "manifest.json").read_text())
    assert {one["path"]: one["sha256"] for one in manifest["source"]["files"]} == digests(source)
    assert manifest["recipe"] == recipe(MEASURED).canonical()
    assert manifest["calibration"]["text_sha256"]
    assert manifest["versions"]["torch"] == torch.__version__
    assert len(manifest["tensors"]) == len(llama_weights())


def test_no_file_names_the_machine_the_folder_or_the_time(measured: tuple[Path, Path, dict[str, Any]]) -> None:
    import socket

    source, out, _ = measured
    ours = ("config.json", "manifest.json", "report.json", "README.md", "model.safetensors.index.json")
    text = "".join((out / name).read_text() for name in ours)
    assert str(source.parent) not in text
    assert socket.gethostname() not in text


def test_the_same_recipe_gives_the_same_bytes(measured: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    source, out, _ = measured
    local.run_recipe(source, recipe(MEASURED), tmp_path / "again", device="cpu")
    assert digests(tmp_path / "again") == digests(out)


def test_dequantising_gives_a_checkpoint_of_the_sources_names_shapes_and_dtypes(
    measured: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    source, out, _ = measured
    local.dequantise(out, tmp_path / "plain")
    plain, original = load_file(tmp_path / "plain" / "model.safetensors"), load_file(source / "model.safetensors")
    assert {name: (one.shape, one.dtype) for name, one in plain.items()} == {
        name: (one.shape, one.dtype) for name, one in original.items()
    }
    for name, tensor in original.items():
        error = (plain[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert error == 0 if "norm" in name else 0 < error < 0.1
    assert (tmp_path / "plain" / "config.json").read_text() == (source / "config.json").read_text() + "\n"
    assert (tmp_path / "plain" / "README.md").read_bytes() == (source / "README.md").read_bytes()


def test_dequantising_to_fp32_keeps_every_bit_of_the_decoded_values(
    measured: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, out, _ = measured
    local.dequantise(out, tmp_path / "wide", "fp32")
    local.dequantise(out, tmp_path / "own")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    own = load_file(tmp_path / "own" / "model.safetensors")
    assert all(torch.equal(wide[name].to(torch.bfloat16), own[name]) for name in own)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"


def test_measuring_the_folder_gives_the_numbers_of_the_report(measured: tuple[Path, Path, dict[str, Any]]) -> None:
    source, out, report = measured
    again = local.evaluate_folders(source, out, "builtin", sequences=2, sequence_length=64, device="cpu")
    assert again["kl_mean"] == pytest.approx(report["summary"]["kl_mean"], rel=1e-4)
    same = local.evaluate_folders(source, source, "builtin", sequences=1, sequence_length=64, device="cpu")
    assert same["kl_mean"] == 0


def test_a_decoded_checkpoint_measures_like_the_artefact(
    measured: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    source, out, report = measured
    local.dequantise(out, tmp_path / "plain")
    again = local.evaluate_folders(source, tmp_path / "plain", "builtin", sequences=2, sequence_length=64, device="cpu")
    assert again["kl_mean"] == pytest.approx(report["summary"]["kl_mean"], rel=1e-4)


def test_inspecting_tells_a_checkpoint_from_an_artefact(measured: tuple[Path, Path, dict[str, Any]]) -> None:
    source, out, report = measured
    checkpoint, artefact = local.inspect(source), local.inspect(out)
    assert (checkpoint["kind"], artefact["kind"]) == ("checkpoint", "artefact")
    assert checkpoint["parameters"] == artefact["parameters"]
    assert artefact["bits_per_param"] == pytest.approx(report["summary"]["bits_per_param"], rel=1e-5)
    assert any("q_proj" in group[0] or "q_proj" in "".join(group) for group in checkpoint["fused_groups"])


def test_a_plan_promises_the_size_that_the_job_then_has(measured: tuple[Path, Path, dict[str, Any]]) -> None:
    source, _, report = measured
    planned = local.plan(source, recipe(MEASURED), device="cpu")
    assert planned["predicted_size_bytes"] == report["summary"]["size_bytes"]
    assert planned["predicted_kl"] == report["summary"]["predicted_kl"]


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "tied", tied=True)
    report = local.run_recipe(source, recipe(MEASURED), tmp_path / "out", device="cpu")
    assert not any("lm_head" in one["name"] for one in report["tensors"])
    assert report["summary"]["kl_mean"] > 0


def test_a_gate_that_fails_keeps_the_artefact_and_says_so(llama: Path, tmp_path: Path) -> None:
    report = local.run_recipe(llama, recipe(MEASURED, gate={"max_kl": 1e-9}), tmp_path / "out", device="cpu")
    assert report["failure"]["code"] == "gate_failed"
    assert report["gate"]["failures"][0]["allowed"] == 1e-9
    assert (tmp_path / "out" / "SHA256SUMS").exists()


def test_an_output_folder_that_holds_anything_is_not_touched(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        local.run_recipe(llama, recipe(), out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(llama: Path, tmp_path: Path) -> None:
    tensors = llama_weights()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    before = set(tmp_path.iterdir())
    with pytest.raises(NonFiniteWeights) as refused:
        local.run_recipe(llama, recipe(), tmp_path / "out", device="cpu")
    assert refused.value.where == "model.layers.1.mlp.up_proj.weight"
    assert set(tmp_path.iterdir()) == before


def test_an_unknown_architecture_is_quantised_where_no_forward_pass_is_needed(tmp_path: Path) -> None:
    source = tmp_path / "odd"
    source.mkdir()
    save_file({"blocks.0.w": torch.randn(33, 70), "scale": torch.ones(5)}, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "nobody_knows_this"}')
    report = local.run_recipe(source, recipe(target={"bits_per_param": 9}), tmp_path / "out", device="cpu")
    assert report["summary"]["kl_mean"] is None
    (source / "tokenizer.json").write_text((write_llama(tmp_path / "l") / "tokenizer.json").read_text())
    with pytest.raises(UnsupportedArchitecture, match="nobody_knows_this"):
        local.run_recipe(source, recipe(MEASURED), tmp_path / "out2", device="cpu")


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_what_a_forward_pass_needs_is_missed_before_any_work(llama: Path, tmp_path: Path, missing: str) -> None:
    (llama / missing).unlink()
    with pytest.raises(MissingFile) as refused:
        local.run_recipe(llama, recipe(MEASURED), tmp_path / "out", device="cpu")
    assert refused.value.where == missing
    assert local.run_recipe(llama, recipe(), tmp_path / "out", device="cpu")["summary"]["bits_per_param"] <= 6.5


def test_a_target_below_what_the_format_can_reach_is_refused_with_the_smallest_that_works(
    llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(InfeasibleTarget, match=r"\d"):
        local.run_recipe(llama, recipe(target={"bits_per_param": 1.0}), tmp_path / "out", device="cpu")


def test_an_artefact_is_not_quantised_again(measured: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    _, out, _ = measured
    with pytest.raises(InvalidCheckpoint, match="already quantised"):
        local.run_recipe(out, recipe(), tmp_path / "twice", device="cpu")


def test_a_kl_target_is_reached_by_measuring(llama: Path, tmp_path: Path) -> None:
    report = local.run_recipe(llama, recipe(MEASURED, target={"kl": 0.01}), tmp_path / "out", device="cpu")
    assert report["rounds"]
    assert 0.001 < report["summary"]["kl_mean"] < 0.03


def test_every_artefact_tensor_can_be_read_by_the_reference_implementation(
    measured: tuple[Path, Path, dict[str, Any]],
) -> None:
    _, out, _ = measured
    (path,) = out.glob("model-*.safetensors")
    with safe_open(path, "pt") as stored:
        described = json.loads(stored.metadata()["bitmill"])["tensors"]
        for name, field in described.items():
            assert set(field) == {"format", "shape", "dtype"}
            assert stored.get_tensor(f"{name}.codes").dtype == torch.uint8
            assert stored.get_tensor(f"{name}.scales").numel() > 0


@pytest.mark.parametrize("damage", ["shape", "format", "dtype", "version", "part"])
def test_an_artefact_whose_description_lies_is_refused(
    measured: tuple[Path, Path, dict[str, Any]], tmp_path: Path, damage: str
) -> None:
    import shutil

    _, out, _ = measured
    shutil.copytree(out, tmp_path / "copy")
    (path,) = (tmp_path / "copy").glob("model-*.safetensors")
    tensors = load_file(path)
    with safe_open(path, "pt") as stored:
        layout = json.loads(stored.metadata()["bitmill"])
    first = next(iter(layout["tensors"]))
    match damage:
        case "shape":
            layout["tensors"][first]["shape"][0] += 1
        case "format":
            layout["tensors"][first]["format"] = "int9000@x"
        case "dtype":
            layout["tensors"][first]["dtype"] = "I64"
        case "version":
            layout["version"] = 99
        case _:
            del tensors[f"{first}.scales"]
            (tmp_path / "copy" / "model.safetensors.index.json").unlink()
    save_file(tensors, path, {"format": "pt", "bitmill": json.dumps(layout)})
    with pytest.raises(InvalidCheckpoint):
        local.inspect(tmp_path / "copy")


def test_errors_are_ours(tmp_path: Path) -> None:
    with pytest.raises(BitmillError):
        local.inspect(tmp_path / "nowhere")


def test_an_override_that_matches_nothing_is_said(llama: Path, tmp_path: Path) -> None:
    overrides = [{"match": "nobody.*", "min_bits": 4}, {"match": "lm_head.weight", "keep": True}]
    report = local.run_recipe(llama, recipe(overrides=overrides, target={"bits_per_param": 9}), tmp_path / "out")
    assert [warning for warning in report["warnings"] if "override" in warning] == [
        "the override nobody.* matches no tensor"
    ]
