"""Reading an artefact of the `bitmill` layout, which nobody needs to vouch for.

The files pass the same checks as any checkpoint; on top of them every tensor that the metadata describes must have
exactly the parts that its format and shape need. Tensors are decoded one at a time, from the stored tables alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from core.errors import BitmillError, InvalidCheckpoint, UserError
from core.exports.layout import KEEP, LAYOUT_VERSION, StoredTensor, stored_tensor
from core.recipe.tensor_format import parse
from core.storage.checkpoint import CheckpointIndex
from core.storage.inspection import inspection
from core.storage.safetensors_header import DTYPE_BITS, Header, TensorEntry
from core.tensors.dtypes import FLOATING, TORCH_DTYPES
from core.tensors.encoded import EncodedTensor
from core.tensors.reader import read_tensor


def is_artefact(index: CheckpointIndex) -> bool:
    """Whether the weight files are of the `bitmill` layout."""
    return any("bitmill" in header.metadata for header in index.headers.values())


@dataclass(frozen=True)
class Artefact:
    """The tensors of an artefact by the names that they had in the checkpoint."""

    index: CheckpointIndex
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, index: CheckpointIndex) -> Artefact:
        """Check the descriptions against the stored parts; InvalidCheckpoint for any that do not fit."""
        described: dict[str, StoredTensor] = {}
        for path, header in index.headers.items():
            for name, field in _descriptions(header.metadata, path).items():
                described[name] = _described(index, name, field, path)
        parts = {part.name for tensor in described.values() for part in tensor.parts}
        kept = {name: stored_tensor(index.tensors[name], KEEP) for name in index.names if name not in parts}
        if both := sorted(set(described) & set(kept)):
            raise InvalidCheckpoint("is stored both encoded and as it is", where=both[0])
        return cls(index, dict(sorted((described | kept).items())))

    def encoded(self, name: str) -> EncodedTensor:
        """The tensor as it is stored."""
        stored = self.tensors[name]
        parts = {part.name.removeprefix(name + "."): read_tensor(self.index, part.name) for part in stored.parts}
        return EncodedTensor.from_parts(parse(stored.format), stored.shape, stored.dtype, parts)

    def is_kept(self, name: str) -> bool:
        """Whether the tensor is stored as it was."""
        return self.tensors[name].format == KEEP

    def decode(self, name: str, dtype: str | None = None) -> torch.Tensor:
        """The tensor in its shape, in the given safetensors dtype or the one that it had in the checkpoint.

        What rounding carried beyond the end of the tensor's own dtype is put at that end; UserError when another dtype
        cannot hold the values.
        """
        own = TORCH_DTYPES[self.tensors[name].dtype]
        wanted = TORCH_DTYPES[dtype] if dtype else own
        values = read_tensor(self.index, name) if self.is_kept(name) else self._decoded(name, own, wanted)
        if wanted.is_floating_point and wanted != own:
            _require_range(values, wanted, name)
        return values.to(wanted)

    def _decoded(self, name: str, own: torch.dtype, wanted: torch.dtype) -> torch.Tensor:
        """Rounded once to its own dtype if that is wanted, otherwise fp32 within the range of its own."""
        try:
            encoded = self.encoded(name)
            return encoded.decode(own) if own == wanted else _clamped(encoded.decode(), own)
        except BitmillError as error:
            raise error.at(name) from None

    def as_checkpoint(self) -> CheckpointIndex:
        """The decoded tensors' names, dtypes and shapes, for what builds a network; its bytes cannot be read."""
        header = Header({name: self.entry(name) for name in self.tensors}, {}, 0)
        return CheckpointIndex(self.index.files, self.index.config, {"": header})

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(self.entry(name).elements for name in self.tensors)

    def entry(self, name: str) -> TensorEntry:
        """Name, dtype, shape and decoded size of a tensor, as a checkpoint's header would give them."""
        stored = self.tensors[name]
        entry = TensorEntry(name, stored.dtype, stored.shape, 0, 0)
        return TensorEntry(name, stored.dtype, stored.shape, 0, entry.elements * DTYPE_BITS[stored.dtype] // 8)


def _clamped(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 values within the finite range of a dtype, in place."""
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return values.clamp_(-limit, limit)


def _require_range(values: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    finite = values[values.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    if largest > torch.finfo(dtype).max:
        known = str(dtype).removeprefix("torch.")
        raise UserError(f"holds {largest:g}, which {known} cannot", where=name, hint="a wider --dtype, such as fp32")


def inspect_artefact(index: CheckpointIndex) -> dict[str, Any]:
    """What an artefact holds, as JSON: totals and a row per tensor, bits as stored."""
    artefact = Artefact.open(index)
    rows = [
        {
            "name": name,
            "shape": list(stored.shape),
            "dtype": stored.dtype,
            "format": stored.format,
            "bits": 8 * stored.nbytes / max(artefact.entry(name).elements, 1),
            "size_bytes": stored.nbytes,
        }
        for name, stored in artefact.tensors.items()
    ]
    logical = artefact.as_checkpoint()
    return {
        **inspection(logical),
        "kind": "artefact",
        "format_version": LAYOUT_VERSION,
        "size_bytes": index.size_bytes,
        "bits_per_param": 8 * index.size_bytes / max(logical.parameters, 1),
        "unsupported": [],
        "left_out": [],
        "tensors": rows,
    }


def _descriptions(metadata: dict[str, str], path: str) -> dict[str, Any]:
    try:
        layout = json.loads(metadata.get("bitmill", '{"tensors":{}}'))
        version, tensors = layout.get("version", LAYOUT_VERSION), layout["tensors"]
        tensors = dict(tensors.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidCheckpoint("the description of the layout is damaged", where=path) from error
    if version != LAYOUT_VERSION:
        raise InvalidCheckpoint(
            f"layout version {version!r}, this Bitmill reads version {LAYOUT_VERSION}",
            where=path,
            hint="update Bitmill",
        )
    return tensors


def _described(index: CheckpointIndex, name: str, field: Any, path: str) -> StoredTensor:
    try:
        dtype, shape, text = field["dtype"], tuple(field["shape"]), str(field["format"])
        sizes_are_right = all(type(size) is int and size >= 0 for size in shape) and dtype in FLOATING
    except (KeyError, TypeError) as error:
        raise InvalidCheckpoint("its description is damaged", where=f"{path}: {name[:80]}") from error
    if not sizes_are_right:
        raise InvalidCheckpoint("its description has no possible shape or dtype", where=f"{path}: {name[:80]}")
    try:
        stored = stored_tensor(TensorEntry(name, dtype, shape, 0, 0), text)
    except BitmillError as error:
        raise InvalidCheckpoint(f"its format cannot be read: {error.detail}", where=f"{path}: {name[:80]}") from error
    for part in stored.parts:
        entry = index.tensors.get(part.name)
        if entry is None or (entry.dtype, entry.shape) != (part.dtype, part.shape):
            raise InvalidCheckpoint(
                f"{text} needs a part of {part.dtype} {list(part.shape)}", where=f"{path}: {part.name[:80]}"
            )
    return stored
