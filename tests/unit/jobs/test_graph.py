"""From a recipe to steps: which there are, what each waits for, and how many shards."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRecipe
from core.jobs.graph import MAX_SHARDS, SourceFacts, build, shard_count

RECIPE: dict[str, Any] = {
    "target": {"bits_per_param": 4.0},
    "format": "int4@128",
    "rounding": {"name": "nearest"},
    "allocation": {"name": "fisher"},
    "calibration": {"text": "builtin", "sequences": 2, "sequence_length": 16, "seed": 3},
    "evaluation": {"text": "builtin", "sequences": 2, "sequence_length": 16},
    "overrides": [],
    "groups": "auto",
    "exports": ["bitmill"],
    "gate": None,
    "seed": 7,
}
SOURCE = SourceFacts({"files": []}, 250)


def test_a_full_recipe_has_every_kind_of_step_in_order() -> None:
    specs = build(RECIPE, SOURCE, shard_bytes=100)
    kinds = [spec.kind for spec in specs]
    assert kinds == ["fetch", "calibrate", "allocate", *["quantise"] * 3, "assemble", "evaluate", "export"]
    assert [(spec.index, spec.count) for spec in specs if spec.kind == "quantise"] == [(0, 3), (1, 3), (2, 3)]


def test_layers_that_are_rounded_one_after_another_are_one_shard_and_need_the_text() -> None:
    sequential = {**RECIPE, "rounding": {"name": "watersic", "layers": "sequential"}, "format": "grid4@tensor"}
    for source in (SOURCE, SourceFacts({"files": []}, None)):
        (quantise,) = [spec for spec in build(sequential, source, shard_bytes=100) if spec.kind == "quantise"]
        assert (quantise.index, quantise.count) == (0, 1)
        assert quantise.params["calibration"] == RECIPE["calibration"]
    parallel = build({**sequential, "rounding": {"name": "watersic"}}, SOURCE, shard_bytes=100)
    assert all("calibration" not in spec.params for spec in parallel if spec.kind == "quantise")


def test_a_step_waits_only_for_steps_before_it_and_for_all_shards() -> None:
    specs = build(RECIPE, SOURCE, shard_bytes=100)
    assert all(need < position for position, spec in enumerate(specs) for need in spec.needs)
    assemble = next(spec for spec in specs if spec.kind == "assemble")
    assert [specs[need].kind for need in assemble.needs] == ["fetch", "allocate", *["quantise"] * 3]


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
def test_what_the_recipe_switches_off_has_no_step(part: str) -> None:
    kind = {"calibration": "calibrate", "evaluation": "evaluate"}[part]
    specs = build({**RECIPE, part: False}, SOURCE, shard_bytes=100)
    assert kind not in [spec.kind for spec in specs]
    assert specs[-1].kind == "export"


def test_a_plan_ends_with_the_allocation() -> None:
    assert [spec.kind for spec in build(RECIPE, SOURCE, 100, "plan")] == ["fetch", "calibrate", "allocate"]


def test_a_target_changes_neither_fetch_nor_calibration() -> None:
    other = {**RECIPE, "target": {"bits_per_param": 3.0}, "seed": 8}
    for one, two in zip(build(RECIPE, SOURCE, 100)[:2], build(other, SOURCE, 100)[:2], strict=True):
        assert one == two


def test_a_recipe_that_is_not_canonical_is_refused() -> None:
    with pytest.raises(InvalidRecipe, match="evaluation"):
        build({key: value for key, value in RECIPE.items() if key != "evaluation"}, SOURCE, 100)


@given(size=st.integers(0, 1 << 50), shard=st.integers(1, 1 << 40))
def test_shards_hold_at_most_shard_bytes_unless_there_would_be_too_many(size: int, shard: int) -> None:
    count = shard_count(size, shard)
    assert 1 <= count <= MAX_SHARDS
    assert count == MAX_SHARDS or count * shard >= size
    assert count == 1 or (count - 1) * shard < size


def test_a_checkpoint_of_unknown_size_is_sharded_all_the_same() -> None:
    assert shard_count(None, 1 << 30) == 8
