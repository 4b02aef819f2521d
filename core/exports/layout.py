"""Which bytes an artefact's weight files will hold, known exactly before anything is encoded.

A layout is a pure function of the checkpoint's headers and of the choice of a format for every tensor. Tensors lie in
sorted order, cut into files at a size limit; `layout_bytes` is what `bits_per_param` will be computed from, and
assembling fails if the real files differ from it. Tied tensors are stored once.

Layout version 1: tensor X is stored as X.codes (U8), X.scales and what its format needs more; a kept tensor as
itself. `__metadata__` has "format": "pt" and "bitmill": JSON {"version", "tensors": {X: {"format", "shape",
"dtype"}}} about the tensors of that file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from core.errors import InvalidCheckpoint
from core.ids import canonical_json
from core.recipe.tensor_format import parse
from core.storage.checkpoint import CheckpointIndex
from core.storage.safetensors_header import MAX_NAME_BYTES, TensorEntry
from core.tensors.encoded import EncodedTensor
from core.tensors.writer import Part, planned_bytes

LAYOUT_VERSION = 1
KEEP = "keep"
MAX_FILE_BYTES = 4 << 30


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint and the parts that it is stored as; `format` is "keep" for one stored as it is."""

    name: str
    format: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class WeightFile:
    """One file of the artefact."""

    tensors: tuple[StoredTensor, ...]

    @property
    def parts(self) -> list[Part]:
        return [part for tensor in self.tensors for part in tensor.parts]

    @property
    def metadata(self) -> dict[str, str]:
        """`__metadata__`: what is needed to decode the tensors of this file."""
        described = {
            tensor.name: {"format": tensor.format, "shape": list(tensor.shape), "dtype": tensor.dtype}
            for tensor in self.tensors
            if tensor.format != KEEP
        }
        return {"format": "pt", "bitmill": canonical_json({"version": LAYOUT_VERSION, "tensors": described})}

    @property
    def nbytes(self) -> int:
        return planned_bytes(self.parts, self.metadata)


def stored_tensor(entry: TensorEntry, choice: str) -> StoredTensor:
    """How a tensor is stored when it is kept or encoded in the format `choice`."""
    if choice == KEEP:
        return StoredTensor(entry.name, KEEP, entry.dtype, entry.shape, (Part(entry.name, entry.dtype, entry.shape),))
    parts = tuple(
        Part(f"{entry.name}.{suffix}", dtype, shape)
        for suffix, (dtype, shape) in EncodedTensor.planned_parts(parse(choice), entry.shape).items()
    )
    return StoredTensor(entry.name, choice, entry.dtype, entry.shape, parts)


def plan_layout(
    index: CheckpointIndex, choice: Mapping[str, str], max_file_bytes: int = MAX_FILE_BYTES
) -> list[WeightFile]:
    """The files of the artefact. A file holds at least one tensor, and no more than fit in `max_file_bytes` of data."""
    tensors = [stored_tensor(index.tensors[name], choice[name]) for name in index.names]
    _check_names(tensors)
    return [WeightFile(group) for group in _cut(tensors, max_file_bytes)]


def file_names(count: int) -> list[str]:
    """The names of the weight files."""
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def layout_bytes(index: CheckpointIndex, choice: Mapping[str, str], max_file_bytes: int = MAX_FILE_BYTES) -> int:
    """The exact size of all weight files together, headers included."""
    return sum(file.nbytes for file in plan_layout(index, choice, max_file_bytes))


def bits_per_param(index: CheckpointIndex, size_bytes: int) -> float:
    """Stored bits per parameter, tied parameters counted once."""
    return 8 * size_bytes / max(index.parameters, 1)


def _cut(tensors: list[StoredTensor], limit: int) -> Iterator[tuple[StoredTensor, ...]]:
    group: list[StoredTensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.nbytes > limit:
            yield tuple(group)
            group, size = [], 0
        group.append(tensor)
        size += tensor.nbytes
    yield tuple(group)


def _check_names(tensors: list[StoredTensor]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        for part in tensor.parts:
            if part.name in seen:
                raise InvalidCheckpoint("a tensor of the checkpoint has the name of an encoded part", where=part.name)
            if len(part.name.encode()) > MAX_NAME_BYTES:
                raise InvalidCheckpoint(
                    f"with what its parts add the name is longer than {MAX_NAME_BYTES} bytes", where=tensor.name[:80]
                )
            seen.add(part.name)
