"""Which tensors share one format: what runtimes fuse, by name and input dimension, or what the recipe lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.recipe.groups import fused_groups, grouping

Shapes = dict[str, tuple[int, ...]]
LLAMA: Shapes = {
    "model.embed_tokens.weight": (256, 64),
    "model.norm.weight": (64,),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.self_attn.k_proj.weight": (32, 64),
    "model.layers.0.self_attn.v_proj.weight": (32, 64),
    "model.layers.0.self_attn.o_proj.weight": (64, 64),
    "model.layers.0.mlp.gate_proj.weight": (160, 64),
    "model.layers.0.mlp.up_proj.weight": (160, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 160),
    "model.layers.1.self_attn.q_proj.weight": (64, 64),
    "model.layers.1.self_attn.k_proj.weight": (32, 64),
    "model.layers.1.self_attn.v_proj.weight": (32, 64),
}


def shared(shapes: Shapes, **config: object) -> list[set[str]]:
    """The groups of more than one tensor."""
    return [set(group) for group in fused_groups(shapes, config) if len(group) > 1]


def named(*roles: str, at: str, shape: tuple[int, ...] = (64, 64)) -> Shapes:
    return {f"{at}.{role}.weight": shape for role in roles}


def test_query_key_and_value_of_one_layer_are_fused_and_so_are_gate_and_up() -> None:
    layer, other = "model.layers.0", "model.layers.1"
    assert shared(LLAMA) == [
        {f"{layer}.mlp.{role}_proj.weight" for role in ("gate", "up")},
        {f"{layer}.self_attn.{role}_proj.weight" for role in "qkv"},
        {f"{other}.self_attn.{role}_proj.weight" for role in "qkv"},
    ]


@pytest.mark.parametrize("roles", [("query", "key", "value"), ("wq", "wk", "wv"), ("q_lin", "k_lin", "v_lin")])
def test_other_names_of_the_same_three_are_known(roles: tuple[str, ...]) -> None:
    shapes = named(*roles, "dense", at="encoder.layer.3.attention.self")
    assert shared(shapes) == [set(named(*roles, at="encoder.layer.3.attention.self"))]


def test_w1_and_w3_are_gate_and_up() -> None:
    shapes = named("w1", "w3", at="layers.0.feed_forward", shape=(160, 64))
    shapes |= named("w2", at="layers.0.feed_forward", shape=(64, 160))
    assert shared(shapes) == [set(named("w1", "w3", at="layers.0.feed_forward"))]


def test_tensors_with_other_input_dimensions_are_not_fused() -> None:
    shapes: Shapes = {"a.q_proj.weight": (64, 64), "a.k_proj.weight": (64, 48), "a.v_proj.weight": (64, 48)}
    assert shared(shapes) == [{"a.k_proj.weight", "a.v_proj.weight"}]


def test_latent_projections_stand_alone() -> None:
    assert shared(named("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", at="l.0.self_attn")) == []


def test_a_router_is_no_gate_projection() -> None:
    assert shared(named("gate", "up_proj", at="l.0.mlp")) == []


@pytest.mark.parametrize(("gate", "down", "up"), [("gate_proj", "down_proj", "up_proj"), ("w1", "w2", "w3")])
def test_the_experts_of_a_layer_share_two_formats(gate: str, down: str, up: str) -> None:
    shapes: Shapes = {"l.0.mlp.gate.weight": (8, 64), "l.1.mlp.experts.0.w1.weight": (32, 64)}
    for expert in range(12):
        shapes |= named(gate, up, at=f"l.0.mlp.experts.{expert}", shape=(32, 64))
        shapes |= named(down, at=f"l.0.mlp.experts.{expert}", shape=(64, 32))
    first, second = shared(shapes)
    assert sorted((len(first), len(second))) == [12, 24]
    assert {name.split(".")[-2] for name in min(first, second, key=len)} == {down}


def test_shared_experts_are_a_block_of_their_own() -> None:
    shapes = named("gate_proj", "up_proj", at="l.0.mlp.shared_expert")
    shapes |= named("gate_proj", "up_proj", at="l.0.mlp.experts.0")
    assert len(shared(shapes)) == 2


def test_an_encoder_decoder_reads_the_query_of_its_cross_attention_from_elsewhere() -> None:
    shapes = named("q_proj", "k_proj", "v_proj", at="decoder.layers.0.encoder_attn")
    assert shared(shapes, is_encoder_decoder=True) == [set(shapes) - {"decoder.layers.0.encoder_attn.q_proj.weight"}]
    assert shared(shapes) == [set(shapes)]


def test_vectors_are_in_no_group_and_stacked_experts_in_their_own() -> None:
    shapes: Shapes = {"l.0.q_proj.bias": (64,), "l.0.experts.gate_up_proj": (8, 64, 32), "x": (2, 2)}
    assert fused_groups(shapes, {}) == [("l.0.experts.gate_up_proj",), ("x",)]


NAMES = st.lists(
    st.sampled_from(["l", "0", "1", "experts", "q_proj", "k_proj", "gate_proj", "w1", "w3", "weight", "", "é"]),
    min_size=1,
    max_size=6,
).map(".".join)
SHAPES = st.dictionaries(NAMES, st.lists(st.integers(0, 3), max_size=3).map(tuple), max_size=20)
LISTS = st.lists(st.lists(st.sampled_from(["l.*", "*.weight", "*q_proj*", "*", "none"]), min_size=1), max_size=3)
SPECS = st.sampled_from(["auto", "none"]) | LISTS


@given(SHAPES, SPECS)
def test_groups_are_a_sorted_partition_of_the_names_with_two_dimensions(
    shapes: Shapes, spec: str | list[list[str]]
) -> None:
    groups = grouping(spec, shapes, {})
    members = [name for group in groups for name in group]
    assert sorted(members) == sorted(name for name, shape in shapes.items() if len(shape) > 1)
    assert all(list(group) == sorted(group) for group in groups)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)


@given(SHAPES, SPECS)
def test_the_order_of_the_names_does_not_matter(shapes: Shapes, spec: str | list[list[str]]) -> None:
    assert grouping(spec, dict(reversed(shapes.items())), {}) == grouping(spec, shapes, {})


@given(SHAPES)
def test_members_of_a_group_have_one_input_dimension(shapes: Shapes) -> None:
    for group in fused_groups(shapes, {}):
        assert len({shapes[name][-1] for name in group}) == 1


def test_without_groups_every_tensor_stands_alone() -> None:
    assert all(len(group) == 1 for group in grouping("none", LLAMA, {}))


def test_listed_groups_take_the_place_of_the_fused_ones_and_the_first_list_wins() -> None:
    groups = grouping([["*.o_proj.weight", "*embed*"], ["*_proj.weight"]], LLAMA, {})
    assert groups[0] == ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight")
    assert len(groups) == 2
    assert len(groups[1]) == 9
