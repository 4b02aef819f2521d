"""What is refused from headers, config and recipe alone, and that nothing is refused that would work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from core.errors import (
    BitmillError,
    InfeasibleTarget,
    InvalidCheckpoint,
    InvalidRecipe,
    MissingFile,
    UnsupportedArchitecture,
)
from core.formats.stored import stored_parts
from core.recipe.recipe import Recipe, load_recipe
from core.recipe.tensor_format import parse
from core.storage.checkpoint import CheckpointIndex
from core.storage.preflight import preflight, smallest_bytes
from core.storage.sources import folder_sources

FREE: dict[str, Any] = {
    "target": {"bits_per_param": 16},
    "format": "int4@32",
    "allocation": "uniform",
    "evaluation": False,
}
WEIGHTS = {"a.weight": torch.zeros(48, 64), "b.weight": torch.zeros(64, 96), "norm.weight": torch.zeros(64)}
ELEMENTS = sum(tensor.numel() for tensor in WEIGHTS.values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({name: data.bfloat16() for name, data in WEIGHTS.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def opened(folder: Path) -> CheckpointIndex:
    return CheckpointIndex.from_files(folder_sources(folder))


def recipe(**changes: Any) -> Recipe:
    return load_recipe(FREE | changes)


def refusal(folder: Path, **changes: Any) -> BitmillError:
    with pytest.raises(BitmillError) as refused:
        preflight(opened(folder), recipe(**changes))
    return refused.value


def test_what_can_be_done_is_let_through(folder: Path) -> None:
    preflight(opened(folder), recipe())
    preflight(opened(folder), recipe(allocation="fisher", evaluation={}))
    preflight(opened(folder), recipe(target={"kl": 1e-9}))


@pytest.mark.parametrize("stated", [{"quant_method": "gptq"}, {"format": "nvfp4-pack-quantized"}, {}])
def test_a_checkpoint_that_is_already_quantised_is_refused(folder: Path, stated: dict[str, str]) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": stated}))
    error = refusal(folder)
    assert isinstance(error, InvalidCheckpoint)
    assert "already quantised" in error.detail


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("part", [{"evaluation": {}}, {"allocation": "fisher"}])
def test_a_forward_pass_needs_config_and_tokenizer(folder: Path, missing: str, part: dict[str, Any]) -> None:
    (folder / missing).unlink()
    error = refusal(folder, **part)
    assert isinstance(error, MissingFile)
    assert error.where == missing
    preflight(opened(folder), recipe())


def test_a_forward_pass_needs_a_model_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ["Some"]}')
    assert isinstance(refusal(folder, evaluation={}), UnsupportedArchitecture)
    preflight(opened(folder), recipe())


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
def test_a_text_of_the_checkpoint_must_be_in_it(folder: Path, part: str) -> None:
    error = refusal(folder, **{part: {"text": "file:data/mine.txt"}})
    assert isinstance(error, MissingFile)
    assert error.where == "data/mine.txt"
    (folder / "data").mkdir()
    (folder / "data" / "mine.txt").write_text("words")
    preflight(opened(folder), recipe(**{part: {"text": "file:data/mine.txt"}}))


def test_a_checkpoint_without_matrices_of_floats_has_nothing_to_quantise(folder: Path) -> None:
    vectors = {"a": torch.zeros(8), "ids": torch.zeros(2, 2, dtype=torch.int64), "empty": torch.zeros(0, 4)}
    save_file(vectors, folder / "model.safetensors")
    error = refusal(folder)
    assert isinstance(error, InvalidCheckpoint)
    assert "no tensor to quantise" in error.detail


def test_a_recipe_that_keeps_everything_is_refused(folder: Path) -> None:
    error = refusal(folder, overrides=[{"match": "*.weight", "keep": True}])
    assert isinstance(error, InvalidRecipe)
    assert error.where == "overrides"
    preflight(opened(folder), recipe(overrides=[{"match": "a.*", "keep": True}]))


def test_a_target_below_the_smallest_widths_is_refused_with_what_can_be_reached(folder: Path) -> None:
    error = refusal(folder, target={"bits_per_param": 2})
    assert isinstance(error, InfeasibleTarget)
    assert error.where == "target.bits_per_param"
    # int2 and a bf16 scale per block of 32: 2.5 bits, and the vector of 64 elements in bf16.
    smallest = (2.5 * (ELEMENTS - 64) + 16 * 64) / ELEMENTS
    assert f"take {-(-smallest * 1e4 // 1) / 1e4} bits" in error.detail
    preflight(opened(folder), recipe(target={"bits_per_param": smallest + 1e-4}))


def test_a_size_is_refused_in_bytes(folder: Path) -> None:
    least = smallest_bytes(opened(folder), recipe())
    error = refusal(folder, target={"size_bytes": least - 1})
    assert f"take {least} bytes" in error.detail
    preflight(opened(folder), recipe(target={"size_bytes": least}))


@pytest.mark.parametrize(
    ("changes", "formats"),
    [
        ({}, ("int2@32", "int2@32")),
        ({"allocation": {"name": "uniform", "min_bits": 5}}, ("int5@32", "int5@32")),
        ({"overrides": [{"match": "a*", "min_bits": 6}]}, ("int6@32", "int2@32")),
        ({"overrides": [{"match": "a*", "format": "int8@channel"}]}, ("int8@channel", "int2@32")),
        ({"overrides": [{"match": "a*", "format": "int8@channel", "min_bits": 3}]}, ("int3@channel", "int2@32")),
        ({"overrides": [{"match": "b*", "keep": True}]}, ("int2@32", None)),
        ({"format": "mxfp4"}, ("float3_e2m0@32:absmax:e8m0", "float3_e2m0@32:absmax:e8m0")),
        ({"format": "t7_4@64", "allocation": "fisher"}, ("t7_3@64", "t7_3@64")),
        ({"format": "t7_4@64", "allocation": "uniform"}, ("t7_3@64", "t7_3@64")),
        ({"format": "t7_4@64:signmax", "allocation": "fisher"}, ("t7_2@64:signmax", "t7_2@64:signmax")),
        ({"format": "t7_4@64", "allocation": {"name": "uniform", "min_bits": 3.1}}, ("t7_3.58@64", "t7_3.58@64")),
    ],
)
def test_the_bound_is_every_tensor_at_its_smallest_width(
    folder: Path, changes: dict[str, Any], formats: tuple[str | None, str | None]
) -> None:
    sizes = {"BF16": 2, "U8": 1, "F32": 4}
    expected = 2 * 64
    for shape, text in zip(((48, 64), (64, 96)), formats, strict=True):
        parts = stored_parts(parse(text), shape).values() if text else [("BF16", shape)]
        expected += sum(sizes[dtype] * torch.Size(part).numel() for dtype, part in parts)
    assert smallest_bytes(opened(folder), recipe(**changes)) == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    text=st.sampled_from(["int4@32", "t7_4@64", "nf4@channel", "mxfp4", "normal3@tensor:rms"]),
    method=st.sampled_from(["fisher", "uniform", "heuristic"]),
    choice=st.integers(0, 100),
)
def test_nothing_that_an_allocator_may_choose_is_smaller_than_the_bound(
    folder: Path, text: str, method: str, choice: int
) -> None:
    fmt = parse(text)
    widths = [*fmt.allowed_widths()]
    chosen = fmt.with_bits(widths[choice % len(widths)])
    sizes = {"BF16": 2, "U8": 1, "F32": 4}
    stored = 2 * 64
    for shape in ((48, 64), (64, 96)):
        parts = stored_parts(chosen, shape).values()
        stored += sum(sizes[dtype] * torch.Size(part).numel() for dtype, part in parts)
    assert smallest_bytes(opened(folder), recipe(format=text, allocation=method)) <= stored


def test_an_alias_of_a_tied_tensor_takes_no_bytes(folder: Path) -> None:
    table = torch.ones(16, 64).bfloat16()
    weights = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    save_file(weights, folder / "model.safetensors")
    config = {"model_type": "llama", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    # 16 rows of 64 elements in 2 bits, with two bf16 scales per row, once.
    assert smallest_bytes(opened(folder), recipe()) == 16 * (64 // 4 + 2 * 2)
