"""GGUF blocks are decoded by hand-made examples; the real package gives a model that speaks English."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.gguf import GgufFile, dequantise
from models.smollm2 import build, convert, transformers_name, undo_rotary_permutation

PARAGRAPH = (
    "The Industrial Revolution was the transition from creating goods by hand to using machines. It began in Great "
    "Britain around 1760 and spread to continental Europe and the United States. Textiles were the dominant industry "
    "of the period in terms of employment, value of output and capital invested."
)


def raw(*parts: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def half(*values: float) -> bytes:
    return np.array(values, dtype="<f2").tobytes()


def test_q4_1_has_low_nibbles_first_then_high_ones() -> None:
    first = half(0.5, -1.0) + bytes([0x21] * 16)
    second = half(2.0, 3.0) + bytes(range(16))
    expected = [-0.5] * 16 + [0.0] * 16 + [2.0 * code + 3.0 for code in range(16)] + [3.0] * 16
    assert dequantise(3, raw(first, second)).tolist() == expected


def test_q8_0_scales_signed_bytes() -> None:
    block = half(0.25) + np.arange(-16, 16, dtype=np.int8).tobytes()
    assert dequantise(8, raw(block)).tolist() == [0.25 * value for value in range(-16, 16)]


def test_floats_are_read_as_they_are() -> None:
    assert dequantise(0, raw(struct.pack("<2f", 1.5, -2.0))).tolist() == [1.5, -2.0]
    assert dequantise(1, raw(half(1.5, -2.0))).tolist() == [1.5, -2.0]


@pytest.mark.parametrize(("type_id", "size"), [(2, 18), (3, 19), (8, 35)])
def test_unknown_types_and_broken_blocks_are_refused(type_id: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"not supported|no whole number"):
        dequantise(type_id, np.zeros(size, dtype=np.uint8))


def test_rotary_permutation_is_undone() -> None:
    heads, rows = 2, 16
    weight = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    interleaved = weight.reshape(heads, 2, rows // heads // 2, 3).swapaxes(1, 2).reshape(rows, 3)
    assert not np.array_equal(interleaved, weight)
    assert np.array_equal(undo_rotary_permutation(interleaved, heads), weight)


def test_names_are_translated() -> None:
    assert transformers_name("blk.12.attn_q.weight") == "model.layers.12.self_attn.q_proj.weight"
    assert transformers_name("token_embd.weight") == "model.embed_tokens.weight"


def string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def value(content: Any) -> bytes:
    """One metadata value with its type."""
    if isinstance(content, str):
        return struct.pack("<I", 8) + string(content)
    if isinstance(content, float):
        return struct.pack("<If", 6, content)
    if isinstance(content, int):
        return struct.pack("<II", 4, content)
    items = [value(item) for item in content]
    return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    """Write a version 3 file with F32 tensors."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(string(key) + value(content) for key, content in metadata.items())
    body = b""
    for name, array in tensors.items():
        shape = array.shape[::-1]
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(body))
        body += array.astype("<f4").tobytes()
        body += bytes(-len(body) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)


def tiny_metadata() -> dict[str, Any]:
    shape = {
        "context_length": 64,
        "embedding_length": 8,
        "feed_forward_length": 12,
        "block_count": 1,
        "vocab_size": 6,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    vocabulary = {
        "tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"],
        "token_type": [3, 3, 3, 1, 1, 1],
        "merges": ["a b"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,
    }
    return {
        **{f"llama.{name}": content for name, content in shape.items()},
        **{f"tokenizer.ggml.{name}": content for name, content in vocabulary.items()},
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def tiny_tensors() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    shapes = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}
    shapes |= {"ffn_gate": (12, 8), "ffn_up": (12, 8), "ffn_down": (8, 12)}
    inside = {f"blk.0.{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
    norms = {f"{name}.weight": np.ones(8) for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")}
    return {"token_embd.weight": rng.normal(size=(6, 8)), **norms, **inside}


def test_a_tiny_file_becomes_a_checkpoint_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = tiny_tensors()
    write_gguf(tmp_path / "tiny.gguf", tiny_metadata(), tensors)
    out = convert(GgufFile(tmp_path / "tiny.gguf"), tmp_path / "out")
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    assert json.loads((out / "config.json").read_text())["rms_norm_eps"] == 1e-5
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    value_weight = torch.from_numpy(tensors["blk.0.attn_v.weight"]).to(torch.bfloat16)
    assert torch.equal(model.model.layers[0].self_attn.v_proj.weight, value_weight)
    assert tokenizer("<|im_start|>abba").input_ids == [1, 5, 4, 3]


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGML" + bytes(64))
    with pytest.raises(ValueError, match="not a GGUF file"):
        GgufFile(tmp_path / "x.gguf")


@pytest.mark.slow
def test_the_real_package_gives_a_model_of_english(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = build(tmp_path / "smollm2")
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.no_grad():
        assert math.exp(model(ids, labels=ids).loss.item()) < 30.0
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
