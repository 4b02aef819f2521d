"""A reader of GGUF files (version 2 and 3), as far as SmolLM2's Q4_1 file needs it.

It promises metadata as plain Python values, and tensors as float32 arrays with the outermost
dimension first. The types are F32, F16, Q4_1 and Q8_0; any other type raises `ValueError`.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _f32(raw: Bytes) -> Floats:
    return raw.view("<f4").astype(np.float32)


def _f16(raw: Bytes) -> Floats:
    return raw.view("<f2").astype(np.float32)


def _q4_1(raw: Bytes) -> Floats:
    """Blocks of 32: scale, minimum (f16), 16 bytes; low nibbles come before high ones."""
    blocks = raw.reshape(-1, 20)
    scale, minimum = blocks[:, :4].copy().view("<f2").astype(np.float32).T
    codes = np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), axis=1)
    values: Floats = codes.astype(np.float32) * scale[:, None] + minimum[:, None]
    return values.ravel()


def _q8_0(raw: Bytes) -> Floats:
    """Blocks of 32: scale (f16), 32 signed bytes."""
    blocks = raw.reshape(-1, 34)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    values: Floats = blocks[:, 2:].copy().view(np.int8).astype(np.float32) * scale
    return values.ravel()


@dataclass(frozen=True)
class TensorType:
    """How one GGML type stores its values."""

    name: str
    block_values: int
    block_bytes: int
    decode: Callable[[Bytes], Floats]


TYPES = {
    0: TensorType("F32", 1, 4, _f32),
    1: TensorType("F16", 1, 2, _f16),
    3: TensorType("Q4_1", 32, 20, _q4_1),
    8: TensorType("Q8_0", 32, 34, _q8_0),
}


def dequantise(type_id: int, raw: Bytes) -> Floats:
    """Decode the bytes of whole blocks of a GGML type."""
    if type_id not in TYPES:
        raise ValueError(f"GGML type {type_id} is not supported")
    if raw.size % TYPES[type_id].block_bytes:
        raise ValueError(f"{raw.size} bytes are no whole number of {TYPES[type_id].name} blocks")
    return TYPES[type_id].decode(raw)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, and its shape with the outermost dimension first."""

    shape: tuple[int, ...]
    type_id: int
    offset: int


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self.position += length
        return bytes(self.data[self.position - length : self.position]).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, length = self.scalar("I"), self.scalar("Q")
            return [self.value(item) for _ in range(length)]
        if kind not in SCALARS:
            raise ValueError(f"GGUF metadata type {kind} is unknown")
        return self.scalar(SCALARS[kind])

    def tensor_info(self) -> TensorInfo:
        dimensions = [self.scalar("Q") for _ in range(self.scalar("I"))]
        return TensorInfo(tuple(reversed(dimensions)), self.scalar("I"), self.scalar("Q"))


class GgufFile:
    """An opened GGUF file: `metadata`, `tensors` (by name), and `read` for the values."""

    def __init__(self, path: Path) -> None:
        self._bytes: Bytes = np.memmap(path, dtype=np.uint8, mode="r")
        cursor = _Cursor(memoryview(self._bytes.data))
        if bytes(self._bytes[:4]) != MAGIC:
            raise ValueError(f"{path.name} is not a GGUF file")
        cursor.position = 4
        version, tensors, pairs = cursor.scalar("I"), cursor.scalar("Q"), cursor.scalar("Q")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not supported")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        self.tensors: dict[str, TensorInfo] = {}
        for _ in range(tensors):
            name = cursor.string()
            self.tensors[name] = cursor.tensor_info()
        alignment = int(self.metadata.get("general.alignment", 32))
        self._start = -(-cursor.position // alignment) * alignment

    def read(self, name: str) -> Floats:
        """Return the values of a tensor, dequantised."""
        info = self.tensors[name]
        if info.type_id not in TYPES:
            raise ValueError(f"tensor {name} has the unsupported GGML type {info.type_id}")
        kind = TYPES[info.type_id]
        size = int(np.prod(info.shape)) // kind.block_values * kind.block_bytes
        first = self._start + info.offset
        return dequantise(info.type_id, np.asarray(self._bytes[first : first + size])).reshape(info.shape)
