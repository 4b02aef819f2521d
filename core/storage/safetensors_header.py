"""Reading the header of a safetensors file that nobody vouches for.

What is returned can be trusted: every tensor has a known dtype, a shape whose size equals its bytes, and a place inside
the file that no other tensor shares; together they cover the file from the first data byte to the last. Everything else
is refused with `InvalidCheckpoint`, naming the file, the tensor and the reason. Only the header is read; no data.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the data.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from core.errors import InvalidCheckpoint

MAX_HEADER_BYTES = 100_000_000
MAX_NAME_BYTES = 512
_MAX_DIMENSIONS = 32
_MAX_ELEMENTS = 1 << 62
_METADATA = "__metadata__"

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: `start` and `end` are byte offsets from the beginning of the file's data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """The tensors of one file by name, its `__metadata__`, and the offset at which its data begins."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int


def parse_header(read: Callable[[int, int], bytes | bytearray], size: int, where: str) -> Header:
    """The header of a file of `size` bytes; `read(start, length)` gives its bytes, `where` names it in errors."""
    text = _header_bytes(read, size, where)
    fields = _json_object(text, where)
    metadata = _metadata(fields.pop(_METADATA, {}), where)
    tensors = {name: _entry(name, field, where) for name, field in fields.items()}
    data_start = 8 + len(text)
    _check_cover(tensors, size - data_start, where)
    return Header(tensors, metadata, data_start)


def _refuse(where: str, reason: str, name: str | None = None) -> NoReturn:
    tensor = "" if name is None else f"tensor {name[:80]!r}: "
    raise InvalidCheckpoint(f"{tensor}{reason}", where=where, hint="the file is damaged or not a safetensors file")


def _header_bytes(read: Callable[[int, int], bytes | bytearray], size: int, where: str) -> bytes:
    if size < 8:
        _refuse(where, f"the file has {size} bytes, too few for a header: it is truncated")
    length = int.from_bytes(read(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        _refuse(where, f"the header claims {length} bytes, more than the limit of {MAX_HEADER_BYTES}")
    if 8 + length > size:
        _refuse(where, f"the header claims {length} bytes, the file has {size - 8} after its length: it is truncated")
    text = bytes(read(8, length))
    if len(text) != length:
        _refuse(where, "the file ended while its header was read")
    if text[:1] != b"{":
        _refuse(where, "the header does not begin with '{'")
    return text


def _json_object(text: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                _refuse(where, f"duplicate key {name[:80]!r} in the header")
            fields[name] = value
        return fields

    def no_constant(constant: str) -> NoReturn:
        _refuse(where, f"{constant} in the header is not JSON")

    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise InvalidCheckpoint("the header is not UTF-8", where=where) from error
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"the header is not JSON: {error}", where=where) from error
    if not isinstance(fields, dict):
        _refuse(where, "the header is not a JSON object")
    return fields


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        _refuse(where, f"{_METADATA} is not a map from text to text")
    return value


def _entry(name: str, field: Any, where: str) -> TensorEntry:
    _check_name(name, where)
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        _refuse(where, "must have dtype, shape and data_offsets, and nothing else", name)
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _refuse(where, f"unknown dtype {str(dtype)[:40]!r}", name)
    _check_shape(name, shape, where)
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)):
        _refuse(where, "data_offsets are not two integers", name)
    start, end = offsets
    if not 0 <= start <= end:
        _refuse(where, f"data_offsets {start}..{end} are out of order", name)
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != end - start:
        _refuse(where, f"{dtype} of shape {shape} needs {bits / 8:g} bytes, data_offsets hold {end - start}", name)
    return TensorEntry(name, dtype, tuple(shape), start, end)


def _check_name(name: str, where: str) -> None:
    if not name or any(ord(char) < 32 or ord(char) == 127 or 0xD800 <= ord(char) < 0xE000 for char in name):
        _refuse(where, "the name is empty or holds control characters", name)
    if len(name.encode("utf-8")) > MAX_NAME_BYTES:
        _refuse(where, f"the name is longer than {MAX_NAME_BYTES} bytes", name)


def _check_shape(name: str, shape: Any, where: str) -> None:
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        _refuse(where, "shape is not a list of integers", name)
    if len(shape) > _MAX_DIMENSIONS:
        _refuse(where, f"shape has {len(shape)} dimensions, more than {_MAX_DIMENSIONS}", name)
    if any(size < 0 for size in shape):
        _refuse(where, f"shape {shape} has a negative dimension", name)
    elements = 1
    for size in shape:
        elements *= max(size, 1)
        if elements > _MAX_ELEMENTS:
            _refuse(where, "shape overflows: more elements than a file can hold", name)


def _check_cover(tensors: dict[str, TensorEntry], data_bytes: int, where: str) -> None:
    """The tensors lie one after another from the first data byte to the last."""
    end = 0
    for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.end > data_bytes:
            _refuse(where, f"ends at byte {entry.end} of {data_bytes}: the file is truncated or lies", entry.name)
        if entry.start < end:
            _refuse(where, "overlaps another tensor", entry.name)
        if entry.start > end:
            _refuse(where, f"leaves a hole of {entry.start - end} bytes before it", entry.name)
        end = entry.end
    if end != data_bytes:
        _refuse(where, f"{data_bytes - end} bytes lie beyond the last tensor")
