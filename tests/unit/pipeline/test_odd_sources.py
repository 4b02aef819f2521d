"""Sources that are odd but whole: nothing of them gets lost, and what cannot be carried out is refused early."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import InvalidCheckpoint, UserError
from core.pipeline import local
from core.recipe.recipe import Recipe, load_recipe


def test_source_files_with_the_names_of_ours_are_all_kept_and_come_back(tmp_path: Path) -> None:
    source = _matrix(tmp_path / "source")
    theirs = ("README.md", "README.source.md", "SHA256SUMS", "SHA256SUMS.source", "report.source.json")
    for name in theirs:
        (source / name).write_text(f"their {name}")
    local.run_recipe(source, _data_free(), tmp_path / "out")
    for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ", 1)
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest, name
    local.dequantise(tmp_path / "out", tmp_path / "plain")
    assert {name: (tmp_path / "plain" / name).read_text() for name in theirs} == {
        name: f"their {name}" for name in theirs
    }


@pytest.mark.parametrize(
    "card", ["license: 2023-13-45", "license: " + "[" * 3000], ids=["a date that is none", "endless depth"]
)
def test_a_card_that_cannot_be_read_does_not_stop_the_export(card: str, tmp_path: Path) -> None:
    source = _matrix(tmp_path / "source")
    (source / "README.md").write_text(f"---\n{card}\n---\n")
    assert local.run_recipe(source, _data_free(), tmp_path / "out")["failure"] is None


@pytest.mark.parametrize(
    "config",
    ['{"time_step_limit": [0.0, Infinity]}', '{"architectures": {"a": 1}}', '{"architectures": 5}'],
)
def test_odd_values_in_a_config_are_passed_on(config: str, tmp_path: Path) -> None:
    source = _matrix(tmp_path / "source")
    (source / "config.json").write_text(config)
    local.run_recipe(source, _data_free(), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert json.loads(config).items() <= written.items()


def test_half_a_surrogate_pair_in_a_config_is_refused_at_once(tmp_path: Path) -> None:
    source = _matrix(tmp_path / "source")
    (source / "config.json").write_text('{"model_type": "\\ud800"}')
    with pytest.raises(InvalidCheckpoint):
        local.inspect(source)


def test_a_name_to_which_nothing_can_be_added_is_refused_before_encoding(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    save_file({"n" * 508: torch.ones(64, 64)}, source / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match="longer than"):
        local.plan(source, _data_free())


def test_decoding_stays_within_the_own_dtype_and_refuses_another_that_is_too_narrow(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    weights = {"half": torch.full((64, 64), 65504.0).half(), "brain": torch.full((64, 64), 1e30).bfloat16()}
    save_file(weights, source / "model.safetensors")
    local.run_recipe(source, _data_free(), tmp_path / "out")
    local.dequantise(tmp_path / "out", tmp_path / "plain")
    assert load_file(tmp_path / "plain" / "model.safetensors")["half"].isfinite().all()
    with pytest.raises(UserError, match="float16"):
        local.dequantise(tmp_path / "out", tmp_path / "narrow", "fp16")
    assert not (tmp_path / "narrow").exists()


def test_the_working_folder_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _matrix(tmp_path / "source")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="working folder"):
        local.run_recipe(source, _data_free(), Path())


def _matrix(folder: Path) -> Path:
    """A checkpoint of one matrix."""
    folder.mkdir()
    save_file({"w": torch.randn(64, 128)}, folder / "model.safetensors")
    return folder


def _data_free() -> Recipe:
    changes = {"allocation": "uniform", "calibration": False, "evaluation": False}
    return load_recipe({"target": {"bits_per_param": 16}, "format": "t7_4@64:absmax", **changes})
