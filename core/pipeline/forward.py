"""What a forward pass through a checkpoint needs beside its weights: a device, its text as tokens, an ear.

Used by calibrate, evaluate and allocation by measured KL. Only allocation `higgs` loads a whole network; nothing is
cached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from core.errors import InvalidCheckpoint, MissingFile
from core.evaluation.text import MAX_TEXT_BYTES, Windows, token_windows
from core.networks import load_network
from core.pipeline.context import Progress, StepContext
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
    """The checkpoint's whole network, with other weights in its place if given."""
    return load_network(index, device=device, dtype=dtype_on(device), weights=weights)


def dtype_on(device: str) -> torch.dtype:
    """What networks compute in: fp32 on a CPU and bf16 on a GPU."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def windows_of(index: CheckpointIndex, spec: dict[str, Any], split: Literal["calibration", "evaluation"]) -> Windows:
    """Token windows of a text by the checkpoint's own tokenizer, no longer than the positions that the model has.

    EmptyText, MissingFile without a tokenizer or text, and what `token_windows` raises for them.
    """
    return token_windows(
        _read_file(index, TOKENIZER_FILE, "a forward pass needs the tokenizer"),
        spec["text"],
        split,
        sequences=spec["sequences"],
        sequence_length=min(spec["sequence_length"], _positions(index.config)),
        seed=spec.get("seed", 0),
        open_file=lambda name: _read_file(index, name, "the text is not in the checkpoint"),
    )


def listening(ctx: StepContext) -> Progress:
    """The context's progress, which first asks whether to stop: for work that knows progress only."""

    def heard(fraction: float, what: str) -> None:
        ctx.check()
        ctx.progress(fraction, what)

    return heard


def _read_file(index: CheckpointIndex, name: str, why: str) -> bytes:
    if name not in index.files:
        raise MissingFile(why, where=name[:200], hint="add it to the checkpoint")
    source = index.files[name]
    if source.size > MAX_TEXT_BYTES:
        raise InvalidCheckpoint(f"larger than {MAX_TEXT_BYTES >> 20} MiB", where=name)
    return bytes(source.read(0, source.size))


def _positions(config: dict[str, Any]) -> int:
    """How many positions the config gives the model; practically endless when it does not say."""
    text = config.get("text_config")
    stated = [
        part.get(key)
        for part in (config, text if isinstance(text, dict) else {})
        for key in ("max_position_embeddings", "n_positions", "max_sequence_length")
    ]
    return min((count for count in stated if isinstance(count, int) and count > 1), default=1 << 30)
