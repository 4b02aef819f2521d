"""Bytes of a checkpoint's files, wherever they lie: files on this machine or objects in the store.

A source reads any range of one file and knows its size; nothing is cached and nothing stays open between reads, so a
checkpoint of a thousand shards costs no more memory or descriptors than one of a single file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from core.errors import InvalidCheckpoint, MissingFile, PathNotAllowed, StoreUnavailable
from core.storage.object_store import ObjectStore

_PIECE = 8 << 20


class ByteSource(Protocol):
    """One file's bytes."""

    @property
    def size(self) -> int:
        """Length in bytes."""
        ...

    def read(self, start: int, length: int) -> bytearray:
        """Exactly `length` bytes from `start`, in a buffer of the caller's own; InvalidCheckpoint past the end."""
        ...


class LocalFile:
    """A file on this machine, read with pread: what is read does not stay mapped."""

    def __init__(self, path: Path, where: str = "") -> None:
        self.path, self._where = path, where or path.name
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise MissingFile(f"cannot be read: {error.strerror}", where=self._where) from error

    def read(self, start: int, length: int) -> bytearray:
        _check_range(start, length, self.size, self._where)
        buffer = bytearray(length)
        view, done = memoryview(buffer), 0
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while done < length:
                    count = os.preadv(handle, [view[done : done + (1 << 30)]], start + done)
                    if not count:
                        raise InvalidCheckpoint("the file became shorter while it was read", where=self._where)
                    done += count
            finally:
                os.close(handle)
        except OSError as error:
            raise StoreUnavailable(f"reading failed: {error}", where=self._where) from error
        return buffer


class StoredObject:
    """An object of a store that is not a local file."""

    def __init__(self, store: ObjectStore, key: str, size: int, where: str = "") -> None:
        self._store, self._key, self.size, self._where = store, key, size, where or key

    def read(self, start: int, length: int) -> bytearray:
        _check_range(start, length, self.size, self._where)
        buffer, done = bytearray(length), 0
        if length:
            for piece in self._store.stream(self._key, start, length, _PIECE):
                buffer[done : done + len(piece)] = piece
                done += len(piece)
        if done != length:
            raise StoreUnavailable(f"the store gave {done} of {length} bytes", where=self._where)
        return buffer


def stored_source(store: ObjectStore, key: str, size: int, where: str = "") -> ByteSource:
    """The object as a local file where the store has one, else as ranges read over the network."""
    path = store.local_path(key)
    return StoredObject(store, key, size, where) if path is None else LocalFile(path, where)


def folder_sources(root: Path, link_roots: Iterable[Path] = ()) -> dict[str, ByteSource]:
    """Every regular file below `root` by its relative path, hidden folders left out.

    A link may lead to a file in `root` or one of `link_roots`, never outside (PathNotAllowed); folders that are links
    are refused. Raises MissingFile when `root` is not a folder.
    """
    if not root.is_dir():
        raise MissingFile("not a folder", where=str(root))
    allowed = [folder.resolve() for folder in (root, *link_roots)]
    found: dict[str, ByteSource] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in (*names, *(name for name in folders if (Path(folder) / name).is_symlink())):
            path = Path(folder) / name
            relative = path.relative_to(root).as_posix()
            found[relative] = LocalFile(_followed(path, relative, allowed), relative)
    return dict(sorted(found.items()))


def _followed(path: Path, relative: str, allowed: list[Path]) -> Path:
    target = path.resolve()
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise PathNotAllowed("a link that leaves the checkpoint's folder", where=relative, hint="copy the file itself")
    with contextlib.suppress(OSError):
        if target.is_file():
            return target
    raise PathNotAllowed("neither a file nor a folder of files", where=relative)


def _check_range(start: int, length: int, size: int, where: str) -> None:
    if start < 0 or length < 0 or start + length > size:
        raise InvalidCheckpoint(f"bytes {start}..{start + length} of {size} were asked for", where=where)
