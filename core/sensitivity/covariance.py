"""The file of input covariances: E[x xᵀ] over the calibration tokens, for each distinct input of the matrices.

covariance.safetensors has parts `KEY.covariance` F32 (inputs, inputs), symmetric, where KEY is the first, sorted, of
the tensors that multiply with that input. The metadata tells of each tensor its key, how many tokens were seen and
whether the stored matrix is (in, out), and why other matrices have none. A tensor that stacks experts has a part
`NAME.EXPERT.covariance` for each expert that saw tokens, and the metadata tells how many each saw. Parts lie in the
order in which they were made: the writer puts each into the file at once and holds none, so its header is padded to the
room it had set aside.

Promise: the same statistics in the same order give the same bytes. It computes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch

from core.errors import BitmillError, InvalidCheckpoint
from core.storage.checkpoint import CheckpointIndex
from core.storage.safetensors_header import MAX_HEADER_BYTES
from core.tensors.reader import read_tensor
from core.tensors.writer import tensor_bytes, write_at

_FILE_VERSION = 1
_METADATA = "bitmill_covariance"
_SUFFIX = ".covariance"
_ROOM_PER_TENSOR, _ROOM_PER_EXPERT = 1024, 192
_MAX_REASON = 200


@dataclass(frozen=True)
class InputStatistics:
    """`covariance`: E[x xᵀ], fp64 (inputs, inputs), over `tokens`. `transposed`: inputs are the matrix's rows."""

    covariance: torch.Tensor
    tokens: int
    transposed: bool = False


@dataclass(frozen=True)
class InputUse:
    """What the file knows of one tensor without its matrix: `inputs` is the matrix's order, `key` whose part it is."""

    key: str
    inputs: int
    tokens: int
    transposed: bool = False


@dataclass(frozen=True)
class StackedUse:
    """The same of a tensor (experts, out, in) or, `transposed`, (experts, in, out): `tokens` that each expert saw."""

    inputs: int
    tokens: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Covariances:
    """A file of covariances. `uses`: by tensor; `reasons`: why a matrix has none; `stacked`: by tensor of experts."""

    uses: Mapping[str, InputUse]
    reasons: Mapping[str, str]
    index: CheckpointIndex
    stacked: Mapping[str, StackedUse] = field(default_factory=dict)

    @classmethod
    def from_index(cls, index: CheckpointIndex) -> Covariances:
        """Of an opened file, wherever it lies; InvalidCheckpoint for another."""
        try:
            about = json.loads(index.metadata[_METADATA])
            if about["version"] != _FILE_VERSION:
                raise InvalidCheckpoint(f"covariances of version {about['version']}, not {_FILE_VERSION}")
            known = about["tensors"].items()
            uses = {name: _use(one, index) for name, one in known if "experts" not in one}
            stacked = {name: _stacked_use(name, one, index) for name, one in known if "experts" in one}
            return cls(uses, {str(name): str(reason) for name, reason in about["reasons"].items()}, index, stacked)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise InvalidCheckpoint("not a file of covariances", where=next(iter(index.headers), "")) from error

    def of(self, name: str) -> InputStatistics | None:
        """The statistics of a tensor's inputs, read anew; None where there are none, for which `reasons` has a word."""
        if (use := self.uses.get(name)) is None:
            return None
        return InputStatistics(read_tensor(self.index, use.key + _SUFFIX).double(), use.tokens, use.transposed)

    def of_expert(self, name: str, expert: int) -> InputStatistics | None:
        """The same of one expert of a tensor that stacks them; None for one that saw no token."""
        use = self.stacked.get(name)
        if use is None or not use.tokens[expert]:
            return None
        matrix = read_tensor(self.index, _expert_key(name, expert) + _SUFFIX).double()
        return InputStatistics(matrix, use.tokens[expert], use.transposed)

    def describe(self) -> dict[str, Any]:
        """{tensors: {name: {tokens, inputs, key, experts?}}, not_reached: {name: reason}}; `experts`: their tokens."""
        single = {name: {"tokens": use.tokens, "inputs": use.inputs, "key": use.key} for name, use in self.uses.items()}
        stacked = {
            name: {"tokens": sum(use.tokens), "inputs": use.inputs, "key": name, "experts": list(use.tokens)}
            for name, use in self.stacked.items()
        }
        return {
            "tensors": dict(sorted((single | stacked).items())),
            "not_reached": dict(sorted(self.reasons.items())),
        }


def _use(one: Mapping[str, Any], index: CheckpointIndex) -> InputUse:
    inputs = int(index.tensors[one["key"] + _SUFFIX].shape[0])
    return InputUse(str(one["key"]), inputs, int(one["tokens"]), bool(one.get("transposed", False)))


def _stacked_use(name: str, one: Mapping[str, Any], index: CheckpointIndex) -> StackedUse:
    tokens = tuple(int(count) for count in one["experts"])
    sizes = {index.tensors[_expert_key(name, at) + _SUFFIX].shape[0] for at, count in enumerate(tokens) if count}
    (inputs,) = sizes  # ValueError for none, or several
    return StackedUse(inputs, tokens, bool(one.get("transposed", False)))


def _expert_key(name: str, expert: int) -> str:
    return f"{name}.{expert}"


class CovarianceWriter:
    """A new file being written; a context manager. It keeps room for `names`, the tensors that it may tell of, and as
    many `experts` of those that stack them.
    """

    def __init__(self, path: Path, names: Iterable[str], experts: Mapping[str, int] | None = None) -> None:
        room = sum(4 * len(_json(json.dumps(name))) + _ROOM_PER_TENSOR for name in names)
        room += sum(count * (len(_json(name)) + _ROOM_PER_EXPERT) for name, count in (experts or {}).items())
        self._room = min(MAX_HEADER_BYTES, (_ROOM_PER_TENSOR + room) // 8 * 8)
        self._fields: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, dict[str, Any]] = {}
        self._reasons: dict[str, str] = {}
        self._path, self._end = path, 0
        self._file: BinaryIO = path.open("xb", buffering=0)
        self._put(0, b"\0" * 8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._put(0, self._header())
                os.fsync(self._file.fileno())

    def write(self, key: str, size: int, panels: Iterator[torch.Tensor], users: Mapping[str, tuple[int, bool]]) -> None:
        """One matrix (size, size) as F32 panels of its rows; `users`: tokens and whether transposed, by tensor."""
        start = self._end
        for panel in panels:
            data = tensor_bytes(panel)
            self._put(8 + self._room + self._end, data)
            self._end += len(data)
        if self._end - start != 4 * size * size:
            raise BitmillError(f"planned as {size} rows, has {(self._end - start) / (4 * size):g}", where=key)
        self._fields[key + _SUFFIX] = {"dtype": "F32", "shape": [size, size], "data_offsets": [start, self._end]}
        for name, (tokens, transposed) in users.items():
            self._tensors[name] = {"key": key, "tokens": tokens} | ({"transposed": True} if transposed else {})

    def write_expert(self, name: str, expert: int, size: int, panels: Iterator[torch.Tensor]) -> None:
        """The matrix of one expert of a tensor, of which `stack` tells the rest."""
        self.write(_expert_key(name, expert), size, panels, {})

    def stack(self, name: str, tokens: Iterable[int], *, transposed: bool) -> None:
        """A tensor of experts: how many tokens each saw; those that saw any have been written."""
        self._tensors[name] = {"experts": list(tokens)} | ({"transposed": True} if transposed else {})

    def refuse(self, name: str, reason: str) -> None:
        """Say why a tensor has no statistics, whatever was written of it before; the first reason counts."""
        self._tensors.pop(name, None)
        self._reasons.setdefault(name, reason[:_MAX_REASON])

    @property
    def known(self) -> frozenset[str]:
        """The tensors with statistics or a reason."""
        return frozenset((*self._tensors, *self._reasons))

    def _header(self) -> bytes:
        about = {
            "version": _FILE_VERSION,
            "tensors": dict(sorted(self._tensors.items())),
            "reasons": dict(sorted(self._reasons.items())),
        }
        text = _json({"__metadata__": {_METADATA: json.dumps(about, ensure_ascii=False)}, **self._fields})
        if len(text) > self._room:
            raise BitmillError(f"the header has {len(text)} bytes, room for {self._room}", where=self._path.name)
        return self._room.to_bytes(8, "little") + text + b" " * (self._room - len(text))

    def _put(self, offset: int, data: bytes | memoryview) -> None:
        write_at(self._file, offset, data, self._path)


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
