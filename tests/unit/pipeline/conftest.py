"""A random Llama of 100 000 parameters with a byte tokenizer, written without loading a model library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

WIDTH, INNER, HEADS, KV_HEADS, LAYERS, VOCABULARY = 64, 160, 4, 2, 2, 256


def llama_config(tied: bool = False) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH // HEADS,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def llama_shapes(tied: bool = False) -> dict[str, tuple[int, ...]]:
    head = WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, WIDTH)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (WIDTH,),
            f"{at}.post_attention_layernorm.weight": (WIDTH,),
            f"{at}.self_attn.q_proj.weight": (HEADS * head, WIDTH),
            f"{at}.self_attn.k_proj.weight": (KV_HEADS * head, WIDTH),
            f"{at}.self_attn.v_proj.weight": (KV_HEADS * head, WIDTH),
            f"{at}.self_attn.o_proj.weight": (WIDTH, HEADS * head),
            f"{at}.mlp.gate_proj.weight": (INNER, WIDTH),
            f"{at}.mlp.up_proj.weight": (INNER, WIDTH),
            f"{at}.mlp.down_proj.weight": (WIDTH, INNER),
        }
    return shapes


def llama_weights(tied: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else (torch.randn(shape, generator=chance) * (3 / shape[-1]) ** 0.5).to(torch.bfloat16)
        )
        for name, shape in sorted(llama_shapes(tied).items())
    }


def byte_tokenizer() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str())


def write_llama(folder: Path, tied: bool = False, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    save_file(llama_weights(tied, seed), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(llama_config(tied), indent=2))
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: someone/something\n---\n# Theirs\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """The folder of an untied random Llama."""
    return write_llama(tmp_path / "llama")


@pytest.fixture
def moe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a random Mixtral, whose experts are stored one by one."""
    from tests.unit.networks import conftest as networks

    monkeypatch.setitem(networks.KINDS, "mixtral", networks.KINDS["mixtral"] | {"vocab_size": VOCABULARY})
    networks.saved(tmp_path / "moe", "mixtral")
    (tmp_path / "moe/tokenizer.json").write_text(byte_tokenizer())
    return tmp_path / "moe"
