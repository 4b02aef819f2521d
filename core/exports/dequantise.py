"""From an artefact back to a plain safetensors checkpoint that other programs load.

Streams: one tensor is decoded at a time. The non-weight files are copied byte for byte; config.json loses only our
`quantization_config` (and states the new dtype when one was asked for).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from core.errors import InvalidCheckpoint, UserError
from core.exports.artefact import Artefact, is_artefact
from core.exports.bitmill import CONFIG, original_name, plain_config
from core.exports.layout import MAX_FILE_BYTES, file_names
from core.storage.checkpoint import INDEX_FILE, CheckpointIndex, is_weight_file
from core.storage.sources import ByteSource, LocalFile
from core.tensors.dtypes import FLOATING, SAFETENSORS_NAMES
from core.tensors.writer import Part, SafetensorsWriter

Progress = Callable[[float, str], None]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CONFIG_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def dequantise_into(index: CheckpointIndex, folder: Path, dtype: str | None, progress: Progress) -> dict[str, Any]:
    """Write the plain checkpoint into an empty folder.

    `dtype`: bf16, fp16 or fp32 for every floating tensor; None: each in the dtype that the source had.
    Answers {files, tensors, parameters, size_bytes}.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"no dtype {dtype!r}", where="--dtype", hint=", ".join(_DTYPES))
    if not is_artefact(index):
        raise InvalidCheckpoint("not an artefact of the bitmill layout", hint="`bitmill inspect` says what it is")
    artefact = Artefact.open(index)
    for path, source in index.files.items():
        name = None if is_weight_file(path) else original_name(path)
        if name is not None:
            copy_source(source, folder / name)
    files = _files(artefact, dtype)
    for name, parts in files.items():
        _write(artefact, folder / name, parts, progress)
    if len(files) > 1:
        (folder / INDEX_FILE).write_text(_index(files))
    (folder / CONFIG).write_text(json.dumps(_config(index.config, dtype), indent=2, ensure_ascii=False) + "\n")
    return {
        "files": sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()),
        "tensors": len(artefact.tensors),
        "parameters": artefact.parameters,
        "size_bytes": sum((folder / name).stat().st_size for name in files),
    }


def copy_source(source: ByteSource, target: Path) -> None:
    """A file's bytes to `target`, whose folders are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, LocalFile):
        shutil.copyfile(source.path, target)
    else:
        target.write_bytes(source.read(0, source.size))


def _files(artefact: Artefact, dtype: str | None) -> dict[str, list[Part]]:
    groups: list[list[Part]] = [[]]
    for name, stored in artefact.tensors.items():
        kind = SAFETENSORS_NAMES[_DTYPES[dtype]] if dtype and stored.dtype in FLOATING else stored.dtype
        part = Part(name, kind, stored.shape)
        if groups[-1] and sum(one.nbytes for one in groups[-1]) + part.nbytes > MAX_FILE_BYTES:
            groups.append([])
        groups[-1].append(part)
    names = ["model.safetensors"] if len(groups) == 1 else file_names(len(groups))
    return dict(zip(names, groups, strict=True))


def _write(artefact: Artefact, path: Path, parts: list[Part], progress: Progress) -> None:
    with SafetensorsWriter(path, parts, {"format": "pt"}) as writer:
        for number, part in enumerate(parts):
            progress(number / len(parts), part.name)
            if part.dtype == artefact.tensors[part.name].dtype and artefact.is_kept(part.name):
                writer.write(part.name, artefact.index.read_tensor_bytes(part.name))
            else:
                writer.write(part.name, artefact.decode(part.name, part.dtype))


def _index(files: dict[str, list[Part]]) -> str:
    places = {part.name: name for name, parts in files.items() for part in parts}
    size = sum(part.nbytes for parts in files.values() for part in parts)
    return json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"


def _config(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    plain = plain_config(config)
    if dtype is None:
        return plain
    stated = {key: _CONFIG_NAMES[dtype] for key in ("dtype", "torch_dtype") if key in plain}
    return plain | (stated or {"torch_dtype": _CONFIG_NAMES[dtype]})
