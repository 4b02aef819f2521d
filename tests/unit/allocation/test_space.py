"""What may be chosen: kept tensors, groups, bounds and overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from core.allocation.space import Group, ladder, with_least
from core.errors import InvalidRecipe
from core.recipe.tensor_format import parse
from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import folder_sources
from tests.unit.allocation.conftest import space_of

WIDTHS = parse("t7_4@32:signmax").allowed_widths()
LAYER = "model.layers.0"
QKV = tuple(f"{LAYER}.self_attn.{role}_proj.weight" for role in "kqv")


def group_of(index: CheckpointIndex, name: str, **recipe: Any) -> Group:
    space = space_of(index, **recipe)
    return next(group for group in space.groups if name in group.members)


def test_every_tensor_is_in_one_group_or_kept(index: CheckpointIndex) -> None:
    space = space_of(index)
    placed = [*space.kept, *(name for group in space.groups for name in group.members)]
    assert sorted(placed) == list(index.names)
    assert all("norm" in name for name in space.kept)


def test_what_a_runtime_fuses_shares_a_format(index: CheckpointIndex) -> None:
    assert group_of(index, QKV[0]).members == QKV
    assert group_of(index, QKV[0], groups="none").members == (QKV[0],)
    assert len(group_of(index, QKV[0], groups=[["*self_attn*"]]).members) == 8


def test_what_cannot_be_quantised_is_kept(tmp_path: Path) -> None:
    tensors = {
        "bias": torch.ones(4),
        "counts": torch.ones(4, 4, dtype=torch.int32),
        "empty": torch.ones(0, 4),
        "weight": torch.ones(4, 4),
        "wide": torch.ones(2, 2, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    space = space_of(CheckpointIndex.from_files(folder_sources(tmp_path, ())))
    assert space.kept == ("bias", "counts", "empty")


def test_an_override_keeps_or_fixes_a_tensor_and_the_first_match_counts(index: CheckpointIndex) -> None:
    overrides: list[dict[str, Any]] = [
        {"match": "lm_head.weight", "format": "int8@channel"},
        {"match": "*embed*", "keep": True},
        {"match": "*", "min_bits": 5},
    ]
    space = space_of(index, overrides=overrides)
    assert "model.embed_tokens.weight" in space.kept
    head = next(group for group in space.groups if group.members == ("lm_head.weight",))
    assert head.formats == ("int8-asym@channel:absmax:bf16",)
    assert head.at(2) == head.at(16) == head.formats[0]
    others = [group for group in space.groups if group is not head]
    assert all(group.widths[0] == 5 for group in others)


def test_an_overrides_format_with_a_bound_is_a_family_whose_width_varies(index: CheckpointIndex) -> None:
    overrides = [{"match": "lm_head.weight", "format": "int4@16", "min_bits": 6}]
    assert group_of(index, "lm_head.weight", overrides=overrides).formats == (
        "int6-asym@16:absmax:bf16",
        "int7-asym@16:absmax:bf16",
        "int8-asym@16:absmax:bf16",
    )


def test_the_recipes_bounds_hold_and_an_overrides_bounds_take_their_place(index: CheckpointIndex) -> None:
    bounded = {"min_bits": 3.0, "max_bits": 5.0, "overrides": [{"match": "lm_head.weight", "max_bits": 8}]}
    assert group_of(index, QKV[0], **bounded).widths == tuple(bits for bits in WIDTHS if 3 <= bits <= 5)
    assert group_of(index, "lm_head.weight", **bounded).widths[-1] == 8


def test_a_group_has_the_bounds_of_all_its_members_together(index: CheckpointIndex) -> None:
    overrides = [{"match": "*v_proj*", "min_bits": 4}, {"match": "*k_proj*", "max_bits": 5}]
    assert group_of(index, QKV[0], overrides=overrides).widths == tuple(bits for bits in WIDTHS if 4 <= bits <= 5)
    contradiction = [{"match": "*v_proj*", "min_bits": 6}, {"match": "*k_proj*", "max_bits": 5}]
    with pytest.raises(InvalidRecipe, match="between 6 and 5"):
        space_of(index, overrides=contradiction)


@pytest.mark.parametrize("asked", [{"keep": True}, {"format": "int8@32"}])
def test_splitting_a_fused_group_is_allowed_and_said(index: CheckpointIndex, asked: dict[str, object]) -> None:
    space = space_of(index, overrides=[{"match": "*layers.0*v_proj*", **asked}])
    assert any(group.members == QKV[:2] for group in space.groups)
    assert len(space.warnings) == 1
    assert "fuses" in space.warnings[0]
    assert QKV[0] in space.warnings[0]


def test_without_overrides_nothing_is_warned_of(index: CheckpointIndex) -> None:
    assert space_of(index).warnings == ()


@pytest.mark.parametrize("text", ["t7_4@64:signmax", "normal4@64", "nf4@64", "laplace4-sym@channel:rms"])
def test_the_ladder_of_a_codebook_has_every_even_number_of_codes(text: str) -> None:
    base = parse(text)
    rungs = ladder(base)
    assert [base.with_bits(bits).codes for bits in rungs] == list(range(4, 257, 2))
    assert list(rungs) == sorted(rungs)


def test_the_ladder_of_integers_and_floats_is_their_widths() -> None:
    assert ladder(parse("int4@64")) == (2, 3, 4, 5, 6, 7, 8)
    assert ladder(parse("float6_e2m3@32")) == parse("float6_e2m3@32").allowed_widths()


def test_a_width_between_the_rungs_is_rounded_down_and_clamped(index: CheckpointIndex) -> None:
    group = group_of(index, QKV[0], min_bits=3.0, max_bits=5.0)
    assert [parse(group.at(bits)).codes for bits in (1, 3, 3.33, 3.9, 4, 7)] == [8, 8, 10, 14, 16, 32]


def test_a_floor_leaves_only_wider_formats(index: CheckpointIndex) -> None:
    group = group_of(index, QKV[0])
    raised = with_least(group, group.at(3.33))
    assert parse(raised.formats[0]).codes == 10
    assert raised.formats[1:] == tuple(text for text in group.formats if parse(text).codes > 10)
