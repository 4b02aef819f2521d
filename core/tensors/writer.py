"""Safetensors files written piece by piece, with sizes known before the first byte.

All names, dtypes and shapes are given first, so the header is exact and `planned_bytes` can be budgeted with. Data may
then come in any order; a file that lacks a tensor when it is closed is an error. The same entries, metadata and data
give the same bytes on every machine. Layout: wider dtypes first, then by name, which keeps every tensor aligned to its
dtype for readers that map the file; the header is padded with spaces to 8 bytes.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch

from core.errors import BitmillError, OutOfDisk
from core.storage.safetensors_header import DTYPE_BITS
from core.tensors.dtypes import SAFETENSORS_NAMES


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a file to be written; `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def header_text(parts: Iterable[Part], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header's JSON, padded, and the offset of each part in the data."""
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for part in sorted(parts, key=lambda part: (-DTYPE_BITS[part.dtype], part.name)):
        offsets[part.name], end = end, end + part.nbytes
        fields[part.name] = {
            "dtype": part.dtype,
            "shape": list(part.shape),
            "data_offsets": [offsets[part.name], end],
        }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8), offsets


def planned_bytes(parts: Iterable[Part], metadata: Mapping[str, str]) -> int:
    """The exact size of the file: length, header and data."""
    parts = list(parts)
    return 8 + len(header_text(parts, metadata)[0]) + sum(part.nbytes for part in parts)


class SafetensorsWriter:
    """A file being written; a context manager. Leaving it in peace checks that every part came and flushes to disk."""

    def __init__(self, path: Path, parts: Iterable[Part], metadata: Mapping[str, str]) -> None:
        self._parts = {part.name: part for part in parts}
        self._missing = set(self._parts)
        text, self._offsets = header_text(self._parts.values(), metadata)
        self._data_start, self._path = 8 + len(text), path
        self._file = path.open("xb")
        self._write_at(0, len(text).to_bytes(8, "little") + text)
        self.size = self._data_start + sum(part.nbytes for part in self._parts.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                if self._missing:
                    raise BitmillError(f"{sorted(self._missing)[0]} was not written", where=self._path.name)
                os.fsync(self._file.fileno())

    def write(self, name: str, data: torch.Tensor | bytes | bytearray | memoryview) -> None:
        """One part, whole: a tensor of the planned dtype and shape, or its bytes."""
        part = self._parts[name]
        if isinstance(data, torch.Tensor):
            if (kind := (SAFETENSORS_NAMES.get(data.dtype), tuple(data.shape))) != (part.dtype, part.shape):
                raise BitmillError(f"planned as {(part.dtype, part.shape)}, is {kind}", where=name)
            data = tensor_bytes(data)
        if len(data) != part.nbytes:
            raise BitmillError(f"planned with {part.nbytes} bytes, has {len(data)}", where=name)
        self._write_at(self._data_start + self._offsets[name], data)
        self._missing.discard(name)

    def _write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        write_at(self._file, offset, data, self._path)


def write_at(file: BinaryIO, offset: int, data: bytes | bytearray | memoryview, path: Path) -> None:
    """All of the data at a place of a file, whatever its position; OutOfDisk names the path."""
    view, done = memoryview(data), 0
    try:
        while done < len(view):
            done += os.pwrite(file.fileno(), view[done : done + (1 << 30)], offset + done)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfDisk("the disk is full", where=str(path)) from error
        raise


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements in order, little-endian; a view of its own memory when it is contiguous on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
