"""What a checkpoint holds, as JSON for the API and the command line, and what Bitmill cannot do with it and why.

Only headers and the config are read. An entry of `unsupported` says what is affected: a whole method (a forward
pass), or one tensor that will be kept as it is.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from core.recipe.groups import fused_groups
from core.storage.checkpoint import CheckpointIndex, is_weight_file

QUANTISABLE = ("F16", "BF16", "F32", "F64")


def inspection(index: CheckpointIndex) -> dict[str, Any]:
    """The checkpoint's totals, tensors, ties, fused groups and limits."""
    shapes = {name: index.tensors[name].shape for name in index.names}
    architectures = index.config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    return {
        "kind": "checkpoint",
        "architecture": named or index.config.get("model_type"),
        "model_type": index.config.get("model_type"),
        "parameters": index.parameters,
        "size_bytes": index.size_bytes,
        "bits_per_param": 8 * index.size_bytes / max(index.parameters, 1),
        "tensor_count": len(index.names),
        "dtypes": _dtypes(index),
        "ties": [list(pair) for pair in index.ties],
        "fused_groups": [list(group) for group in fused_groups(shapes, index.config) if len(group) > 1],
        "unsupported": _unsupported(index),
        "has_config": bool(index.config),
        "has_tokenizer": "tokenizer.json" in index.files,
        "left_out": sorted(path for path in index.files if is_weight_file(path) and not _belongs(index, path)),
        "tensors": [
            {"name": name, "shape": list(entry.shape), "dtype": entry.dtype, "size_bytes": entry.nbytes}
            for name in index.names
            if (entry := index.tensors[name])
        ],
    }


def _belongs(index: CheckpointIndex, path: str) -> bool:
    return path in index.headers or path.endswith(".safetensors.index.json")


def _dtypes(index: CheckpointIndex) -> dict[str, dict[str, int]]:
    counted: dict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "parameters": 0})
    for name in index.names:
        entry = index.tensors[name]
        counted[entry.dtype]["tensors"] += 1
        counted[entry.dtype]["parameters"] += entry.elements
    return dict(sorted(counted.items()))


def _unsupported(index: CheckpointIndex) -> list[dict[str, str]]:
    found = []
    if already := quantised_by(index.config):
        found.append({"what": "quantisation", "why": f"the weights are already quantised ({already})"})
    if why := no_forward(index.config, "tokenizer.json" in index.files):
        found.append({"what": "calibration and evaluation", "why": why})
    for name in index.names:
        entry = index.tensors[name]
        if entry.dtype not in QUANTISABLE and len(entry.shape) > 1:
            found.append({"what": name, "why": f"dtype {entry.dtype} is kept as it is"})
    return found


def quantised_by(config: dict[str, Any]) -> str:
    """The method that a checkpoint is already quantised with; empty when it is not."""
    stated = config.get("quantization_config")
    if not isinstance(stated, dict):
        return ""
    return str(stated.get("quant_method") or stated.get("format") or "an unnamed method")


def no_forward(config: dict[str, Any], has_tokenizer: bool) -> str:
    """Why no forward pass is possible, as far as files tell; empty when it may be. The engine has the last word."""
    if not config:
        return "config.json is missing"
    if not isinstance(config.get("model_type"), str):
        return "config.json names no model_type"
    return "" if has_tokenizer else "tokenizer.json is missing"
