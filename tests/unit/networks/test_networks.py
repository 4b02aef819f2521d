"""Networks from checkpoints: the same numbers as the library's own loader, and refusals that name what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from core.errors import InvalidCheckpoint, MissingFile, UnsupportedArchitecture
from core.networks import check_token_ids, learns_positions, load_network, next_token_logits, tensor_names
from tests.unit.networks.conftest import KINDS, opened, saved


def loaded(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    return load_network(opened(folder), device="cpu", dtype=dtype, **more)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    saved(tmp_path / "llama", "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_answers_what_the_network_that_was_saved_answers(kind: str, tmp_path: Path) -> None:
    original = saved(tmp_path, kind)
    network = loaded(tmp_path)
    ids = torch.arange(24).reshape(2, 12) * 5 % 64
    with torch.no_grad():
        assert torch.equal(next_token_logits(network, ids), next_token_logits(original, ids))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_checkpoint_stands_behind_one_parameter(kind: str, tmp_path: Path) -> None:
    saved(tmp_path, kind)
    names = [name for part in tensor_names(loaded(tmp_path)).values() for name in part]
    assert sorted(names) == sorted(opened(tmp_path).names)


def test_it_is_ready_to_measure_not_to_train(llama: Path) -> None:
    network = loaded(llama, torch.bfloat16)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in network.buffers()} == {torch.float32}


def test_other_weights_can_stand_in_for_the_stored_ones_and_come_one_at_a_time(llama: Path) -> None:
    index, asked = opened(llama), []

    def zero(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.zeros(index.tensors[name].shape)

    network = load_network(index, device="cpu", dtype=torch.float32, weights=zero)
    assert tuple(asked) == index.names
    assert not any(parameter.any() for parameter in network.parameters())


def test_a_tied_head_is_the_table_itself_even_where_files_hold_a_copy(tmp_path: Path) -> None:
    saved(tmp_path, "qwen2")
    change_tensors(tmp_path, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}))
    network: Any = loaded(tmp_path)
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert tensor_names(network)["model.embed_tokens.weight"] == ("model.embed_tokens.weight",)


def test_a_head_that_differs_from_the_table_is_not_tied_whatever_the_config_says(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    change_config(tmp_path, tie_word_embeddings=True)
    network: Any = loaded(tmp_path)
    assert torch.equal(network.lm_head.weight, load_file(tmp_path / "model.safetensors")["lm_head.weight"])


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named(llama: Path, name: str) -> None:
    change_tensors(llama, lambda held: held.__delitem__(name))
    with pytest.raises(InvalidCheckpoint) as refused:
        loaded(llama)
    assert refused.value.where == name


def test_a_missing_expert_is_found_in_the_stacked_parameter(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral")
    (one, *_) = [name for name in opened(tmp_path).names if "experts.2.w3" in name]
    change_tensors(tmp_path, lambda held: held.__delitem__(one))
    with pytest.raises(InvalidCheckpoint, match=r"experts\.gate_up_proj"):
        loaded(tmp_path)


def test_a_tensor_that_the_architecture_does_not_have_is_named(llama: Path) -> None:
    change_tensors(llama, lambda held: held.update({"model.layers.0.extra.weight": torch.ones(3)}))
    with pytest.raises(InvalidCheckpoint) as refused:
        loaded(llama)
    assert refused.value.where == "model.layers.0.extra.weight"


def test_rotary_tables_of_old_checkpoints_are_superfluous(llama: Path) -> None:
    before = loaded(llama)
    change_tensors(
        llama, lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((8,), 7.0)})
    )
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(next_token_logits(loaded(llama), ids), next_token_logits(before, ids))


def test_shapes_that_the_config_contradicts_are_refused_before_memory_is_taken(llama: Path) -> None:
    change_config(llama, intermediate_size=1 << 40)
    with pytest.raises(InvalidCheckpoint, match=r"the config asks for \[32, 1099511627776\]"):
        loaded(llama)


@pytest.mark.parametrize("layers", [10**9, 10**12])
def test_more_layers_than_tensors_are_refused_before_they_are_made(llama: Path, layers: int) -> None:
    change_config(llama, num_hidden_layers=layers)
    with pytest.raises(InvalidCheckpoint, match=str(layers)):
        loaded(llama)


def test_weights_that_are_not_numbers_of_floating_point_are_refused(llama: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(llama, lambda held: held.update({name: held[name].to(torch.int8)}))
    with pytest.raises(InvalidCheckpoint, match="I8"):
        loaded(llama)


def test_what_a_config_says_about_code_kernels_and_quantisers_is_not_heard(llama: Path) -> None:
    change_config(
        llama,
        auto_map={"AutoModelForCausalLM": "someone/else--modeling.Evil"},
        attn_implementation="someone/kernel",
        _attn_implementation="someone/kernel",
        quantization_config={"quant_method": "bitmill"},
        torch_dtype="float64",
    )
    network: Any = loaded(llama)
    assert network.config._attn_implementation in ("sdpa", "eager")
    assert not hasattr(network.config, "auto_map")
    assert next(network.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "nobody_knows_this"}, "nobody_knows_this"),
        ({"model_type": 7}, "7"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "t5", "architectures": None}, "t5"),
        ({"hidden_size": "wide"}, "llama"),
        ({"num_attention_heads": 0}, "llama"),
        ({"hidden_act": "no_such_function"}, "llama"),
    ],
)
def test_a_config_without_a_causal_language_model_is_refused_with_the_reason(
    llama: Path, changes: dict[str, Any], reason: str
) -> None:
    change_config(llama, **changes)
    with pytest.raises(UnsupportedArchitecture, match=reason):
        loaded(llama)


def test_an_encoder_under_the_name_of_a_language_model_is_found_out_by_what_it_answers(tmp_path: Path) -> None:
    saved(tmp_path, "bert")
    with pytest.raises(UnsupportedArchitecture, match="later tokens"):
        loaded(tmp_path)


def test_an_encoder_of_small_weights_is_found_out_too(tmp_path: Path) -> None:
    saved(tmp_path, "bert")
    path = tmp_path / "model.safetensors"
    small = {name: 0.1 * tensor if tensor.ndim > 1 else tensor for name, tensor in load_file(path).items()}
    save_file(small, path)
    with pytest.raises(UnsupportedArchitecture, match="later tokens"):
        loaded(tmp_path)


def test_a_checkpoint_without_a_config_lacks_a_file(llama: Path) -> None:
    (llama / "config.json").unlink()
    with pytest.raises(MissingFile) as refused:
        loaded(llama)
    assert refused.value.where == "config.json"


def test_a_token_beyond_the_vocabulary_is_a_fault_of_the_checkpoint(llama: Path) -> None:
    network = loaded(llama)
    check_token_ids(network, torch.tensor([[0, 63]]))
    with pytest.raises(InvalidCheckpoint, match="64"):
        check_token_ids(network, torch.tensor([[0, 64]]))


def test_learned_positions_are_told_from_rotary_ones(tmp_path: Path) -> None:
    saved(tmp_path / "a", "gpt2")
    saved(tmp_path / "b", "llama")
    assert learns_positions(loaded(tmp_path / "a"))
    assert not learns_positions(loaded(tmp_path / "b"))
