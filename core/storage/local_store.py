"""The object store in a folder: what one machine needs.

An object is written to `.tmp`, made durable (fsync of file and folder) and then linked to its name, which is atomic and
never replaces. Links inside the folder are never followed, so nothing outside can be read or written through a key.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from core.errors import BitmillError, DigestMismatch, NotFound, OutOfDisk, PathNotAllowed, StoreUnavailable
from core.storage.object_store import StoredEntry, validate_key

_CHUNK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


class LocalStore:
    """Objects as files under `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._temporary = root / ".tmp"

    def put_file(self, key: str, path: Path, sha256: str | None = None) -> int:
        with _translated(str(path)), path.open("rb") as source:
            return self._put(key, _pieces(source), sha256)

    def put_bytes(self, key: str, data: bytes) -> int:
        return self._put(key, iter([data]), None)

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        with _translated(key), self._open(key) as file:
            file.seek(start)
            return file.read(-1 if length is None else length)

    def stream(self, key: str, start: int = 0, length: int | None = None, chunk: int = _CHUNK) -> Iterator[bytes]:
        with _translated(key):
            file = self._open(key)
        file.seek(start)
        return _stream(file, key, length, chunk)

    def size(self, key: str) -> int | None:
        try:
            with _translated(key), self._open(key) as file:
                return os.fstat(file.fileno()).st_size
        except NotFound:
            return None

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        for entry in self.inventory(prefix):
            yield entry.key, entry.size

    def inventory(self, prefix: str) -> Iterator[StoredEntry]:
        with _translated(prefix):
            yield from _walk(self.root, "", prefix)

    def discard_unfinished(self, before: datetime) -> tuple[int, int]:
        removed, freed = 0, 0
        with _translated(str(self._temporary)), contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self._temporary):
                with contextlib.suppress(FileNotFoundError):  # its writer has just finished
                    found = entry.stat(follow_symlinks=False)
                    if _time(found) < before:
                        Path(entry.path).unlink()
                        removed, freed = removed + 1, freed + found.st_size
        return removed, freed

    def delete(self, key: str) -> None:
        path = self.root / validate_key(key)
        with contextlib.suppress(NotFound), _translated(key):
            self._open(key).close()
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a folder that is not empty stays
                for folder in path.parents:
                    if folder == self.root:
                        break
                    folder.rmdir()

    def local_path(self, key: str) -> Path | None:
        return self.root / key if self.size(key) is not None else None

    def presigned_url(self, key: str, expires_s: int, filename: str) -> str | None:  # noqa: ARG002 - the protocol's
        return None

    def presigned_put_url(self, key: str, size: int, expires_s: int) -> str | None:  # noqa: ARG002 - the protocol's
        return None

    def _put(self, key: str, pieces: Iterator[bytes], sha256: str | None) -> int:
        validate_key(key)
        existing = self.size(key)
        if existing is not None:
            return existing
        with _translated(key):
            self._temporary.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._temporary)
            temporary = Path(name)
            try:
                with os.fdopen(handle, "wb") as target:
                    size = _copy(pieces, target, key, sha256)
                    target.flush()
                    os.fsync(target.fileno())
                return self._publish(temporary, key, size)
            finally:
                temporary.unlink(missing_ok=True)

    def _publish(self, temporary: Path, key: str, size: int) -> int:
        """Link the finished file to its name; whoever comes second leaves what is there."""
        target = self.root / key
        for _ in range(16):
            self._make_folders(key)
            try:
                os.link(temporary, target, follow_symlinks=False)
            except FileExistsError:
                return self.size(key) or 0
            except FileNotFoundError:
                continue  # a delete has just removed the empty folder
            _sync_folder(target.parent)
            return size
        raise StoreUnavailable("the folder disappears while it is written to", where=key)

    def _make_folders(self, key: str) -> None:
        folder = self.root
        for component in key.split("/")[:-1]:
            folder = folder / component
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                _sync_folder(folder.parent)
            if folder.is_symlink():
                raise PathNotAllowed("a link inside the object store is not followed", where=str(folder))

    def _open(self, key: str) -> BinaryIO:
        """Open for reading, component by component, so that no link is followed even if one appears meanwhile."""
        *folders, name = validate_key(key).split("/")
        handle = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for folder in folders:
                inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle)
                os.close(handle)
                handle = inner
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=handle)
        finally:
            os.close(handle)
        return os.fdopen(file, "rb")


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_CHUNK):
        yield piece


def _copy(pieces: Iterator[bytes], target: BinaryIO, key: str, sha256: str | None) -> int:
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        if sha256 is not None:
            digest.update(piece)
        target.write(piece)
        size += len(piece)
    if sha256 is not None and digest.hexdigest() != sha256:
        raise DigestMismatch(f"the bytes have sha256 {digest.hexdigest()}, promised was {sha256}", where=key)
    return size


def _stream(file: BinaryIO, key: str, length: int | None, chunk: int) -> Iterator[bytes]:
    left = length
    with _translated(key), file:
        while left is None or left > 0:
            piece = file.read(chunk if left is None else min(chunk, left))
            if not piece:
                return
            left = None if left is None else left - len(piece)
            yield piece


def _time(found: os.stat_result) -> datetime:
    return datetime.fromtimestamp(found.st_mtime, UTC)


def _walk(folder: Path, base: str, prefix: str) -> Iterator[StoredEntry]:
    """Objects below `folder` (key prefix `base`) that start with `prefix`."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        key = base + entry.name
        if not base and entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            inner = key + "/"
            if inner.startswith(prefix) or prefix.startswith(inner):
                yield from _walk(folder / entry.name, inner, prefix)
        elif entry.is_file(follow_symlinks=False) and key.startswith(prefix):
            with contextlib.suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                yield StoredEntry(key, found.st_size, _time(found))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _translated(where: str) -> Iterator[None]:
    """The operating system's errors in our words."""
    try:
        yield
    except BitmillError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise NotFound("no such object", where=where) from error
    except OSError as error:
        if error.errno in _FULL:
            raise OutOfDisk("the disk of the object store is full", where=where) from error
        if error.errno == errno.ELOOP:
            raise PathNotAllowed("a link inside the object store is not followed", where=where) from error
        raise StoreUnavailable(f"the object store's folder does not answer: {error}", where=where) from error
