"""What a forward pass through a checkpoint needs beside its weights: a device, and its text as tokens.

Used by calibrate, evaluate and allocation towards a KL target. Loads one network at a time per call; nothing is cached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from core.errors import MissingFile
from core.evaluation.text import Windows, token_windows
from core.networks import load_network
from core.storage.checkpoint import CheckpointIndex

TOKENIZER_FILE = "tokenizer.json"


def resolve_device(name: str) -> str:
    """`auto` as what this machine has; other names as they are."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def network_of(
    index: CheckpointIndex, device: str, weights: Callable[[str], torch.Tensor] | None = None
) -> torch.nn.Module:
    """The checkpoint's network in fp32 on a CPU and bf16 on a GPU, with other weights in its place if given."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return load_network(index, device=device, dtype=dtype, weights=weights)


def windows_of(index: CheckpointIndex, spec: dict[str, Any], split: Literal["calibration", "evaluation"]) -> Windows:
    """Token windows of a text by the checkpoint's own tokenizer; EmptyText, or MissingFile without a tokenizer."""
    if TOKENIZER_FILE not in index.files:
        raise MissingFile("a forward pass needs the tokenizer", where=TOKENIZER_FILE, hint="add it to the checkpoint")
    source = index.files[TOKENIZER_FILE]
    return token_windows(
        bytes(source.read(0, source.size)),
        spec["text"],
        split,
        sequences=spec["sequences"],
        sequence_length=spec["sequence_length"],
        seed=spec.get("seed", 0),
    )
