"""Networks without weights: the same checks as whole ones, weights where and while they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from core.errors import BitmillError, InvalidCheckpoint
from core.hollow import HollowNetwork
from core.networks import load_network, tensor_names
from tests.unit.networks.conftest import KINDS, opened, saved


def hollow(folder: Path, **more: Any) -> HollowNetwork:
    return HollowNetwork(opened(folder), dtype=torch.float32, **more)


def held(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one for name, one in network.named_parameters() if not one.is_meta}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_materialised_and_every_buffer_is_as_in_the_network_that_is_loaded_whole(
    kind: str, tmp_path: Path
) -> None:
    saved(tmp_path, kind)
    whole = load_network(opened(tmp_path), device="cpu", dtype=torch.float32)
    made = hollow(tmp_path)
    assert not held(made.network)
    for (name, found), (_, wanted) in zip(made.network.named_buffers(), whole.named_buffers(), strict=True):
        assert torch.equal(found, wanted), name
    made.materialise(made.network)
    assert {name: one.sum() for name, one in held(made.network).items()} == {
        name: one.sum() for name, one in whole.named_parameters()
    }
    assert made.names(made.network) == opened(tmp_path).names
    assert made.tensor_names == tensor_names(whole)
    made.release(made.network)
    assert not held(made.network)


def test_a_part_reads_its_own_tensors_and_no_others(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral")
    index, asked = opened(tmp_path), set[str]()

    def zeros(name: str) -> torch.Tensor:
        asked.add(name)
        return torch.zeros(index.tensors[name].shape)

    made = HollowNetwork(index, dtype=torch.float32, weights=zeros)
    part: Any = made.network
    made.materialise(part.model.layers[1])
    assert asked == {name for name in index.names if name.startswith("model.layers.1.")}
    assert asked == set(made.names(part.model.layers[1]))
    assert set(held(made.network)) == {
        name for name, _ in made.network.named_parameters() if name.startswith("model.layers.1.")
    }


def test_a_tied_head_has_the_values_of_the_table_without_the_table(tmp_path: Path) -> None:
    saved(tmp_path, "qwen2")
    made = hollow(tmp_path)
    part: Any = made.network
    made.materialise(part.lm_head)
    assert torch.equal(part.lm_head.weight, load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"])
    assert part.model.embed_tokens.weight.is_meta
    made.release(part.lm_head)
    assert part.lm_head.weight is part.model.embed_tokens.weight


def test_one_expert_of_a_materialised_part_can_be_given_other_values(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral")
    made = hollow(tmp_path)
    layer: Any = made.network.get_submodule("model.layers.0")
    made.materialise(layer)
    (name,) = [name for name in made.names(layer) if "experts.2.w3" in name]
    made.load(layer, {name: torch.ones(48, 32)})
    stacked = layer.mlp.experts.gate_up_proj
    assert stacked[2, 48:].eq(1).all()
    assert not stacked[2, :48].eq(1).any()
    assert not stacked[1].eq(1).any()


def test_values_for_what_is_not_there_and_of_another_shape_are_defects(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    made = hollow(tmp_path)
    layer = made.network.get_submodule("model.layers.0")
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(BitmillError, match=name):
        made.load(layer, {name: torch.ones(48, 32)})
    made.materialise(layer)
    with pytest.raises(BitmillError, match=name):
        made.load(layer, {name: torch.ones(47, 32)})


def test_a_missing_tensor_is_named_before_anything_is_materialised(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidCheckpoint) as refused:
        hollow(tmp_path)
    assert refused.value.where == "model.layers.1.mlp.up_proj.weight"
