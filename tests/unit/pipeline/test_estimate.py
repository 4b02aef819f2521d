"""What a plan says a job will need: memory of blocks, not of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.pipeline.estimate import estimate, required_scratch_bytes
from core.pipeline.local import open_folder
from core.pipeline.plan_file import Plan
from core.recipe.recipe import load_recipe
from core.storage.checkpoint import CheckpointIndex
from tests.unit.pipeline import conftest
from tests.unit.pipeline.conftest import INNER, VOCABULARY, WIDTH, write_llama

TEXT = {"text": "builtin", "sequences": 4, "sequence_length": 64}
RUNTIME = 900 << 20
LOGITS = 2 * 4 << 24


def with_layers(folder: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> CheckpointIndex:
    monkeypatch.setattr(conftest, "LAYERS", count)
    return open_folder(write_llama(folder))


def recipe(**more: Any) -> Any:
    plain: dict[str, Any] = {"version": 1, "target": {"bits_per_param": 4.5}, "format": "int4@32"}
    asked = plain | {"calibration": TEXT, "evaluation": TEXT} | more
    return load_recipe({key: value for key, value in asked.items() if value is not None})


def peak(index: CheckpointIndex, device: str = "cpu", **more: Any) -> int:
    plan = Plan(tensors=(), predicted_bytes=0, predicted_bits_per_param=0.0, predicted_kl=None)
    found = estimate(index, recipe(**more), plan, device, 0.0)["estimated_peak_bytes"]
    assert isinstance(found, int)
    return found


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (with_layers(tmp_path / f"{count}", count, monkeypatch) for count in (2, 9))
    assert peak(few) == peak(many)


def test_it_is_that_of_a_block_its_activations_and_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = with_layers(tmp_path / "llama", 2, monkeypatch)
    block = 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2 + 3 * WIDTH * INNER + 2 * WIDTH
    assert block > 2 * WIDTH * VOCABULARY
    activations, inputs = 3 * 4 * 64 * WIDTH, 6 * WIDTH**2 + INNER**2
    assert peak(index) == 4 * (block + activations) + LOGITS + 8 * inputs + RUNTIME
    assert peak(index, "cuda:0") == 2 * (block + activations) + LOGITS + 8 * inputs + RUNTIME


def test_a_long_text_has_more_activations_and_a_long_sequence_more_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = with_layers(tmp_path / "llama", 2, monkeypatch)
    longer = TEXT | {"sequences": 8}
    assert peak(index, evaluation=longer) - peak(index) == 4 * 3 * 4 * 64 * WIDTH
    long = TEXT | {"sequences": 1, "sequence_length": 1 << 17}
    assert peak(index, evaluation=long) > peak(index) + 2 * 4 * ((1 << 17) * VOCABULARY - (1 << 24))


def test_allocation_that_measures_noise_in_each_tensor_holds_the_whole_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.pipeline.estimate._LOGITS", 1)  # so that a network is more than a batch of logits
    index = with_layers(tmp_path / "llama", 40, monkeypatch)
    assert peak(index, allocation={"name": "higgs"}) == 4 * index.parameters + RUNTIME
    assert peak(index, target={"kl": 0.1}) < 4 * index.parameters + RUNTIME


def test_without_a_text_it_is_two_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = with_layers(tmp_path / "llama", 2, monkeypatch)
    allocation = {"name": "uniform"}
    largest = 2 * WIDTH * VOCABULARY
    assert peak(index, calibration=None, evaluation=False, allocation=allocation) == 2 * largest + (400 << 20)


def test_scratch_has_room_for_the_inputs_of_all_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (with_layers(tmp_path / f"{count}", count, monkeypatch) for count in (2, 3))
    without = recipe(calibration=None, allocation={"name": "uniform"})
    waiting = [required_scratch_bytes(one, recipe()) - required_scratch_bytes(one, without) for one in (few, many)]
    assert waiting == [count * 4 * 64 * WIDTH * 4 for count in (2, 3)]
