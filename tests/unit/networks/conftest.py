"""Small random networks of the library itself, with the checkpoints that it writes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.storage.checkpoint import CheckpointIndex
from core.storage.sources import folder_sources

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
GATED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16} | TOKENS
ENCODER = SMALL | {"intermediate_size": 48, "initializer_range": 1.0}
KINDS: dict[str, dict[str, Any]] = {
    "llama": GATED | {"tie_word_embeddings": False},
    "qwen2": GATED | {"tie_word_embeddings": True},
    "gemma3_text": GATED | {"sliding_window": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1},
    "gpt_neox": SMALL | {"intermediate_size": 48} | TOKENS,
    "mixtral": GATED | {"num_local_experts": 4},
    "qwen3_moe": GATED | {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
}


def saved(folder: Path, kind: str) -> nn.Module:
    """A random network of the library, and its checkpoint in `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    library: Any = AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = library.from_config(AutoConfig.for_model(kind, **KINDS.get(kind, ENCODER)), dtype=torch.float32)
    network.save_pretrained(folder)
    made: nn.Module = network.eval()
    return made


def opened(folder: Path) -> CheckpointIndex:
    return CheckpointIndex.from_files(folder_sources(folder))
