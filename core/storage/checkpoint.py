"""A checkpoint as a set of named tensors in checked files, whether its files lie in a folder or in the store.

Promise: an index that exists is safe to read. Every header passed `safetensors_header`, every tensor of
`model.safetensors.index.json` is in the file it says and nowhere else, no name is held twice, and weights in formats
that execute code were refused. Tied tensors are found (by the config and by equal bytes) and counted once. It does not
read tensor data unless asked, changes nothing, and knows no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from core.errors import InvalidCheckpoint, MissingFile, PathNotAllowed, PickleRefused
from core.ids import content_hash
from core.storage.safetensors_header import Header, TensorEntry, parse_header
from core.storage.sources import ByteSource

INDEX_FILE = "model.safetensors.index.json"
_MAX_JSON_BYTES = 64 << 20
_MAX_PATH_BYTES = 512
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_OTHER_WEIGHTS = (".gguf", ".h5", ".msgpack", ".onnx", ".tflite", ".npz", ".ot")
_OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_INPUT_TABLES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "embeddings.weight")
_COMPARE_BYTES = 8 << 20


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint; `key` is its object in the store, empty while it is only local."""

    path: str
    size: int
    sha256: str
    key: str = ""


def validate_path(path: str) -> str:
    """`path` itself when it is a safe relative path with forward slashes; PathNotAllowed otherwise."""
    parts = path.split("/")
    wrong = (
        not path
        or any(part in ("", ".", "..") for part in parts)
        or any(ord(char) < 32 or char in "\\:\x7f" or 0xD800 <= ord(char) < 0xE000 for char in path)
    )
    if wrong:
        raise PathNotAllowed("not a relative path inside the checkpoint", where=repr(path[:200]))
    if len(path.encode()) > _MAX_PATH_BYTES or any(len(part.encode()) > 200 for part in parts):
        raise PathNotAllowed("the path is too long", where=repr(path[:200]))
    return path


def checkpoint_sha(files: Iterable[FileEntry]) -> str:
    """The checkpoint's name: a hash of the paths, sizes and digests of all its files."""
    return content_hash(sorted([entry.path, entry.size, entry.sha256] for entry in files))


def is_weight_file(path: str) -> bool:
    """Whether a file holds weights in some format, or is an index of such files: these are not copied to exports."""
    name = PurePosixPath(path).name.lower()
    return name.endswith((".safetensors", ".index.json", *_PICKLES, *_OTHER_WEIGHTS))


class CheckpointIndex:
    """The tensors of a checkpoint and where their bytes are. Made by `from_files`."""

    def __init__(
        self,
        files: Mapping[str, ByteSource],
        config: dict[str, Any],
        headers: dict[str, Header],
    ) -> None:
        self.files, self.config = dict(files), config
        self.headers = headers
        self.file_of = {name: path for path, header in headers.items() for name in header.tensors}
        self.tensors: dict[str, TensorEntry] = {
            name: headers[path].tensors[name] for name, path in sorted(self.file_of.items())
        }

    @classmethod
    def from_files(cls, files: Mapping[str, ByteSource]) -> CheckpointIndex:
        """Read and check config, index and headers; raises what `core.errors` has for hostile or missing files."""
        for path in files:
            validate_path(path)
        weight_map = _weight_map(files)
        paths = _weight_files(files) if weight_map is None else sorted(set(weight_map.values()))
        headers = {path: parse_header(files[path].read, files[path].size, path) for path in paths}
        _check_unique(headers)
        if weight_map is not None:
            _check_weight_map(weight_map, headers)
        return cls(files, _read_json(files, "config.json") or {}, headers)

    def read_tensor_bytes(self, name: str) -> bytearray:
        """The tensor's bytes as stored, in a buffer of their own."""
        return self.read_range(name, 0, self.tensors[name].nbytes)

    def read_range(self, name: str, start: int, length: int) -> bytearray:
        """`length` bytes of a tensor from byte `start` of it."""
        path, entry = self.file_of[name], self.tensors[name]
        return self.files[path].read(self.headers[path].data_start + entry.start + start, length)

    @cached_property
    def ties(self) -> tuple[tuple[str, str], ...]:
        """(kept, alias) pairs: the alias is the same parameter, whether or not the files hold a copy of it."""
        head = self._named(_OUTPUT_HEADS)
        table = self._named(_INPUT_TABLES)
        if table is None or self._tie_flag() is False:
            return ()
        if head is None:
            return ((table, "lm_head.weight"),) if self._tie_flag() or self._has_head() else ()
        return ((table, head),) if self._tie_flag() and self._same_bytes(table, head) else ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors that count, sorted: copies of tied tensors left out."""
        aliases = {alias for _, alias in self.ties}
        return tuple(name for name in self.tensors if name not in aliases)

    @cached_property
    def parameters(self) -> int:
        """Elements of all tensors, tied ones once."""
        return sum(self.tensors[name].elements for name in self.names)

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(self.files[path].size for path in self.headers if path in self.files)

    @property
    def metadata(self) -> dict[str, str]:
        """The `__metadata__` of all weight files together."""
        return {key: text for header in self.headers.values() for key, text in header.metadata.items()}

    def _named(self, endings: tuple[str, ...]) -> str | None:
        """The one tensor with such a name; None when there is none or it is not clear which."""
        found = [name for name in self.tensors if any(name == end or name.endswith("." + end) for end in endings)]
        return found[0] if len(found) == 1 else None

    def _has_head(self) -> bool:
        """Whether the architecture ends in a language model's head, by its name."""
        names = self.config.get("architectures")
        return isinstance(names, list) and any(isinstance(name, str) and "LM" in name for name in names)

    def _tie_flag(self) -> bool | None:
        text = self.config.get("text_config")
        inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
        flag = self.config.get("tie_word_embeddings", inner)
        return flag if isinstance(flag, bool) else None

    def _same_bytes(self, first: str, second: str) -> bool:
        one, other = self.tensors[first], self.tensors[second]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return all(
            self.read_range(first, start, length) == self.read_range(second, start, length)
            for start in range(0, one.nbytes, _COMPARE_BYTES)
            if (length := min(_COMPARE_BYTES, one.nbytes - start))
        )


def _read_json(files: Mapping[str, ByteSource], path: str) -> dict[str, Any] | None:
    """The JSON object in that file, None when there is no such file."""
    if path not in files:
        return None
    if files[path].size > _MAX_JSON_BYTES:
        raise InvalidCheckpoint(f"larger than {_MAX_JSON_BYTES} bytes", where=path)
    try:
        value = json.loads(files[path].read(0, files[path].size).decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a surrogate pair could not be written again
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"not JSON: {error}", where=path) from error
    if not isinstance(value, dict):
        raise InvalidCheckpoint("not a JSON object", where=path)
    return value


def _weight_map(files: Mapping[str, ByteSource]) -> dict[str, str] | None:
    index = _read_json(files, INDEX_FILE)
    if index is None:
        return None
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(path, str) for path in places.values()):
        raise InvalidCheckpoint("weight_map is not a map from tensor names to files", where=INDEX_FILE)
    for path in set(places.values()):
        validate_path(path)
        if not path.endswith(".safetensors"):
            raise PickleRefused(f"{path[:200]} is not a safetensors file", where=INDEX_FILE)
        if path not in files:
            raise MissingFile(f"the shard {path[:200]} is not in the checkpoint", where=INDEX_FILE)
    return places


def _weight_files(files: Mapping[str, ByteSource]) -> list[str]:
    """The files that hold a model without an index: model.safetensors, else every safetensors file at the top."""
    if "model.safetensors" in files:
        return ["model.safetensors"]
    shards = sorted(path for path in files if path.endswith(".safetensors") and "/" not in path)
    if shards:
        return shards
    pickles = sorted(path for path in files if path.lower().endswith(_PICKLES))
    if pickles:
        raise PickleRefused(
            "weights in a format that executes code when read", where=pickles[0], hint="convert them to safetensors"
        )
    raise MissingFile("the checkpoint holds no safetensors weights", hint="model.safetensors or shards with an index")


def _check_unique(headers: dict[str, Header]) -> None:
    seen: dict[str, str] = {}
    for path, header in headers.items():
        for name in header.tensors:
            if name in seen:
                raise InvalidCheckpoint(f"tensor {name[:80]!r} is also in {seen[name]}", where=path)
            seen[name] = path
    if not seen:
        raise InvalidCheckpoint("the weight files hold no tensors")


def _check_weight_map(weight_map: dict[str, str], headers: dict[str, Header]) -> None:
    for name, path in weight_map.items():
        if name not in headers[path].tensors:
            raise InvalidCheckpoint(f"says that tensor {name[:80]!r} is in {path}, it is not", where=INDEX_FILE)
    for path, header in headers.items():
        for name in header.tensors:
            if name not in weight_map:
                raise InvalidCheckpoint(f"does not list tensor {name[:80]!r} of {path}", where=INDEX_FILE)
